"""The time of a step, and the memory of a GPU, by formula: fitted to measured points, then extended to ZeRO.

Measured. A step of k tensors and n elements in all takes

    t(n, k) = a + c k + B n / r

a call of a seconds, c seconds per tensor, and B bytes per element (28 in float32) at r bytes per second. a and c are
fitted to the series of many small tensors by least squares of the relative error, neither below 0; r is that of the
largest flat tensor. The caches are cold; on a GPU the time is the device's, and the host's stands beside it.

ZeRO. A rank owns P / W of P parameters. DeepSpeed hands them over as one flat tensor (stages 1 and 2), or as one per
sub-group of 10^9 (stage 3), and makes passes over them beside the step's own. `PASSES` has the bytes of those, read and
written, per owned parameter of a bfloat16 run: counted with a TorchDispatchMode around DeepSpeed 0.19.8's
`optimizer.step()`. So a step moves 74 bytes (70 at stage 3), and 30 where `integrations.deepspeed` has fused the
passes: one read of the bfloat16 gradient for its norm, then one pass that also unscales, clips and writes bfloat16
weights. Both are counted by `deepspeed_step`.

    unfused  t = calls (a + c) + P / W (28 / r + 46 / copy)        42 at stage 3
    fused    t = calls (a + c) + P / W (30 / r)

Communication is in neither, but for the gathering of weights that follows the step of stages 1 and 2, 2 P (W - 1) / W
bytes to every GPU, where a network's bandwidth is given.

Memory of a GPU: bfloat16 weights and gradients, 2 bytes each, sharded from stage 3 and from stage 2 on; float32 masters
and states of what it owns; unfused also a flat gradient in bfloat16 and in float32, 6 bytes per parameter owned, of one
sub-group at stage 3, which a fused step does without. Activations and communication buffers come on top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from adax_triton.state.precision import Precision, bytes_loaded, bytes_stored, state_bytes

PARAMETERS = (1e9, 7e9, 70e9, 400e9, 1e12)
WORLD_SIZES = (8, 64, 512, 4096)
STAGES = (1, 2, 3)
SUB_GROUP = 1e9  # DeepSpeed's default sub_group_size
# Bytes per owned parameter and step at stages 1 and 2, and at stage 3.
PASSES = {
    "overflow check": (4, 0),
    "norm": (18, 18),
    "flatten": (4, 4),
    "cast to float32": (6, 6),
    "unscale and clip": (8, 8),
    "copy to bfloat16": (6, 6),
}
_BFLOAT16, _MASTER, _FLAT_GRADIENTS = 2, 4, 2 + 4


class Point(NamedTuple):
    """A measured step: elements in all, tensors, seconds."""

    numel: int
    tensors: int
    seconds: float


class StepTime(NamedTuple):
    """The fitted constants of t(n, k): seconds per call, seconds per tensor, bytes per second."""

    call_s: float
    tensor_s: float
    bytes_per_s: float

    def seconds(self, numel: float, tensors: float, bytes_per_element: float) -> float:
        """Return t(n, k)."""
        return self.call_s + self.tensor_s * tensors + bytes_per_element * numel / self.bytes_per_s


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the exponent b of seconds ~ sizes^b: the slope of the least-squares line through the logarithms.

    Raises:
        ValueError: less than two different sizes.
    """
    if len(set(sizes)) < 2:
        raise ValueError(f"sizes: expected at least two different ones, got {list(sizes)}")
    x, y = [math.log(size) for size in sizes], [math.log(time) for time in seconds]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - middle_x) ** 2 for a in x)


def fit(flat: Sequence[Point], many: Sequence[Point], bytes_per_element: float) -> StepTime:
    """Fit t(n, k).

    Args:
        flat: one tensor each, of several sizes.
        many: several numbers of tensors of one size.
        bytes_per_element: B.

    Raises:
        ValueError: the largest tensor takes no longer than a call.
    """
    call, tensor = _line([point.tensors for point in many], [point.seconds for point in many])
    largest = max(flat)
    moving = largest.seconds - call - tensor
    if moving <= 0:
        raise ValueError(f"flat: a step of {largest.numel:,} elements takes no longer than a call; take larger sizes")
    rate = bytes_per_element * largest.numel / moving
    size = many[0].numel / many[0].tensors
    return StepTime(call, max(0.0, tensor - bytes_per_element * size / rate), rate)


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Return (a, c), neither negative, that minimise the sum of ((a + c x) / y - 1)^2."""
    ones = sum(1 / b**2 for b in y)
    cross = sum(a / b**2 for a, b in zip(x, y, strict=True))
    squares = sum(a**2 / b**2 for a, b in zip(x, y, strict=True))
    left, right = sum(1 / b for b in y), sum(a / b for a, b in zip(x, y, strict=True))
    determinant = ones * squares - cross**2
    constant = (left * squares - right * cross) / determinant
    factor = (right * ones - left * cross) / determinant
    if constant < 0:
        return 0.0, right / squares
    return (left / ones, 0.0) if factor < 0 else (constant, factor)


def kernel_bytes(states: str) -> float:
    """Return the bytes a step alone moves per float32 element with a float32 gradient: 28 with float32 states."""
    precision = Precision(states)
    return bytes_loaded(torch.float32, torch.float32, precision) + bytes_stored(torch.float32, precision)


def pass_bytes(stage: int) -> int:
    """Return the bytes that DeepSpeed's own passes move per owned parameter."""
    return sum(bytes_[stage == 3] for bytes_ in PASSES.values())


def step_bytes(stage: int, fused: bool, states: str = "float32") -> float:
    """Return the bytes per owned parameter and step, with DeepSpeed's passes or with those fused."""
    # A fused step reads a bfloat16 gradient twice instead of a float32 one once, and writes bfloat16 weights.
    return kernel_bytes(states) + (2 * _BFLOAT16 - 4 + _BFLOAT16 if fused else pass_bytes(stage))


class Rates(NamedTuple):
    """What the machine gives: the fitted step, and in bytes per second a copy, and the network or None."""

    step: StepTime
    copy: float
    network: float | None = None


def step_seconds(parameters: float, world: int, stage: int, fused: bool, rates: Rates, states: str) -> float:
    """Return the seconds of a step on each of `world` GPUs, without communication."""
    owned = parameters / world
    calls = math.ceil(owned / SUB_GROUP) if stage == 3 else 1
    kernel = step_bytes(stage, True, states) if fused else kernel_bytes(states)
    passes = 0 if fused else pass_bytes(stage)
    fixed = calls * (rates.step.call_s + rates.step.tensor_s)
    return fixed + owned * (kernel / rates.step.bytes_per_s + passes / rates.copy)


def gather_seconds(parameters: float, world: int, stage: int, network: float) -> float:
    """Return the seconds in which every GPU receives the new weights after a step; stage 3 does so in passing."""
    return 0.0 if stage == 3 else _BFLOAT16 * parameters * (world - 1) / world / network


def memory_bytes(parameters: float, world: int, stage: int, fused: bool, states: str) -> float:
    """Return the bytes of weights, gradients, masters, states and flat gradients on each of `world` GPUs."""
    owned = parameters / world
    weights = _BFLOAT16 * (owned if stage == 3 else parameters)
    gradients = _BFLOAT16 * (owned if stage >= 2 else parameters)
    kept = owned * (_MASTER + state_bytes(torch.float32, Precision(states)))
    flat = 0.0 if fused else _FLAT_GRADIENTS * (min(owned, SUB_GROUP) if stage == 3 else owned)
    return weights + gradients + kept + flat


def rows(rates: Rates, states: str) -> list[dict[str, float | None]]:
    """Return the model for all of `PARAMETERS`, `WORLD_SIZES` and `STAGES`, JSON-friendly."""
    return [
        {
            **{"parameters": parameters, "world": world, "stage": stage},
            "bytes_unfused": step_bytes(stage, False, states),
            "bytes_fused": step_bytes(stage, True, states),
            "unfused_ms": 1e3 * step_seconds(parameters, world, stage, False, rates, states),
            "fused_ms": 1e3 * step_seconds(parameters, world, stage, True, rates, states),
            "gather_ms": None
            if rates.network is None
            else 1e3 * gather_seconds(parameters, world, stage, rates.network),
            "unfused_memory": memory_bytes(parameters, world, stage, False, states),
            "fused_memory": memory_bytes(parameters, world, stage, True, states),
        }
        for stage in STAGES
        for parameters in PARAMETERS
        for world in WORLD_SIZES
    ]
