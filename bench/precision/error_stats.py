"""What `precision_study` adds up over the steps, and the figures that follow.

update_error            sqrt(sum (u - u*)^2 / sum u*^2) over all elements, and all steps after the first `SKIPPED`
update_bias             sum u u* / sum u*^2 - 1, over the same
largest_update_ratio    per element, its largest |u| over its largest |u*|; of these the largest
m_error, m_error_end    relative L2 error of the stored m, over the sampled steps and at the last
v_bias, v_bias_median, v_bias_mean, v_bias_end
                        v / v* - 1 over elements and sampled steps: exp of the mean log, median, mean; and exp of
                        the mean log at the last step. Only where a gradient was seen and v is not 0
zero_codes              the most v that were stored as 0 at a sampled step where a gradient was seen
unseen_largest_update   the largest |u| of an element that has seen no gradient
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SKIPPED = 100
SAMPLES = 300


def _add(
    updates: Tensor, exact: Tensor, grad: Tensor, seen: Tensor, sums: Tensor, largest: Tensor, unseen: Tensor
) -> None:
    seen |= grad != 0
    size = updates.abs()
    unseen.copy_(torch.maximum(unseen, torch.where(seen, 0.0, size).amax(dim=1)))
    wide = updates.double()
    sums += torch.stack(((wide - exact).square().sum(dim=1), (wide * exact).sum(dim=1)))
    largest.copy_(torch.maximum(largest, torch.cat((size, exact.abs().float().unsqueeze(0)))))


class Tally:
    """Sums over the steps, for several modes at once.

    Args:
        modes: how many.
        numel: elements of each.
        steps: how many there will be; with no more than twice `SKIPPED` none are left out.
        compiled: what to compile the sums with.
    """

    def __init__(self, modes: int, numel: int, steps: int, compiled: Callable[[Any], Any]) -> None:
        self._skipped = SKIPPED if steps > 2 * SKIPPED else 0
        self._every = max(1, steps // SAMPLES)
        self._steps = steps
        self._add = compiled(_add)
        self._seen = torch.zeros(numel, dtype=torch.bool)
        self._sums = torch.zeros(2, modes, dtype=torch.float64)
        self._norm = 0.0
        self._largest = torch.zeros(modes + 1, numel)
        self._unseen = torch.zeros(modes)
        self._m_sums = torch.zeros(2, modes, dtype=torch.float64)
        self._m_error = torch.zeros(modes, dtype=torch.float64)
        self._ratios: list[list[Tensor]] = [[] for _ in range(modes)]
        self._zeros = [0] * modes

    def add_updates(self, step: int, grad: Tensor, updates: Tensor, exact: Tensor) -> None:
        """Add the updates of a step, (modes, n) float32, beside the exact ones."""
        if step == self._skipped + 1:
            for start in (self._sums, self._largest):
                start.zero_()
            self._norm = 0.0
        self._add(updates, exact, grad, self._seen, self._sums, self._largest, self._unseen)
        self._norm += torch.dot(exact, exact).item()

    def is_sampled(self, step: int) -> bool:
        """Whether the moments of a step are looked at; the last step's always are."""
        return step > self._skipped and (self._steps - step) % self._every == 0

    def add_moments(self, moments: list[tuple[Tensor, Tensor]], exact: tuple[Tensor, Tensor]) -> None:
        """Add the float32 moments that each mode's stored ones stand for, beside the exact ones."""
        norm = exact[0].square().sum()
        for mode, (first, second) in enumerate(moments):
            square = (first.double() - exact[0]).square().sum()
            self._m_sums[0, mode] += square
            self._m_sums[1, mode] += norm
            self._m_error[mode] = (square / norm).sqrt()
            self._ratios[mode].append((second.double() / exact[1])[self._seen & (second > 0)])

    def count_zeros(self, codes: list[Tensor]) -> None:
        """Count the stored v, of each mode, that are 0 where a gradient was seen."""
        counts = [int((self._seen & (code == 0)).sum()) for code in codes]
        self._zeros = [max(pair) for pair in zip(self._zeros, counts, strict=True)]

    def figures(self) -> list[dict[str, Any]]:
        """Return the figures of each mode."""
        error, bias = (self._sums[0] / self._norm).sqrt(), self._sums[1] / self._norm - 1
        m_error = (self._m_sums[0] / self._m_sums[1]).sqrt()
        moved = self._largest[-1] > 0
        rows = []
        for mode, samples in enumerate(self._ratios):
            ratios = torch.cat(samples)
            rows.append(
                {
                    "update_error": error[mode].item(),
                    "update_bias": bias[mode].item(),
                    "largest_update_ratio": (self._largest[mode] / self._largest[-1])[moved].max().item(),
                    "m_error": m_error[mode].item(),
                    "m_error_end": self._m_error[mode].item(),
                    "v_bias": math.expm1(ratios.log().mean().item()),
                    "v_bias_median": ratios.median().item() - 1,
                    "v_bias_mean": ratios.mean().item() - 1,
                    "v_bias_end": math.expm1(samples[-1].log().mean().item()),
                    "zero_codes": self._zeros[mode],
                    "unseen_largest_update": self._unseen[mode].item(),
                }
            )
        return rows
