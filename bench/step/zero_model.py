"""Compute step time and memory under ZeRO from a GPU's bandwidths.

The bandwidths come from a GPU result of `bench step`. A rank owns P / W of P parameters. `PASSES` are the bytes that
DeepSpeed 0.19.8's own passes read and write per owned parameter of a bfloat16 run. `integrations.deepspeed` fuses the
passes: one read of the bfloat16 gradient for its norm, then one pass that also unscales, clips and writes bfloat16
weights. `bench.zero_passes` counts the bytes of both. r and c are the bandwidths of a step and of a copy, in bytes per
second:

    unfused  t = P / W (28 / r + 46 / c)           42 at stage 3
    fused    t = P / W (30 / r)

Memory is the sum of these; communication, activations and launches are not included:

    weights          2 bytes, bfloat16; at stage 3 only of owned parameters
    gradients        2 bytes, bfloat16; at stages 2 and 3 only of owned parameters
    optimizer       12 bytes, float32 master weights and states of owned parameters
    flat gradients   6 bytes, bfloat16 and float32, unfused only; of owned parameters, at stage 3 of one sub-group
"""

from __future__ import annotations

from typing import Any

from adax_triton.bench.harness.command import markdown_table
from adax_triton.bench.harness.providers import OURS

PARAMETERS = {"1B": 1e9, "7B": 7e9, "70B": 70e9, "400B": 400e9, "1T": 1e12}
WORLD_SIZES = (8, 64, 512, 4096)
SUB_GROUP = 1e9  # DeepSpeed's default sub_group_size
# Bytes per owned parameter: norm, flatten, cast to float32, unscale and clip, copy to bfloat16.
PASSES = 18 + 4 + 6 + 8 + 6
OVERFLOW_CHECK = 4  # at stages 1 and 2
STEP_BYTES, FUSED_BYTES = 28, 30
_BFLOAT16, _OWNED, _FLAT_GRADIENTS = 2, 4 + 8, 2 + 4


def pass_bytes(stage: int) -> int:
    """Return the bytes that DeepSpeed's own passes move per owned parameter."""
    return PASSES if stage == 3 else PASSES + OVERFLOW_CHECK


def step_seconds(owned: float, stage: int, fused: bool, step_rate: float, copy_rate: float) -> float:
    """Return the seconds of a step of `owned` parameters.

    Rates are in bytes per second.
    """
    if fused:
        return owned * FUSED_BYTES / step_rate
    return owned * (STEP_BYTES / step_rate + pass_bytes(stage) / copy_rate)


def memory_bytes(parameters: float, world: int, stage: int, fused: bool) -> float:
    """Return the bytes on each of `world` GPUs.

    They are those of weights, gradients, masters, states and flat gradients.
    """
    owned = parameters / world
    weights = _BFLOAT16 * (owned if stage == 3 else parameters)
    gradients = _BFLOAT16 * (owned if stage >= 2 else parameters)
    flat = 0.0 if fused else _FLAT_GRADIENTS * (min(owned, SUB_GROUP) if stage == 3 else owned)
    return weights + gradients + _OWNED * owned + flat


def rates_of(result: dict[str, Any]) -> tuple[float, float]:
    """Return the bytes per second of fp32 AdaXW and a copy.

    Both are of the largest flat tensor.
    """
    if result.get("benchmark") != "step" or "multiprocessors" not in result["environment"]:
        raise ValueError("model: expected a result of `bench step` that was measured on a GPU, got another result")
    flat = [one for one in result["workloads"] if one["tensors"] == 1 and "gb_per_s" in one["providers"].get(OURS, {})]
    if not flat:
        raise ValueError(f"model: expected a flat tensor stepped by {OURS} in fp32, got none")
    rows = max(flat, key=lambda one: one["numel"])["providers"]
    return 1e9 * rows[OURS]["gb_per_s"], 1e9 * rows["copy"]["gb_per_s"]


def model(result: dict[str, Any]) -> str:
    """Return the model as Markdown.

    Raises ValueError if the result is not of `bench step` on a GPU.
    """
    rates = rates_of(result)
    figures = {
        "Step, ms": lambda count, world, stage, fused: 1e3 * step_seconds(count / world, stage, fused, *rates),
        "Memory of a GPU, GB": lambda *setup: 1e-9 * memory_bytes(*setup),
    }
    titles = ["parameters", "stage", *(f"{world:,} GPUs" for world in WORLD_SIZES)]
    step_rate, copy_rate = (f"{rate / 1e9:,.0f} GB/s" for rate in rates)
    lines = [
        f"By formula, not measured: a step at {step_rate}, a copy at {copy_rate}, no communication.",
        "First number: DeepSpeed's own passes. Second number: fused passes.",
    ]
    for title, figure in figures.items():
        rows = []
        for stage in (1, 2, 3):
            for name, count in PARAMETERS.items():
                pairs = [
                    [_digits(figure(count, world, stage, fused)) for fused in (False, True)] for world in WORLD_SIZES
                ]
                rows.append([name, str(stage), *map(" / ".join, pairs)])
        lines += ["", f"{title}:", "", *markdown_table(titles, rows)]
    return "\n".join(lines)


def _digits(value: float) -> str:
    """Return three significant digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"
