"""Errors of every mode of the precision study against float64 (marked *), accumulated over the steps.

update_error            sqrt(sum (u - u*)^2 / sum u*^2) over elements and steps; long runs exclude the first `SKIPPED`
update_bias             sum u u* / sum u*^2 - 1, over the same
largest_update_ratio    maximum over elements of max |u| / max |u*|
m_error, m_error_end    relative L2 error of m, over the sampled steps and at the last
v_bias, v_bias_median, v_bias_mean, v_bias_end
                        v / v* - 1 over elements and sampled steps: exp of the mean log, median, mean; and exp of the
                        mean log at the last step. Elements without a gradient so far, or with v = 0, are excluded
zero_codes              most v that are 0 at a sampled step although the element had a gradient
unseen_largest_update   largest |u| of an element that had no gradient so far
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

SKIPPED = 100
SAMPLES = 300


class ErrorStats:
    """Sums over the steps, for several modes. With `steps` up to twice `SKIPPED`, none is excluded."""

    def __init__(self, modes: int, numel: int, steps: int) -> None:
        self._skipped = SKIPPED if steps > 2 * SKIPPED else 0
        self._every, self._steps = max(1, steps // SAMPLES), steps
        self._seen = torch.zeros(numel, dtype=torch.bool)
        self._sums, self._m_sums = torch.zeros(2, 3, modes, dtype=torch.float64)
        self._largest, self._unseen = torch.zeros(modes + 1, numel), torch.zeros(modes)
        self._ratios: list[list[Tensor]] = [[] for _ in range(modes)]
        self._zeros = torch.zeros(modes, dtype=torch.int64)

    def add_updates(self, step: int, grad: Tensor, updates: Tensor, exact: Tensor) -> None:
        """Add a step's updates, (modes, n) float32, and the exact ones, (n,) float64."""
        if step == self._skipped + 1:
            self._sums.zero_()
            self._largest.zero_()
        self._seen |= grad != 0
        sizes = torch.cat([updates, exact.float().unsqueeze(0)]).abs()
        self._unseen = torch.maximum(self._unseen, torch.where(self._seen, 0.0, sizes[:-1]).amax(dim=1))
        self._largest = torch.maximum(self._largest, sizes)
        wide, norm = updates.double(), exact.square().sum().expand(len(updates))
        self._sums += torch.stack([(wide - exact).square().sum(dim=1), wide @ exact, norm])

    def is_sampled(self, step: int) -> bool:
        """Return whether to sample the moments of this step; the last one is."""
        return step > self._skipped and (self._steps - step) % self._every == 0

    def add_moments(self, moments: list[tuple[Tensor, Tensor]], exact: list[Tensor]) -> None:
        """Add every mode's m and v, decoded to float32, and the exact ones."""
        first, second = (torch.stack(tensors) for tensors in zip(*moments, strict=True))
        square, norm = (first.double() - exact[0]).square().sum(dim=1), exact[0].square().sum()
        self._m_sums += torch.stack([square, norm.expand(len(moments)), torch.zeros(len(moments))])
        self._m_sums[2] = (square / norm).sqrt()
        self._zeros = torch.maximum(self._zeros, (self._seen & (second == 0)).sum(dim=1))
        for ratios, v in zip(self._ratios, second.double(), strict=True):
            ratios.append((v / exact[1])[self._seen & (v > 0)])

    def figures(self) -> list[dict[str, Any]]:
        """Return the figures of each mode."""
        square, product, norm = self._sums
        ratio = (self._largest[:-1] / self._largest[-1])[:, self._largest[-1] > 0].amax(dim=1)
        columns = {
            "update_error": (square / norm).sqrt(),
            "update_bias": product / norm - 1,
            "largest_update_ratio": ratio,
            "m_error": (self._m_sums[0] / self._m_sums[1]).sqrt(),
            "m_error_end": self._m_sums[2],
            "zero_codes": self._zeros,
            "unseen_largest_update": self._unseen,
        }
        rows = [
            dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)
        ]
        for row, samples in zip(rows, self._ratios, strict=True):
            ratios = torch.cat(samples)
            row["v_bias"] = math.expm1(ratios.log().mean().item())
            row["v_bias_median"] = ratios.median().item() - 1
            row["v_bias_mean"] = ratios.mean().item() - 1
            row["v_bias_end"] = math.expm1(samples[-1].log().mean().item())
        return rows
