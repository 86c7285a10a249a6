"""Compute the memory per parameter of a DeepSpeed configuration with AdaX.

Memory is on the GPU, in host memory or on NVMe. The sum includes the tensors that DeepSpeed keeps between steps. It
excludes activations, communication buckets, the layers that ZeRO 3 gathers, NVMe buffers, and the temporary memory
of a step (docs/deepspeed-passes.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from adax_triton.bench.harness.command import markdown_table

from adax_triton.state.precision import Precision, bytes_by_state

PLACES = ("GPU", "host", "NVMe")


class Part(NamedTuple):
    """Kind of stored tensor, with its place and bytes per parameter.

    `place` is one of PLACES. `bytes` are per parameter of the model, on each GPU.
    """

    name: str
    place: str
    bytes: float


def parts_of(config: Mapping[str, Any], gpus: int) -> list[Part]:
    """Return the stored tensors of a configuration, per GPU.

    Args:
        config: a DeepSpeed configuration with an "optimizer" of type AdaX or AdaXW on ZeRO 1, 2 or 3.
        gpus: number of GPUs that ZeRO partitions over.

    Raises:
        ValueError: `gpus` < 1, or an unsupported setting.
    """
    zero = config.get("zero_optimization", {})
    stage, device = zero.get("stage", 0), zero.get("offload_optimizer", {}).get("device", "none")
    _check(config, stage, gpus)
    half = any(config.get(name, {}).get("enabled") is True for name in ("bf16", "fp16"))
    width, share = (2 if half else 4), 1 / gpus
    place = {"none": "GPU", "cpu": "host", "nvme": "NVMe" if stage == 3 else "host"}[device]
    parts = [Part("weights", "GPU", width * (share if stage == 3 else 1))]
    if device == "none":
        parts.append(Part("gradients", "GPU", width * (1 if stage == 1 else share)))
    else:
        parts.append(Part("float32 gradients", place, 4 * share))
        parts.append(
            Part("gradients in the model's dtype" if stage == 3 else "weights to copy back", "host", width * share)
        )
        if stage < 3 and config.get("gradient_accumulation_steps", 1) > 1:
            parts.append(Part("accumulated gradients", "host", width * share))
    parts.append(Part("float32 weights", place, 4 * share))
    states = config["optimizer"].get("params", {}).get("states", "float32")
    sizes = bytes_by_state(torch.float32, Precision(states))
    return [*parts, *(Part(name, place, size * share) for name, size in sizes.items())]


def _check(config: Mapping[str, Any], stage: Any, gpus: int) -> None:
    optimizer = str(config.get("optimizer", {}).get("type"))
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    if optimizer.lower() not in ("adax", "adaxw"):
        raise ValueError(f"optimizer.type={optimizer!r}: expected AdaX or AdaXW")
    if stage not in (1, 2, 3):
        raise ValueError(f"zero_optimization.stage={stage!r}: expected 1, 2 or 3")
    for name in ("bf16", "fp16"):
        if config.get(name, {}).get("enabled") == "auto":
            raise ValueError(f'{name}.enabled="auto": set it to true or false')
    unsupported = {
        "zero_optimization.offload_param": config.get("zero_optimization", {}).get("offload_param"),
        "data_types": config.get("data_types"),
        "bf16.bf16_master_weights_and_grads": config.get("bf16", {}).get("bf16_master_weights_and_grads"),
    }
    for name, value in unsupported.items():
        if value:
            raise ValueError(f"{name}={value!r} is not supported by this estimate; remove it")


def totals(config: Mapping[str, Any], gpus: int) -> dict[str, float]:
    """Return the bytes per parameter in each of PLACES, per GPU.

    See `parts_of` for the arguments.
    """
    parts = parts_of(config, gpus)
    return {place: sum(part.bytes for part in parts if part.place == place) for place in PLACES}


def markdown(config: Mapping[str, Any], gpus: int, parameters: float = 7e9) -> str:
    """Return a table with the bytes per parameter; see `parts_of`.

    Its last column is the gigabytes of a model of `parameters`.
    """
    sums = [Part("all", place, size) for place, size in totals(config, gpus).items() if size]
    rows = [
        [part.name, part.place, f"{part.bytes:.3g}", f"{part.bytes * parameters / 1e9:.1f}"]
        for part in [*parts_of(config, gpus), *sums]
    ]
    titles = ["per GPU", "place", "bytes per parameter", f"{parameters / 1e9:g}B, GB"]
    return "\n".join(markdown_table(titles, rows, right=(2, 3)))
