"""Gradient release equals `step()` and frees each gradient after its update.

Results are equal bit for bit. Oracle: the same training run without release.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

from adax_triton import AdamW, AdaX, AdaXW
from adax_triton.gradient_release import GradientRelease

SHAPES = ((129,), (), (0, 3), (1,))
QUANTIZED = (65, 64)  # large enough for 8-bit states; not a multiple of the chunk size
# Cover each state format and each weight format at least once.
MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float32-master": (torch.bfloat16, {"master_weights": "float32"}),
    "bfloat16-stochastic": (torch.bfloat16, {"states": "bfloat16", "weight_rounding": "stochastic"}),
    "8bit_v16-24bit": (torch.bfloat16, {"states": "8bit_v16", "master_weights": "24bit"}),
    "8bit_v16-float16": (torch.float16, {"states": "8bit_v16", "master_weights": "float32"}),
    "8bit-stochastic": (torch.bfloat16, {"states": "8bit", "weight_rounding": "stochastic"}),
}
Build = Callable[[list[Parameter]], torch.optim.Optimizer]


def parameters(
    device: torch.device, dtype: torch.dtype = torch.float32, shapes: tuple[tuple[int, ...], ...] = SHAPES
) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def quadratic_loss(params: list[Parameter], step: int) -> Tensor:
    """Return a loss whose gradients depend on the weights.

    One wrong step therefore changes all later ones.
    """
    generator = torch.Generator().manual_seed(1 + step)
    targets = [torch.randn(param.shape, generator=generator).to(param) for param in params]
    losses = [(param - target).abs().square().sum() for param, target in zip(params, targets, strict=True)]
    return torch.stack([loss.float() for loss in losses]).sum()


def weights_and_states(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return all weights and state tensors, in order."""
    state_dict = optimizer.state_dict()
    states = [value for _, state in sorted(state_dict["state"].items()) for _, value in sorted(state.items())]
    return [param.detach() for group in optimizer.param_groups for param in group["params"]] + states


def assert_same(left: torch.optim.Optimizer, right: torch.optim.Optimizer) -> None:
    for a, b in zip(weights_and_states(left), weights_and_states(right), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def assert_release_equals_step(build: Build, params: Callable[[], list[Parameter]], steps: int = 2) -> None:
    """Train with and without release, halving the learning rate after each step."""
    optimizers = []
    for released in (False, True):
        own = params()
        optimizer = build(own)
        if released:
            GradientRelease(optimizer)
        scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
        for step in range(steps):
            quadratic_loss(own, step).backward()
            assert all((param.grad is None) == released for param in own)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        optimizers.append(optimizer)
    assert_same(*optimizers)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_step(mode: str, backend: torch.device) -> None:
    dtype, options = MODES[mode]
    shapes = (QUANTIZED, (129,))
    assert_release_equals_step(
        lambda params: AdaXW(params, **options), lambda: parameters(backend, dtype, shapes), steps=3
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_dtypes_without_a_kernel_equal_step(dtype: torch.dtype, device: torch.device) -> None:
    assert_release_equals_step(AdaX, lambda: [*parameters(device, dtype), *parameters(device)])


def test_groups_and_schedulers_equal_step(backend: torch.device) -> None:
    def build(params: list[Parameter]) -> AdamW:
        return AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.3, "weight_decay": 0.5}], lr=0.1)

    assert_release_equals_step(build, lambda: parameters(backend), steps=3)


def test_capturable_equals_step(device: torch.device) -> None:
    assert_release_equals_step(lambda params: AdaXW(params, capturable=True), lambda: parameters(device))


class Tied(nn.Module):
    """A model that uses its embedding twice.

    It never uses `unused` and does not train `frozen`.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 8)
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.to(device)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.frozen(torch.tanh(self.hidden(self.embed(tokens))))
        return nn.functional.cross_entropy(x @ self.embed.weight.t(), tokens)


def test_tied_parameters_are_updated_once_and_unused_ones_never(backend: torch.device) -> None:
    model, twin = Tied(backend), Tied(backend)
    optimizer, plain = AdaXW(model.parameters()), AdaXW(twin.parameters())
    tokens = torch.arange(11, device=backend)
    with GradientRelease(optimizer):
        for _ in range(3):
            model(tokens).backward()
            twin(tokens).backward()
            plain.step()
            plain.zero_grad()
    assert_same(optimizer, plain)
    assert model.embed.weight in optimizer.state and model.unused.weight not in optimizer.state
    assert optimizer.state[model.embed.weight]["step"] == 3


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_equals_step(use_reentrant: bool, native_cpu: torch.device) -> None:
    runs = []
    for released in (False, True):
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(4))
        optimizer = AdaXW(layers.parameters())
        if released:
            GradientRelease(optimizer)
        for step in range(2):
            x = torch.full((3, 7), 1.0 + step, requires_grad=True)
            for layer in layers[:3]:
                x = checkpoint(layer, x, use_reentrant=use_reentrant)
            layers[3](x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(optimizer)
    assert_same(runs[0], runs[1])


def test_only_one_gradient_exists_at_a_time(backend: torch.device) -> None:
    layers = [nn.Linear(16, 16, bias=False, device=backend) for _ in range(8)]
    params = [layer.weight for layer in layers]
    gradients: list[StorageWeakRef] = []
    alive: list[int] = []

    def count(param: Tensor) -> None:
        assert param.grad is not None
        gradients.append(StorageWeakRef(param.grad.untyped_storage()))
        alive.append(sum(not gradient.expired() for gradient in gradients))

    for param in params:
        param.register_post_accumulate_grad_hook(count)
    optimizer = AdaXW(params)
    release = GradientRelease(optimizer)
    for _ in range(2):
        nn.Sequential(*layers)(torch.ones(2, 16, device=backend)).sum().backward()
    assert len(alive) == 16 and max(alive) == 1
    assert all(gradient.expired() for gradient in gradients)
    release.remove()
    alive.clear()
    nn.Sequential(*layers)(torch.ones(2, 16, device=backend)).sum().backward()
    assert max(alive) == 8  # without release, so the hooks do count


def test_step_uses_the_gradients_after_release_is_removed(backend: torch.device) -> None:
    params, twin = parameters(backend), parameters(backend)
    optimizer, plain = AdaXW(params), AdaXW(twin)
    quadratic_loss(params, 0).backward()
    optimizer.step()  # the plan of this step has outdated counts after the release and must not be reused
    optimizer.zero_grad()
    with GradientRelease(optimizer):
        quadratic_loss(params, 1).backward()
    quadratic_loss(params, 2).backward()
    assert all(param.grad is not None for param in params)
    optimizer.step()
    for step in range(3):
        plain.zero_grad()
        quadratic_loss(twin, step).backward()
        plain.step()
    assert_same(optimizer, plain)


def test_parameters_that_are_added_later_are_released(backend: torch.device) -> None:
    params, twin = parameters(backend), parameters(backend)
    optimizer, plain = AdaXW(params[:2]), AdaXW(twin[:2])
    params[0].requires_grad_(False)
    GradientRelease(optimizer)
    for step in range(3):
        if step == 1:
            optimizer.add_param_group({"params": params[2:], "lr": 0.2})
            plain.add_param_group({"params": twin[2:], "lr": 0.2})
            params[0].requires_grad_(True)
        used = slice(1, 2) if step == 0 else slice(None)
        quadratic_loss(params[used], step).backward()
        quadratic_loss(twin[used], step).backward()
        plain.step()
        plain.zero_grad()
        assert all(param.grad is None for param in params)
    assert_same(optimizer, plain)
    with pytest.raises(ValueError, match="another GradientRelease"):
        GradientRelease(AdaX(params[-1:]))


def test_later_passes_reuse_plans_and_step_keeps_them(backend: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(backend)
    optimizer = AdaXW(model.parameters())
    planned: list[tuple[str, int]] = []
    original = optimizer._new_plan
    monkeypatch.setattr(
        optimizer, "_new_plan", lambda key, *given, **options: planned.append(key) or original(key, *given, **options)
    )
    with GradientRelease(optimizer):
        for _ in range(3):
            model(torch.ones(2, 3, device=backend)).sum().backward()
            optimizer.step()
    assert [kind for kind, _ in planned if kind == "release"] == ["release"] * 4
