"""Memory per parameter that training with AdaX takes under a DeepSpeed configuration: GPU, host memory and NVMe.

What DeepSpeed keeps between steps, by the formats alone. On top come activations, communication buckets, the layers
that ZeRO 3 gathers, with NVMe its buffers, and within a step what `docs/deepspeed-passes.md` says.

    adax-triton bench memory --deepspeed ds_config.json --gpus 8
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from adax_triton.state.precision import Precision, bytes_by_state

PLACES = ("GPU", "host", "NVMe")


class Part(NamedTuple):
    """Something that is kept: its name, one of PLACES, and its bytes per parameter of the model on each GPU."""

    name: str
    place: str
    bytes: float


def parts_of(config: Mapping[str, Any], gpus: int) -> list[Part]:
    """Return what is kept under a configuration, per GPU.

    Args:
        config: the DeepSpeed configuration, with an "optimizer" of type AdaX or AdaXW, on ZeRO 1, 2 or 3.
        gpus: the number of GPUs, over which ZeRO partitions.

    Raises:
        ValueError: the number of GPUs, or a setting to which these sums do not apply.
    """
    zero = config.get("zero_optimization", {})
    stage, device = zero.get("stage", 0), zero.get("offload_optimizer", {}).get("device", "none")
    _refuse_others(config, gpus)
    params = config["optimizer"].get("params", {})
    half = any(config.get(name, {}).get("enabled") is True for name in ("bf16", "fp16"))
    width, share = (2 if half else 4), 1 / gpus
    place = {"none": "GPU", "cpu": "host", "nvme": "NVMe" if stage == 3 else "host"}[device]
    parts = [Part("weights", "GPU", width * (share if stage == 3 else 1))]
    if device == "none":
        parts.append(Part("gradients", "GPU", width * (1 if stage == 1 else share)))
    else:
        parts.append(Part("float32 gradients", place, 4 * share))
        parts.append(Part("gradients as they come" if stage == 3 else "weights to copy back", "host", width * share))
        if stage < 3 and config.get("gradient_accumulation_steps", 1) > 1:
            parts.append(Part("accumulated gradients", "host", width * share))
    parts.append(Part("float32 weights", place, 4 * share))
    states = bytes_by_state(torch.float32, Precision(params.get("states", "float32")))
    return [*parts, *(Part(name, place, size * share) for name, size in states.items())]


def _refuse_others(config: Mapping[str, Any], gpus: int) -> None:
    zero, optimizer = config.get("zero_optimization", {}), str(config.get("optimizer", {}).get("type"))
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    if optimizer.lower() not in ("adax", "adaxw"):
        raise ValueError(f"optimizer.type={optimizer!r}: these are the sums of AdaX and AdaXW")
    if zero.get("stage", 0) not in (1, 2, 3):
        raise ValueError(f"zero_optimization.stage={zero.get('stage', 0)!r}: these are the sums of ZeRO 1, 2 and 3")
    others = {
        "zero_optimization.offload_param": zero.get("offload_param"),
        "data_types": config.get("data_types"),
        "bf16.bf16_master_weights_and_grads": config.get("bf16", {}).get("bf16_master_weights_and_grads"),
    }
    for name in ("bf16", "fp16"):
        if config.get(name, {}).get("enabled") == "auto":
            raise ValueError(f'{name}.enabled="auto" does not say what the weights are; set it to true or false')
    for name, value in others.items():
        if value:
            raise ValueError(f"{name}={value!r} keeps other formats than these sums have; remove it")


def totals(config: Mapping[str, Any], gpus: int) -> dict[str, float]:
    """Return the bytes per parameter of the model in each of PLACES, per GPU; arguments as those of `parts_of`."""
    sums = dict.fromkeys(PLACES, 0.0)
    for part in parts_of(config, gpus):
        sums[part.place] += part.bytes
    return sums


def markdown(config: Mapping[str, Any], gpus: int, parameters: float = 7e9) -> str:
    """Return a table of what is kept, with the gigabytes of a model of `parameters`; others as those of `parts_of`."""
    rows = [["per GPU", "place", "bytes per parameter", f"{parameters / 1e9:g}B, GB"], ["---", "---", "---:", "---:"]]
    sums = [Part("all", place, size) for place, size in totals(config, gpus).items() if size]
    for part in [*parts_of(config, gpus), *sums]:
        rows.append([part.name, part.place, f"{part.bytes:.3g}", f"{part.bytes * parameters / 1e9:.1f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
