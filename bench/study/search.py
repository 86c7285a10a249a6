"""Search the best learning rate of a rule on a grid."""

from __future__ import annotations

import math
import statistics
from collections.abc import Generator, Mapping
from typing import NamedTuple

from .run import Run

LARGEST_EXPONENT = 9  # the grid is base_lr * 2^-9 ... 2^9


class Cell(NamedTuple):
    """A rule on a problem for a horizon."""

    problem: str
    rule: str
    steps: int
    states: str = "float32"


def mean_loss(losses: list[float | None]) -> float:
    """Return the mean; infinity if a run diverged."""
    finite = [loss for loss in losses if loss is not None]
    return statistics.fmean(finite) if len(finite) == len(losses) else math.inf


def search(
    cell: Cell, base_lr: float, seeds: int, start: int = 0, reach: int = 1
) -> Generator[list[Run], Mapping[Run, float | None], int]:
    """Search the exponent of the best learning rate.

    The generator yields lists of runs and receives their losses. Seed 0 runs at the rates around `start`, then at
    further ones until the lowest loss is inside the grid. All seeds then run at the best rate and at its two
    neighbours, until the lowest mean is between two higher ones.

    Args:
        cell: what to tune.
        base_lr: learning rate of exponent 0.
        seeds: number of seeds.
        start: exponent in the middle of the first rates.
        reach: number of first rates on each side of it; a large one finds the lowest of several minima.

    Returns:
        The exponent of the best mean; it is `LARGEST_EXPONENT` or its negative if the optimum is not inside the grid.
    """
    losses: dict[Run, float | None] = {}

    def run(exponent: int, seed: int) -> Run:
        return Run(*cell, base_lr * 2.0**exponent, seed)

    def mean(exponent: int, count: int) -> float:
        return mean_loss([losses[run(exponent, seed)] for seed in range(count)])

    def around(exponent: int, distance: int) -> set[int]:
        found = range(exponent - distance, exponent + distance + 1)
        return {exponent for exponent in found if abs(exponent) <= LARGEST_EXPONENT}

    best = start
    for count, distance in ((1, reach), (seeds, 1)):
        tried: set[int] = set()
        wanted = around(best, distance)
        while not wanted <= tried:
            tried |= wanted
            losses |= yield [run(exponent, seed) for exponent in sorted(wanted) for seed in range(count)]
            # A tie goes to the smaller rate.
            best = min(sorted(tried), key=lambda exponent: mean(exponent, count))
            wanted = around(best, 1)
    return best
