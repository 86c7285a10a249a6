"""The norm of all gradients of a step, across devices and ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .conditions import NormRanks

if TYPE_CHECKING:
    from .launch import Launch


def sum_of_squares(launches: Sequence[Launch], ranks: NormRanks | None = None) -> Tensor | None:
    """Return the sum of the squares of all gradients, or None where there are none at all.

    The gradients are read once. Those of sharded parameters are summed over their process groups, so every rank gets
    the same number.

    Args:
        launches: refreshed.
        ranks: those that wait for this one, whether it has gradients or not.

    Returns:
        0-d float64, on the device of the first tensor; not finite if any gradient is not.
    """
    parts: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    own = () if ranks is None else parts[(ranks.process_group,)]  # before all others, on every rank
    for launch in launches:
        parts[launch.process_groups].append(launch.sum_of_squares())
    if ranks is not None and not own:
        parts[(ranks.process_group,)].append(torch.zeros((), dtype=torch.float64, device=ranks.device))
    return sum_over_ranks(parts)


def sum_over_ranks(parts: Mapping[tuple[Any, ...], Sequence[Tensor]]) -> Tensor | None:
    """Return the sum of 0-d tensors on any devices, each summed over the process groups that it is listed under too.

    It is written into the first of them, and others may be overwritten.
    """
    total = None
    for process_groups, (part, *others) in parts.items():
        for other in others:
            part.add_(other.to(part.device, non_blocking=True))
        for process_group in process_groups:
            torch.distributed.all_reduce(part, group=process_group)
        total = part if total is None else total.add_(part.to(total.device, non_blocking=True))
    return total
