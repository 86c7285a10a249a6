"""PyTorch features that meet an optimizer.

Oracle: the same program with torch's AdamW.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from adax_triton import AdamW, AdaXW

Build = Callable[..., Optimizer]
pytestmark = pytest.mark.usefixtures("one_thread")


def network(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, width, bias=False, device="cpu", dtype=torch.float32),
        nn.BatchNorm1d(width, device="cpu", dtype=torch.float32),
        nn.Linear(width, 4, device="cpu", dtype=torch.float32),
    )


def batch(step: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(step)
    return torch.randn(6, 8, generator=generator, device="cpu", dtype=torch.float32)


def train(model: nn.Module, optimizer: Optimizer, steps: range = range(4), set_to_none: bool = True) -> nn.Module:
    for step in steps:
        optimizer.zero_grad(set_to_none=set_to_none)
        model(batch(step)).square().mean().backward()
        optimizer.step()
    return model


def gradients_kept(build: Build) -> nn.Module:
    model = network()
    return train(model, build(model.parameters()), set_to_none=False)


def saved_as_an_object(build: Build) -> nn.Module:
    model, file = network(), io.BytesIO()
    optimizer = build(model.parameters())
    train(model, optimizer, range(2))
    torch.save((model, optimizer), file)
    file.seek(0)
    return train(*torch.load(file, weights_only=False), range(2, 5))


def gradients_by_vmap(build: Build) -> nn.Module:
    model = network().eval()
    optimizer, params = build(model.parameters()), dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (x[None],)).square().mean()

    for step in range(3):
        weights = {name: param.detach() for name, param in params.items()}
        grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, batch(step))
        for name, param in params.items():
            param.grad = grads[name].mean(0)
        optimizer.step()
    return model


def parametrized(build: Build) -> nn.Module:
    model = network()
    nn.utils.parametrizations.weight_norm(model[0])
    nn.utils.parametrizations.orthogonal(model[2])
    return train(model, build(model.parameters()))


def tensors_swapped(build: Build) -> nn.Module:
    model = network()
    optimizer = build(model.parameters())
    train(model, optimizer)
    optimizer.zero_grad()
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(model[0].weight.detach() * 2))
    return train(model, optimizer)


def swapped_on_conversion(build: Build) -> nn.Module:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = network()
        optimizer = build(model.parameters())
        train(model, optimizer)
        optimizer.zero_grad()
        return train(model.double().float(), optimizer)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def averaged(build: Build, **options: Any) -> nn.Module:
    model = network()
    optimizer, average = build(model.parameters()), swa_utils.AveragedModel(model, **options)
    scheduler = swa_utils.SWALR(optimizer, 1e-3, anneal_epochs=2)
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        average.update_parameters(model)
        scheduler.step()
    if not options.get("use_buffers"):
        swa_utils.update_bn([batch(step) for step in range(3)], average)
    return average


def within(context: Callable[[], contextlib.AbstractContextManager[Any]], build: Build) -> nn.Module:
    model = network()
    with context():
        optimizer = build(model.parameters())
        train(model, optimizer, range(2))
        optimizer.load_state_dict(optimizer.state_dict())
        return train(model, optimizer, range(2, 5))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def uninitialized_memory_filled() -> Iterator[None]:
    """Fill each new tensor with NaN, to show reads before writes."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


PROGRAMS: dict[str, Callable[[Build], nn.Module]] = {
    "zero_grad(set_to_none=False)": gradients_kept,
    "torch.save(optimizer)": saved_as_an_object,
    "torch.func.vmap": gradients_by_vmap,
    "parametrizations": parametrized,
    "swap_tensors": tensors_swapped,
    "set_swap_module_params_on_conversion": swapped_on_conversion,
    "SWA": averaged,
    "EMA, avg_fn": partial(averaged, avg_fn=swa_utils.get_ema_avg_fn(0.9)),
    "EMA, multi_avg_fn and buffers": partial(
        averaged, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    ),
    "default dtype float64": partial(within, partial(default_dtype, torch.float64)),
    "default dtype bfloat16": partial(within, partial(default_dtype, torch.bfloat16)),
    "default device meta": partial(within, partial(torch.device, "meta")),
    "fill_uninitialized_memory": partial(within, uninitialized_memory_filled),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_adamw_equals_torch_in(name: str, native_cpu: torch.device) -> None:
    options = {"lr": 3e-3, "weight_decay": 0.1}
    expected = PROGRAMS[name](partial(torch.optim.AdamW, **options)).state_dict()
    found = PROGRAMS[name](partial(AdamW, **options)).state_dict()
    assert found.keys() == expected.keys()
    assert not torch.equal(found[next(iter(found))], network().state_dict()["0.weight"])  # it trains
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0.0, atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"states": "8bit_v16", "telemetry": True},
        {"states": "8bit", "max_grad_norm": 1.0},
        {"states": "bfloat16", "master_weights": "24bit"},
    ],
    ids=str,
)
def test_memory_modes_read_no_uninitialized_memory(options: dict[str, Any], backend: torch.device) -> None:
    def run(context: contextlib.AbstractContextManager[Any]) -> list[Tensor]:
        model = network(512).to(backend, torch.bfloat16 if "master_weights" in options else torch.float32)
        optimizer = AdaXW(model.parameters(), **options)
        with context:
            for step in range(2):
                for param in model.parameters():
                    param.grad = torch.full_like(param, 0.1 + step)
                optimizer.step()
        return [*model.parameters(), *(value for state in optimizer.state.values() for value in tensors(state))]

    def tensors(state: dict[str, Any]) -> list[Tensor]:
        return [value for value in state.values() if isinstance(value, Tensor)]

    for found, expected in zip(run(uninitialized_memory_filled()), run(contextlib.nullcontext()), strict=True):
        assert torch.equal(found, expected)


def test_global_hooks_run_around_each_step(native_cpu: torch.device) -> None:
    model, seen = network(), []
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append((optimizer, "before"))),
        register_optimizer_step_post_hook(lambda optimizer, *_: seen.append((optimizer, "after"))),
    ]
    optimizer = AdaXW(model.parameters())
    train(model, optimizer, range(2))
    for handle in handles:
        handle.remove()
    train(model, optimizer, range(1))
    assert seen == [(optimizer, "before"), (optimizer, "after")] * 2


def test_state_dict_pre_hook_runs_before_the_states_are_read(native_cpu: torch.device) -> None:
    model = network()
    optimizer = AdaXW(model.parameters())
    train(model, optimizer)
    optimizer.register_state_dict_pre_hook(lambda each: each.state[model[0].weight]["exp_avg"].zero_())
    assert not optimizer.state_dict()["state"][0]["exp_avg"].any()


@pytest.mark.parametrize("named", [True, False])
def test_states_of_named_parameters_load(named: bool, native_cpu: torch.device) -> None:
    model, twin = network(), network()
    optimizer = AdaXW(model.named_parameters())
    train(model, optimizer)
    twin.load_state_dict(model.state_dict())
    loaded = AdaXW(twin.named_parameters() if named else twin.parameters())
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    for each, its_optimizer in ((model, optimizer), (twin, loaded)):
        train(each, its_optimizer, range(4, 6))
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(param, other)


def test_profiler_names_the_step(native_cpu: torch.device) -> None:
    model = network()
    optimizer = AdaXW(model.parameters())
    with torch.profiler.profile() as profile:
        train(model, optimizer, range(2))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["Optimizer.step#AdaXW.step"] == counts["Optimizer.zero_grad#AdaXW.zero_grad"] == 2


def test_step_adds_no_flops_to_the_count(native_cpu: torch.device) -> None:
    counts, ends = [], []
    for build in (AdaXW, torch.optim.AdamW):
        model = network()
        with FlopCounterMode(display=False) as counter:
            train(model, build(model.parameters()), range(2))
        counts.append(counter.get_total_flops())
        ends.append(model[0].weight)
    assert counts[0] == counts[1] > 0
    assert not torch.equal(*ends)


def test_memory_tracker_counts_the_states(native_cpu: torch.device) -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    model = network(512)
    optimizer, tracker = AdaXW(model.parameters()), MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        train(model, optimizer, range(1))
    peak = {str(kind): size for kind, size in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items()}
    tables = peak["_MemRefType.OPT"] - 2 * peak["_MemRefType.PARAM"]
    assert 0 <= tables < 4096
