"""The norm of all gradients of a step, across devices and ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .gradient_handling import NormRanks

if TYPE_CHECKING:
    from .launch import Launch


def gradient_squares(
    launches: Sequence[Launch], ranks: NormRanks | None = None, out: Tensor | None = None
) -> Tensor | None:
    """Return numbers that add up to the sum of squares of all gradients, or None without gradients.

    Sums of sharded parameters are all-reduced over their process groups, so every rank gets the same numbers.

    Args:
        launches: launches with tables of this step.
        ranks: ranks that take part in the all-reduce, even without gradients. Default: None.
        out: an earlier result for the same launches, to overwrite. Default: None, allocate memory if needed.

    Returns:
        (k,) float64 on the device of the first tensor. One of them is inf or NaN if a gradient contains inf or NaN.
    """
    parts: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    # Every rank adds this key first, so that the all-reduces match.
    group_parts = () if ranks is None else parts[(ranks.process_group,)]
    for launch in launches:
        parts[launch.process_groups].append(launch.squares())
    if ranks is not None and not group_parts:
        parts[(ranks.process_group,)].append(torch.zeros(1, dtype=torch.float64, device=ranks.device))
    for process_groups, own in parts.items():
        if process_groups:
            total = _joined(own).sum(dim=0, keepdim=True)
            for process_group in process_groups:
                torch.distributed.all_reduce(total, group=process_group)
            parts[process_groups] = [total]
    return _joined([part for own in parts.values() for part in own], out) if parts else None


def _joined(parts: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    device = parts[0].device
    waits = device.type == "cpu"  # the host reads the copy
    return torch.cat([part.to(device, non_blocking=not waits) for part in parts], out=out)
