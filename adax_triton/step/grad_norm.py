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


def sum_of_squares(launches: Sequence[Launch], ranks: NormRanks | None = None) -> Tensor | None:
    """Return the sum of squares of all gradients, or None without gradients.

    Sums of sharded parameters are all-reduced over their process groups, so every rank gets the same number.

    Args:
        launches: launches with tables of this step.
        ranks: ranks that take part in the all-reduce, even without gradients. Default: None.

    Returns:
        0-d float64 on the device of the first tensor. It is inf or NaN if a gradient contains inf or NaN.
    """
    parts: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    # Every rank adds this key first, so that the all-reduces match.
    group_parts = () if ranks is None else parts[(ranks.process_group,)]
    for launch in launches:
        parts[launch.process_groups].append(launch.sum_of_squares())
    if ranks is not None and not group_parts:
        parts[(ranks.process_group,)].append(torch.zeros((), dtype=torch.float64, device=ranks.device))
    total = None
    for process_groups, (part, *others) in parts.items():
        for other in others:
            part.add_(other.to(part.device, non_blocking=True))
        for process_group in process_groups:
            torch.distributed.all_reduce(part, group=process_group)
        total = part if total is None else total.add_(part.to(total.device, non_blocking=True))
    return total
