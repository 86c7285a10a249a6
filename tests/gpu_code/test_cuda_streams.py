"""Check steps on several CUDA streams. Needs a GPU.

test_step_kinds.py has checks that run on the CPU.

Oracle: an optimizer with the same options, stepped on one stream, bit for bit. A sleeping kernel delays the steps of a
stream, so that missing synchronization changes the result.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tensor_bits import bits
from torch import Tensor
from torch.nn import Parameter

from adax_triton import AdaXW
from adax_triton.gradient_release import GradientRelease

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="needs a CUDA device"),
]

SHAPES = ((5, 7), (4097,), (), (64, 96))
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipping": {"max_grad_norm": 1.0},
    "telemetry": {"telemetry": True},
    "capturable": {"capturable": True},
    "all": {"capturable": True, "telemetry": True, "max_grad_norm": 1.0},
    "8bit": {"states": "8bit", "master_weights": "24bit", "dtype": torch.bfloat16},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
# GPU cycles: about 30 ms, many times the launch time of a step, and about 300 ms.
PAUSE, LONG_PAUSE = 50_000_000, 500_000_000


def build(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[AdaXW, list[Parameter]]:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator).to("cuda", dtype)) for shape in SHAPES]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.03}]
    optimizer = AdaXW(groups, lr=0.01, seed=5, **options)
    torch.cuda.synchronize()
    return optimizer, params


def set_gradients(params: Sequence[Tensor], number: int) -> None:
    """Set new gradients, computed on the current stream."""
    for index, param in enumerate(params):
        wave = torch.arange(param.numel(), device="cuda", dtype=torch.float32).add_(number + index).sin_()
        param.grad = wave.view(param.shape).to(param.dtype)


def contents(optimizer: AdaXW, params: Sequence[Tensor]) -> list[tuple[str, Any]]:
    """Return every bit of parameters and states."""
    found: list[tuple[str, Any]] = [("param", bits(param)) for param in params]
    for param in params:
        for name, value in optimizer.state[param].items():
            found.append((name, int(value) if name == "step" else bits(value)))
    return found


@each_option
@pytest.mark.parametrize("order", [(0, 1), (0, 0, 1, 1)], ids=str)
def test_steps_alternate_between_streams(options: dict[str, Any], order: Sequence[int]) -> None:
    (optimizer, params), (twin, twins) = build(**options), build(**options)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for number in range(8):
        stream = streams[order[number % len(order)]]
        for other in streams:
            stream.wait_stream(other)  # the other stream updates the same weights
        with torch.cuda.stream(stream):
            torch.cuda._sleep(PAUSE)
            set_gradients(params, number)
            optimizer.step()
        set_gradients(twins, number)
        twin.step()
        if "telemetry" in options:  # reading waits for the step, although this is another stream
            assert optimizer.read_telemetry(per_parameter=True) == twin.read_telemetry(per_parameter=True)
    torch.cuda.synchronize()
    assert contents(optimizer, params) == contents(twin, twins)
    if "max_grad_norm" in options:
        assert torch.equal(optimizer.grad_norm, twin.grad_norm)


@each_option
def test_steps_of_different_parameters_need_not_wait(options: dict[str, Any]) -> None:
    (optimizer, _), (twin, _) = build(**options), build(**options)
    streams = [torch.cuda.Stream() for _ in range(2)]
    groups = list(zip(optimizer.param_groups, twin.param_groups, strict=True))
    for number in range(4):
        # The second group steps while the first still waits. Telemetry belongs to the last step, of the second group.
        for stream, (group, twin_group) in zip(streams, groups, strict=True):
            optimizer.param_groups, twin.param_groups = [group], [twin_group]
            with torch.cuda.stream(stream):
                if stream is streams[0]:
                    torch.cuda._sleep(PAUSE)
                set_gradients(group["params"], number)
                optimizer.step()
            set_gradients(twin_group["params"], number)
            twin.step()
        torch.cuda.synchronize()
        if "telemetry" in options:
            assert optimizer.read_telemetry(per_parameter=True) == twin.read_telemetry(per_parameter=True)
        if "max_grad_norm" in options:
            assert torch.equal(optimizer.grad_norm, twin.grad_norm)
        for group, twin_group in groups:
            assert contents(optimizer, group["params"]) == contents(twin, twin_group["params"])


@each_option
def test_tables_are_allocated_on_the_stream_that_reads_them(options: dict[str, Any]) -> None:
    (optimizer, params), (twin, twins) = build(**options), build(**options)
    for number in range(3):
        set_gradients(twins, number)
        twin.step()
    expected = [bits(param) for param in twins]
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        for number in range(2):
            set_gradients(params, number)
            optimizer.step()
    first.synchronize()
    states = list(optimizer.state.values())  # keep states and gradients alive: their memory is not part of this check
    with torch.cuda.stream(second):
        set_gradients(params, 2)
        torch.cuda._sleep(LONG_PAUSE)
        optimizer.step()
    # If tables were allocated on the first stream, the zeros would reuse their memory before the kernel reads them, and
    # the kernel would update nothing.
    del optimizer
    gc.collect()
    with torch.cuda.stream(first):
        zeros = [torch.zeros(64, dtype=torch.int64, device="cuda") for _ in range(5000)]
    torch.cuda.synchronize()
    assert [bits(param) for param in params] == expected
    assert len(states) == len(params) and len(zeros) == 5000


@pytest.mark.parametrize("capturable", [False, True])
def test_parameters_are_released_on_alternating_streams(capturable: bool) -> None:
    runs = []
    for several in (False, True):
        optimizer, params = build(capturable=capturable)
        GradientRelease(optimizer)
        streams = [torch.cuda.Stream() for _ in range(2)] if several else [torch.cuda.current_stream()] * 2
        for number in range(4):
            stream = streams[number % 2]
            for other in streams:
                stream.wait_stream(other)
            with torch.cuda.stream(stream):
                torch.cuda._sleep(PAUSE)
                torch.stack([(param * (number + 1)).square().sum() for param in params]).sum().backward()
        torch.cuda.synchronize()
        runs.append(contents(optimizer, params))
    assert runs[0] == runs[1]
