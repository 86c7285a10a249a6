"""Check CUDA graphs, and that steps neither wait nor allocate.

The tests need a GPU. Oracle of a graph: an optimizer with the same options, stepped without a graph, bit for bit. The
loss uses only elementwise operations, because a library might choose another algorithm during capture.
test_capturable.py checks capturable steps on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tensor_bits import contents
from torch import Tensor
from torch.nn import Parameter

from adax_triton import AdaX, AdaXW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="needs a CUDA device"),
]

SHAPES = ((5, 7), (4097,), (), (64, 96))
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipping": {"max_grad_norm": 1.0},
    "telemetry": {"telemetry": True, "max_grad_norm": 1.0},
    "bfloat16, stochastic": {"states": "bfloat16", "weight_rounding": "stochastic", "dtype": torch.bfloat16},
    "8bit_v16, float16 master": {"states": "8bit_v16", "master_weights": "float32", "dtype": torch.float16},
    "8bit": {"states": "8bit", "master_weights": "24bit", "dtype": torch.bfloat16},
    "8bit, clipping": {
        **{"states": "8bit", "master_weights": "24bit", "dtype": torch.bfloat16},
        "max_grad_norm": 1.0,
    },
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def build(
    lr: float | Tensor = 0.01, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[AdaX, list[Parameter]]:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator).to("cuda", dtype)) for shape in SHAPES]
    return AdaXW(params, lr=lr, seed=5, **options), params


def training_step(optimizer: AdaX, params: Sequence[Tensor], x: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    losses = [(param.float() * x).square().sum() for param in params]
    torch.stack(losses).sum().backward()
    optimizer.step()


def captured(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Run a step three times on a side stream, then capture it.

    PyTorch requires the warm-up.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@each_option
def test_replays_equal_steps_without_a_graph(options: dict[str, Any]) -> None:
    lrs = [torch.tensor(0.01, device="cuda") for _ in range(2)]
    (optimizer, params), (twin, twins) = (build(lr, **options, capturable=True) for lr in lrs)
    x = torch.ones((), device="cuda")
    graph = captured(lambda: training_step(optimizer, params, x))
    for _ in range(3):
        training_step(twin, twins, x)
    assert contents(optimizer) == contents(twin)  # the capture itself does not step
    for replay in range(5):
        x.fill_(0.5 + replay)
        for lr in lrs:
            lr.fill_(0.01 / (1 + replay))
        graph.replay()
        training_step(twin, twins, x)
        assert contents(optimizer) == contents(twin)
        if "max_grad_norm" in options:
            assert torch.equal(optimizer.grad_norm, twin.grad_norm)
        if "telemetry" in options:
            assert optimizer.read_telemetry() == twin.read_telemetry()


@each_option
def test_eager_steps_between_replays(options: dict[str, Any]) -> None:
    (optimizer, params), (twin, twins) = (build(**options, capturable=True) for _ in range(2))
    x = torch.ones((), device="cuda")
    graph = captured(lambda: training_step(optimizer, params, x))
    gradients = [param.grad for param in params]  # replays write to these tensors
    for _ in range(3):
        training_step(twin, twins, x)
    # Eager steps with all, fewer and again all parameters use other tables than the graph.
    for frozen in (None, 1, None):
        graph.replay()
        training_step(twin, twins, x)
        for weights in (params, twins):
            for index, param in enumerate(weights):
                param.grad = None if index == frozen else torch.full_like(param, 0.25)
        optimizer.step()
        twin.step()
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
    graph.replay()
    training_step(twin, twins, x)
    assert contents(optimizer) == contents(twin)


@each_option
def test_graph_replays_with_a_loaded_state_dict(options: dict[str, Any]) -> None:
    (optimizer, params), (twin, twins) = (build(**options, capturable=True) for _ in range(2))
    x = torch.ones((), device="cuda")
    training_step(twin, twins, x)
    saved, weights = copy.deepcopy(twin.state_dict()), [param.detach().clone() for param in twins]
    graph = captured(lambda: training_step(optimizer, params, x))
    graph.replay()
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for param, weight in zip(params, weights, strict=True):
            param.copy_(weight)
    for _ in range(3):
        graph.replay()
        training_step(twin, twins, x)
    assert contents(optimizer) == contents(twin)
    assert [state["step"] for state in optimizer.state_dict()["state"].values()] == [4] * len(params)


def test_replay_skips_the_step_if_a_scaled_gradient_is_infinite() -> None:
    (optimizer, params), (twin, twins) = (build(capturable=True, fused=True) for _ in range(2))
    x, factor = torch.ones((), device="cuda"), torch.ones((), device="cuda")
    scalers = [torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=100) for _ in range(2)]

    def scaled_step(scaler: torch.amp.GradScaler, stepped: AdaX, weights: Sequence[Tensor]) -> None:
        stepped.zero_grad(set_to_none=True)
        losses = [(param.float() * x).square().sum() * factor for param in weights]
        scaler.scale(torch.stack(losses).sum()).backward()
        scaler.step(stepped)
        scaler.update()

    graph = captured(lambda: scaled_step(scalers[0], optimizer, params))
    for _ in range(3):
        scaled_step(scalers[1], twin, twins)
    for number in (1.0, torch.inf, 0.5, torch.inf, 2.0):
        factor.fill_(number)
        graph.replay()
        scaled_step(scalers[1], twin, twins)
        assert contents(optimizer) == contents(twin)
    assert [state["step"] for state in optimizer.state_dict()["state"].values()] == [6] * len(params)
    assert scalers[0].get_scale() == scalers[1].get_scale() == 2.0**8


def test_capture_without_capturable_is_refused() -> None:
    optimizer, params = build()
    x = torch.ones((), device="cuda")
    with pytest.raises(RuntimeError, match=r"param_groups\[0\] has capturable=False"):
        captured(lambda: training_step(optimizer, params, x))


def test_capture_before_a_step_is_refused() -> None:
    optimizer, params = build(capturable=True)
    for param in params:
        param.grad = torch.ones_like(param)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="without a step of the same parameters"), torch.cuda.graph(graph):
        optimizer.step()
    assert len(optimizer.state) == 0  # states allocated during the capture would never be filled


@each_option
@pytest.mark.parametrize("before", ["no step", "steps of fewer parameters"])
def test_steps_after_a_refused_capture(options: dict[str, Any], before: str) -> None:
    (optimizer, params), (twin, twins) = (build(**options, capturable=True) for _ in range(2))
    x = torch.ones((), device="cuda")
    if before != "no step":
        for stepped, weights in ((optimizer, params), (twin, twins)):
            training_step(stepped, weights, x)
            weights[-1].grad = None
            stepped.step()
            stepped.step()
    for param in params:
        param.grad = torch.ones_like(param)
    # Fill free GPU memory with NaN, so that tensors which the capture allocates but never writes contain NaN.
    torch.full((2**26,), torch.nan, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    with (
        pytest.raises(RuntimeError, match="without a step of the same parameters"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    graph = captured(lambda: training_step(optimizer, params, x))
    for _ in range(3):
        training_step(twin, twins, x)
    assert contents(optimizer) == contents(twin)
    graph.replay()
    training_step(twin, twins, x)
    assert contents(optimizer) == contents(twin)


def test_capture_with_a_parameter_that_is_not_capturable_is_refused() -> None:
    optimizer, params = build(capturable=True)
    cpu_param = Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [cpu_param], "capturable": False})
    for param in (*params, cpu_param):
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = cpu_param.detach().clone()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match=r"param_groups\[1\] has capturable=False"),
        torch.cuda.graph(graph),
    ):
        optimizer.step()
    assert torch.equal(cpu_param, before) and optimizer.state[cpu_param]["step"] == 1


@each_option
@pytest.mark.parametrize("capturable", [False, True])
def test_steady_steps_allocate_nothing(options: dict[str, Any], capturable: bool) -> None:
    optimizer, params = build(**options, capturable=capturable)
    for param in params:
        param.grad = torch.ones_like(param)
    counts = []
    for _ in range(6):
        optimizer.step()
        torch.cuda.synchronize()
        counts.append(torch.cuda.memory_stats()["allocation.all.allocated"])
    assert counts[2:] == counts[2:3] * 4


@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 1.0},
        {"capturable": True},
        {"telemetry": True},
        {"capturable": True, "max_grad_norm": 1.0, "telemetry": True},
        {"states": "8bit_v16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("lr", ["number", "on the device"])
def test_host_does_not_wait(options: dict[str, Any], scaled: bool, lr: str) -> None:
    optimizer, params = build(0.01 if lr == "number" else torch.tensor(0.01, device="cuda"), fused=True, **options)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)

    def step_once() -> None:
        if scaled:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()

    for step in range(4):
        kept = [param.grad for param in params]  # so that new gradients get other addresses and the tables change
        for param in params:
            param.grad = torch.ones_like(param)
        if scaled:
            scaler.scale(torch.ones((), device="cuda"))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step may wait
        try:
            step_once()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        del kept
    assert [state["step"] for state in optimizer.state_dict()["state"].values()] == [4] * len(params)
