"""Step counts of parameters: Python ints, or tensors that a kernel increments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def checked_count(step: Any, name: str) -> int:
    """Check a step count and return it as an int.

    Reading a GPU tensor synchronizes.

    Args:
        step: a non-negative int or integer-valued float, or a one-element tensor of either, as in torch's optimizers.
        name: name of the value in error messages.

    Raises:
        TypeError: any other value.
    """
    count = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    is_integer = isinstance(count, (int, float)) and not isinstance(count, bool) and float(count).is_integer()
    if not is_integer or count < 0:
        raise TypeError(f"{name} is {step!r}; expected a count of steps: a non-negative whole number")
    return int(count)


def can_increment_on_device(step: Any, param: Tensor) -> bool:
    """Return whether a kernel can increment this count without synchronizing.

    The count may need a cast first.
    """
    if not isinstance(step, Tensor) or step.numel() != 1:
        return False
    return step.device.type == "cuda" or (step.device == param.device and step.ndim == 0 and step.dtype == torch.int64)


def check_count_without_sync(step: Any, param: Tensor) -> None:
    """Check a parameter's step count, unless that would synchronize with a GPU.

    Raises:
        TypeError: not a non-negative whole number.
    """
    if not can_increment_on_device(step, param):
        checked_count(step, "state['step']")


def normalized_count(step: Any, param: Tensor, uses_kernel: bool) -> int | Tensor:
    """Return a checked count as an int or a device tensor.

    The tensor is 0-d int64 on the parameter's device. If a kernel updates the parameter, a count on a GPU stays there;
    otherwise it becomes an int. Other forms are accepted, such as the float32 tensor of torch's optimizers.

    Args:
        step: the count.
        param: its parameter.
        uses_kernel: whether a Triton kernel updates the parameter and can increment its count.
    """
    if uses_kernel and can_increment_on_device(step, param):
        return step.reshape(()).to(device=param.device, dtype=torch.int64)
    return checked_count(step, "state['step']")


def counts_as_ints(states: Mapping[Any, Any], keys: Sequence[Any]) -> dict[Any, Any]:
    """Return a copy of states with int counts; synchronizes once per device.

    Args:
        states: states of an optimizer.
        keys: keys of per-parameter states. Other entries are kept as they are.
    """
    by_device: dict[torch.device, list[Any]] = defaultdict(list)
    for key in keys:
        step = states[key].get("step") if isinstance(states.get(key), Mapping) else None
        if isinstance(step, Tensor) and step.numel() == 1:
            by_device[step.device].append(key)
    converted = dict(states)
    for on_device in by_device.values():
        counts = torch.stack([states[key]["step"].reshape(()).to(torch.int64) for key in on_device]).tolist()
        converted |= {key: {**states[key], "step": count} for key, count in zip(on_device, counts, strict=True)}
    return converted
