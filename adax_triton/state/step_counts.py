"""Counts of the steps that parameters have taken: ints, or tensors on the device where a kernel advances them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def checked_count(step: Any, name: str) -> int:
    """Return a count of steps as an int; one on a GPU makes the host wait.

    Args:
        step: an int, a whole float, or a tensor of one element with such a value, as torch's optimizers keep it.
        name: of the value, for messages.

    Raises:
        TypeError: it is no count.
    """
    count = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    whole = isinstance(count, (int, float)) and not isinstance(count, bool) and float(count).is_integer()
    if not whole or count < 0:
        raise TypeError(f"{name} is {step!r}; expected a count of steps")
    return int(count)


def is_on_device(step: Any, param: Tensor) -> bool:
    """Whether a count is a tensor that a kernel can advance, or one on a GPU that can become such without the host."""
    if not isinstance(step, Tensor) or step.numel() != 1:
        return False
    return step.device.type == "cuda" or (step.device == param.device and step.ndim == 0 and step.dtype == torch.int64)


def check_count(step: Any, param: Tensor) -> None:
    """Check the count of a parameter, unless the host would have to wait for it.

    Raises:
        TypeError: it is no count of steps.
    """
    if not is_on_device(step, param):
        checked_count(step, "state['step']")


def normalized_count(step: Any, param: Tensor, on_kernel: bool) -> int | Tensor:
    """Return a checked count as an int, or as 0-d int64 on the parameter's device if it is on one already.

    Others may have put it there in another form, such as the float32 tensor of torch's optimizers.

    Args:
        step: the count.
        param: whose steps it counts.
        on_kernel: whether a kernel steps the parameter, and so can advance its count.
    """
    if on_kernel and is_on_device(step, param):
        return step.reshape(()).to(device=param.device, dtype=torch.int64)
    return checked_count(step, "state['step']")


def counts_as_ints(states: Mapping[Any, Any], keys: Sequence[Any]) -> dict[Any, Any]:
    """Return states whose counts are ints; the host waits once per device for those that are tensors.

    Args:
        states: of an optimizer; copied, not changed.
        keys: of those that are a parameter's.
    """
    by_device: dict[torch.device, list[Any]] = defaultdict(list)
    for key in keys:
        step = states[key].get("step") if isinstance(states.get(key), Mapping) else None
        if isinstance(step, Tensor) and step.numel() == 1:
            by_device[step.device].append(key)
    converted = dict(states)
    for some in by_device.values():
        counts = torch.stack([states[key]["step"].reshape(()).to(torch.int64) for key in some]).tolist()
        converted |= {key: {**states[key], "step": count} for key, count in zip(some, counts, strict=True)}
    return converted
