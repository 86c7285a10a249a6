"""Measure the error of every low-precision state against float64.

    python -m adax_triton.bench.precision.update_error --out bench/results/precision-30k.json

steps all modes of AdaX on the same simulated gradients, and prints the errors of the update u = m / (sqrt(v) + eps) and
of the moments against the same rule in float64 (marked *). Two formats that round to nearest are included for
comparison: bfloat16, and the 8-bit root of v of FlashOptim (arXiv:2602.23349, algorithm 3). The latter keeps m in
float32 and uses a float32 scale per group; FlashOptim uses a float16 scale. The exit code is 1 if one of our modes
misses a goal.

update_error            sqrt(sum (u - u*)^2 / sum u*^2) over elements and steps; long runs exclude the first `SKIPPED`
update_bias             sum u u* / sum u*^2 - 1, over the same
largest_update_ratio    maximum over elements of max |u| / max |u*|
m_error, m_error_end    relative L2 error of m, over the sampled steps and at the last
v_bias, v_bias_median, v_bias_mean, v_bias_end
                        v / v* - 1 over elements and sampled steps: exp of the mean log, median, mean; and exp of the
                        mean log at the last step. Elements without a gradient so far, or with v = 0, are excluded
zero_codes              largest number of v that are 0 at a sampled step although the element had a gradient
unseen_largest_update   largest |u| of an element that had no gradient so far
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from adax_triton.bench.harness.command import count, markdown_table, publish
from adax_triton.bench.harness.environment import describe
from torch import Generator, Tensor

from adax_triton.update.quantization import GROUP

from .comparison import EPS, NUMEL, Comparison, Mode

SEED = 0
SKIPPED = 100  # steps at the start of a long run
SAMPLES = 300  # of the moments, at most about twice as many
BETAS = (0.9, 1e-4)
KINDS = ("stationary", "decaying", "vanishing", "heavy-tailed", "multi-scale", "sparse", "tiny")
ROW_CHANCE = 1 / 20
DECADES = 4
# Maximum relative error of the update by mode, and maximum of every bias.
MAX_ERROR = {"bfloat16": 0.03, "8bit_v16": 0.03, "8bit": 0.13}
MAX_BIAS = 0.01
COLUMNS = {
    "update_error": "update error %",
    "update_bias": "update bias %",
    "v_bias": "v bias %, mean log",
    "v_bias_median": "median",
    "v_bias_mean": "mean",
    "v_bias_end": "mean log, at the end",
    "m_error": "m error %",
    "m_error_end": "at the end",
}


def to_bfloat16(*moments: Tensor) -> None:
    """Round float32 tensors to the nearest bfloat16, in place."""
    for tensor in moments:
        tensor.copy_(tensor.to(torch.bfloat16))


def to_8bit_roots(exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    """Round sqrt(v) in place to multiples of max / 255 per group.

    Groups have 32 elements. m does not change.
    """
    roots = exp_avg_sq.sqrt().view(-1, GROUP)
    scale = roots.amax(dim=1, keepdim=True)
    codes = (roots / torch.where(scale == 0, 1.0, scale) * 255.0).round()
    exp_avg_sq.copy_((codes / 255.0 * scale).square().view(-1))


MODES = {
    **{states: Mode(states) for states in ("float32", "bfloat16", "8bit_v16", "8bit")},
    "bfloat16, v to nearest": Mode(rounding=to_bfloat16),
    "8-bit root of v, to nearest": Mode(rounding=to_8bit_roots),
}


def gradients(kind: str, numel: int, steps: int, generator: Generator) -> Callable[[int], Tensor]:
    """Return a function that draws the gradient of a step.

    It draws g, (numel,) float32, at step t from normal noise z:

    stationary      g = z
    decaying        g = s z with s = 1 in the first third T/3 of the steps, then sqrt(T/3 / t) / 3.3
    vanishing       g = z / (1 + t / (T / 100)), as on the way to a minimum: v falls all the time
    heavy-tailed    g = z / sqrt(chi2_3 / 3), Student's t with 3 degrees of freedom
    multi-scale     g = s z with s over `DECADES` decades in every group of 32, in random order
    sparse          an embedding: each row of 32 has g = z with probability `ROW_CHANCE`, else 0
    tiny            g = 1e-8 z
    """
    third, rows, order = max(1, steps // 3), numel // GROUP, torch.zeros(numel)
    if kind == "multi-scale":
        order = torch.rand(rows, GROUP, generator=generator).argsort(dim=1).view(-1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def heavy_tailed(step: int) -> Tensor:
        first, *others = noise(4, numel)
        return first / torch.stack(others).square().mean(dim=0).sqrt()

    def sparse(step: int) -> Tensor:
        hit = torch.rand(rows, 1, generator=generator) < ROW_CHANCE
        return (noise(rows, GROUP) * hit).view(-1)

    return {
        "stationary": lambda step: noise(numel),
        "decaying": lambda step: noise(numel) * (1.0 if step <= third else math.sqrt(third / step) / 3.3),
        "vanishing": lambda step: noise(numel) / (1.0 + step / max(1, steps // 100)),
        "heavy-tailed": heavy_tailed,
        "multi-scale": lambda step: noise(numel) * 10.0 ** (-DECADES * order / (GROUP - 1)),
        "sparse": sparse,
        "tiny": lambda step: noise(numel) * 1e-8,
    }[kind]


class ErrorStats:
    """Sums of errors over the steps, for several modes.

    Runs of at most 2 * `SKIPPED` steps exclude none.
    """

    def __init__(self, modes: int, numel: int, steps: int) -> None:
        self._skipped = SKIPPED if steps > 2 * SKIPPED else 0
        self._every, self._steps = max(1, steps // SAMPLES), steps
        self._seen = torch.zeros(numel, dtype=torch.bool)
        self._sums, self._m_sums = torch.zeros(2, 3, modes, dtype=torch.float64)
        self._largest, self._unseen = torch.zeros(modes + 1, numel), torch.zeros(modes)
        self._ratios: list[list[Tensor]] = [[] for _ in range(modes)]
        self._zeros = torch.zeros(modes, dtype=torch.int64)

    def add_updates(self, step: int, grad: Tensor, updates: Tensor, exact: Tensor) -> None:
        """Add a step's updates and the exact ones.

        `updates` are (modes, n) float32, `exact` are (n,) float64.
        """
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
        """Return whether to sample this step's moments; true for the last."""
        return step > self._skipped and (self._steps - step) % self._every == 0

    def add_moments(self, moments: list[tuple[Tensor, Tensor]], exact: list[Tensor]) -> None:
        """Add every mode's m and v, and the exact ones.

        All modes' moments are decoded to float32.
        """
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


def compare(kind: str, steps: int) -> dict[str, dict[str, Any]]:
    """Step all modes on the same gradients; return `ErrorStats` figures by mode."""
    gradient = gradients(kind, NUMEL, steps, Generator().manual_seed(SEED))
    comparison, stats = Comparison(MODES, (NUMEL,), BETAS, SEED), ErrorStats(len(MODES), NUMEL, steps)
    for step in range(1, steps + 1):
        comparison.weights.zero_()
        comparison.exact.zero_()
        grad = gradient(step)
        comparison.step([grad] * (len(MODES) + 1), lr=1.0)
        stats.add_updates(step, grad, -comparison.weights, -comparison.exact)
        if stats.is_sampled(step):
            stats.add_moments(comparison.moments(), comparison.exact_moments)
    return dict(zip(MODES, stats.figures(), strict=True))


def goals(mode: str, figures: dict[str, Any]) -> dict[str, bool]:
    """Return which goals one of our modes meets."""
    return {
        "update_error": figures["update_error"] < MAX_ERROR[mode],
        "update_bias": abs(figures["update_bias"]) < MAX_BIAS,
        "v_bias": abs(figures["v_bias"]) < MAX_BIAS,
        "zero_codes": figures["zero_codes"] == 0,
        "unseen": figures["unseen_largest_update"] == 0,
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown, with PASS or the goals that failed."""
    titles = ["gradients", "mode", *COLUMNS.values(), "v codes of 0", "largest update ratio", "goals"]
    lines = []
    for kind, rows in result["kinds"].items():
        for name, figures in rows.items():
            cells = [f"{100 * figures[key]:.4g}" for key in COLUMNS]
            failed = [goal for goal, met in figures.get("goals", {}).items() if not met]
            verdict = "" if "goals" not in figures else f"FAIL: {', '.join(failed)}" if failed else "PASS"
            tail = [str(figures["zero_codes"]), f"{figures['largest_update_ratio']:.3g}", verdict]
            lines.append([kind, name, *cells, *tail])
    return "\n".join(markdown_table(titles, lines))


def main(argv: list[str] | None = None) -> int:
    """Measure all kinds; return 1 if our modes miss any goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=count, default=30_000, help="default: %(default)s")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS, help="of gradients; default: all")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "environment": describe(torch.device("cpu")),
        **{"steps": arguments.steps, "numel": NUMEL, "seed": SEED, "betas": BETAS, "eps": EPS},
        **{"most_error": MAX_ERROR, "most_bias": MAX_BIAS, "kinds": {}},
    }
    for kind in arguments.kinds:
        print(f"{kind}: {arguments.steps} steps", file=sys.stderr, flush=True)
        rows = result["kinds"][kind] = compare(kind, arguments.steps)
        for name in MAX_ERROR:
            rows[name]["goals"] = goals(name, rows[name])
    publish(result, table, arguments.out)
    met = [all(rows[name]["goals"].values()) for rows in result["kinds"].values() for name in MAX_ERROR]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
