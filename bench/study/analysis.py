"""Statistics of the study: best learning rates, paired differences, memory."""

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
    """Best learning rate and runs of a cell.

    Attributes:
        cell: problem, rule, steps and states.
        lr: the rate with the lowest mean loss.
        records: the run of each seed, at the rate that is best for the other seeds. A rate that was chosen for the very
            seeds that are shown would look better than it is.
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
        """Mean loss of `records`."""
        return statistics.fmean(record["loss"] for record in self.records)

    def change(self, factor: float) -> float:
        """Return how the mean loss changes at another rate.

        Args:
            factor: of the best rate, 0.5 or 2.

        Returns:
            The change, or NaN if not all seeds ran at that rate.
        """
        found = [loss for lr, loss in self.by_lr.items() if math.isclose(lr, factor * self.lr)]
        return found[0] - self.by_lr[self.lr] if found else math.nan

    @property
    def is_inside(self) -> bool:
        """Whether both neighbours of the best rate ran and are not better."""
        return self.change(0.5) >= 0 and self.change(2.0) >= 0


Results = Mapping[Cell, Result]


def results(records: Iterable[Mapping[str, Any]], seeds: int = 5) -> dict[Cell, Result]:
    """Return the results of all cells in which all seeds ran.

    A cell in which all rates diverged has no result.

    Args:
        records: of the runs in a file.
        seeds: number of seeds, at least 2.
    """
    cells: dict[Cell, dict[float, dict[int, Mapping[str, Any]]]] = {}
    for record in records:
        cell = Cell(record["problem"], record["rule"], record["steps"], record["states"])
        cells.setdefault(cell, {}).setdefault(record["lr"], {})[record["seed"]] = record
    found = {}
    for cell, rates in cells.items():
        whole = {lr: runs for lr, runs in sorted(rates.items()) if all(seed in runs for seed in range(seeds))}
        by_lr = {lr: mean_loss([runs[seed]["loss"] for seed in range(seeds)]) for lr, runs in whole.items()}
        stable = {lr: runs for lr, runs in whole.items() if by_lr[lr] < math.inf}
        if stable:
            first = {lr: mean_loss([runs[0]["loss"]]) for lr, runs in sorted(rates.items()) if 0 in runs}
            chosen = [_chosen_by_others(stable, seed, seeds) for seed in range(seeds)]
            found[cell] = Result(cell, min(stable, key=lambda lr: by_lr[lr]), chosen, by_lr, first)
    return found


def _chosen_by_others(
    rates: Mapping[float, Mapping[int, Mapping[str, Any]]], seed: int, seeds: int
) -> Mapping[str, Any]:
    """Return a seed's run at the rate that the other seeds choose."""
    others = [other for other in range(seeds) if other != seed]
    best = min(rates, key=lambda lr: mean_loss([rates[lr][other]["loss"] for other in others]))
    return rates[best][seed]


def interval(values: Sequence[float]) -> Interval:
    """Return the mean and its two-sided Student interval.

    mean(x) ± t_{n-1} s / sqrt(n)
    """
    from scipy import stats

    width = stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(statistics.fmean(values), float(width))


def horizons(found: Results, problem: str) -> list[int]:
    """Return the horizons of a problem that have results, in order."""
    return sorted({cell.steps for cell in found if cell.problem == problem})


def difference(result: Result, reference: Result, field: str = "loss") -> Interval:
    """Return the paired difference `result - reference` over the seeds.

    Args:
        result, reference: of the same problem; seed i of both has the same data and initial weights.
        field: a number of the records, such as "loss" or "area".
    """
    pairs = zip(result.records, reference.records, strict=True)
    return interval([one[field] - other[field] for one, other in pairs])


def memory(rule: str, steps: int) -> float:
    """Return the mean age of the squared gradients in v, in horizons.

        a_t = (1 - w_t) (a_{t-1} + 1),    a_T / T

    It is taken after the last step: near 0 for a short memory, 1/2 for the plain average, above 1/2 if old gradients
    weigh more.

    Args:
        rule: name in `RULES`.
        steps: T.
    """
    age, found = 0.0, RULES[rule]
    for step in range(1, steps + 1):
        weight = exp_avg_sq_weight(found.second_moment, found.beta2(step, steps), step)
        age = (1.0 - weight) * (age + 1.0)
    return age / steps
