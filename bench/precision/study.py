"""Measure the error of every low-precision state against the same rule in float64, over simulated gradients.

    python -m adax_triton.bench.precision.study --out bench/results/precision-30k.json

steps all modes of AdaX on the same gradients, and prints the errors of the update u = m / (sqrt(v) + eps) and of the
moments (`error_stats.py`). Two formats that round to nearest are included for comparison: bfloat16, and the 8-bit root
of v of FlashOptim (arXiv:2602.23349, algorithm 3). The latter keeps m in float32, and a float32 scale per group where
FlashOptim has float16. The exit code is 1 if one of our modes misses a goal.
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
from .error_stats import ErrorStats

SEED = 0
BETAS = (0.9, 1e-4)
KINDS = ("stationary", "decaying", "vanishing", "heavy-tailed", "multi-scale", "sparse", "tiny")
ROW_CHANCE = 1 / 20
DECADES = 4
# Limits: of the relative error of the update, by mode, and of every bias.
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
    """Round sqrt(v) to 255ths of the largest of its group of 32, in place; leave m."""
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
    """Return a function of the step t that draws a gradient g, (numel,) float32, from normal noise z.

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


def study(kind: str, steps: int) -> dict[str, dict[str, Any]]:
    """Step every mode on the same gradients; return the figures of `ErrorStats` by mode."""
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
    """Run the study; return 1 if one of our modes misses a goal."""
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
        rows = result["kinds"][kind] = study(kind, arguments.steps)
        for name in MAX_ERROR:
            rows[name]["goals"] = goals(name, rows[name])
    publish(result, table, arguments.out)
    met = [all(rows[name]["goals"].values()) for rows in result["kinds"].values() for name in MAX_ERROR]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
