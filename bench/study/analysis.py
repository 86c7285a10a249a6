"""Statistics of the study: the best learning rate of each cell, and paired differences between rules."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from adax_triton.update.coefficients import exp_avg_sq_weight

from .rules import RULES
from .search import Cell, mean_loss

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean and the half width of its confidence interval."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        digits = 1 - math.floor(math.log10(self.half_width)) if 0 < self.half_width < math.inf else 4
        digits = min(max(digits, 0), 5)
        return f"{self.mean:+.{digits}f} ± {self.half_width:.{digits}f}"

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval does not contain 0."""
        return abs(self.mean) > self.half_width


class Result(NamedTuple):
    """What the runs of a cell show.

    Attributes:
        cell: problem, rule, steps and states.
        lr: the rate with the lowest mean loss of all seeds.
        records: its runs, one per seed, in the order of the seeds.
        by_lr: mean loss by learning rate, of the rates that all seeds ran; infinity if a run diverged.
        first_seed: loss of seed 0 by learning rate, of all rates.
    """

    cell: Cell
    lr: float
    records: list[Mapping[str, Any]]
    by_lr: dict[float, float]
    first_seed: dict[float, float]

    @property
    def loss(self) -> float:
        """Mean loss at the best rate."""
        return self.by_lr[self.lr]

    @property
    def area(self) -> float:
        """Mean area under the curve at the best rate."""
        return statistics.fmean(record["area"] for record in self.records)

    def change(self, factor: float) -> float:
        """Return the change of the mean loss at `factor` times the best rate; NaN if it did not run.

        Args:
            factor: 0.5 or 2.
        """
        found = [loss for lr, loss in self.by_lr.items() if math.isclose(lr, factor * self.lr)]
        return found[0] - self.loss if found else math.nan

    @property
    def is_inside(self) -> bool:
        """Whether both neighbours of the best rate ran and are not better."""
        return self.change(0.5) >= 0 and self.change(2.0) >= 0


def results(records: Iterable[Mapping[str, Any]], seeds: int = 5) -> dict[Cell, Result]:
    """Return the results of all cells in which at least one rate has run with all seeds.

    Args:
        records: lines of the study's file.
        seeds: number of seeds.
    """
    cells: dict[Cell, dict[float, dict[int, Mapping[str, Any]]]] = {}
    for record in records:
        cell = Cell(record["problem"], record["rule"], record["steps"], record["states"])
        cells.setdefault(cell, {}).setdefault(record["lr"], {})[record["seed"]] = record
    found = {}
    for cell, rates in cells.items():
        by_lr = {
            lr: mean_loss([runs[seed]["loss"] for seed in range(seeds)])
            for lr, runs in sorted(rates.items())
            if all(seed in runs for seed in range(seeds))
        }
        if by_lr and min(by_lr.values()) < math.inf:
            best = min(by_lr, key=lambda lr: by_lr[lr])
            first = {lr: mean_loss([runs[0]["loss"]]) for lr, runs in sorted(rates.items()) if 0 in runs}
            found[cell] = Result(cell, best, [rates[best][seed] for seed in range(seeds)], by_lr, first)
    return found


def interval(values: Sequence[float]) -> Interval:
    """Return the mean and its two-sided Student interval.

    mean(x) ± t_{n-1} s / sqrt(n)
    """
    from scipy import stats

    width = stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(statistics.fmean(values), float(width))


def difference(result: Result, reference: Result, field: str = "loss") -> Interval:
    """Return the paired difference `result - reference` over the seeds, each at its best rate.

    Args:
        result, reference: of the same problem; seed i of both has the same data and initial weights.
        field: a number of the records, such as "loss" or "area".
    """
    pairs = zip(result.records, reference.records, strict=True)
    return interval([one[field] - other[field] for one, other in pairs])


def memory(rule: str, steps: int) -> float:
    """Return the mean age of the squared gradients in v after the last step, as a share of the horizon.

        a_t = (1 - w_t) (a_{t-1} + 1),    a_T / T

    It is near 0 for a short memory, 1/2 for the plain average, and above 1/2 if old gradients weigh more.

    Args:
        rule: name in `RULES`.
        steps: T.
    """
    age, found = 0.0, RULES[rule]
    for step in range(1, steps + 1):
        weight = exp_avg_sq_weight(found.second_moment, found.beta2(step, steps), step)
        age = (1.0 - weight) * (age + 1.0)
    return age / steps
