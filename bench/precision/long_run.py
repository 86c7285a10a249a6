"""Train a small regression for 100,000 steps, to show the bias of rounding v to nearest.

    python -m adax_triton.bench.precision.long_run --out bench/results/long-run-100k.json

W (64 x 64) is fitted to noisy observations of a linear map, with a new batch of 8 at each step:

    y = x W* + 0.01 z,    x_i ~ N(0, 1 / i^2),    loss = |x W - y|^2 / 2,    risk = E |x (W - W*)|^2 / 64, exactly

The gradients shrink as W approaches W*, and v has to follow. All modes start at 0 and see the same batches. The
learning rate falls linearly to 0. The control keeps float32 states, with v rounded to the nearest bfloat16 after each
step.

If v stops falling, steps become too small. A larger learning rate partly compensates, so `learning_rates` has the risks
of float32 and of the control at several rates. The ratio of v does not depend on the rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from adax_triton.bench.harness.environment import describe
from adax_triton.bench.step.table import markdown_row
from torch import Tensor

from .comparison import Comparison, Mode
from .study import to_bfloat16

SIZE = 64  # of W: 4096 elements, the fewest with low-precision states
BATCH = 8
NOISE = 1e-2
HORIZON = 10.0  # beta2 * steps
CONTROL = "float32, v rounded to nearest bfloat16"
EVALUATIONS = 100
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
AVERAGED = 5  # the last evaluations, whose mean is the final risk


def round_v(exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    """Round v to the nearest bfloat16, in place."""
    to_bfloat16(exp_avg_sq)


MODES = {states: Mode(states) for states in ("float32", "bfloat16", "8bit_v16", "8bit")}
MODES[CONTROL] = Mode(rounding=round_v)


class Regression:
    """The problem: its batches, gradients and risk."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._target = torch.randn(SIZE, SIZE, generator=self._generator)
        self._deviations = torch.arange(1, SIZE + 1).pow(-1.0)

    def gradients(self, weights: Tensor) -> Tensor:
        """Draw a batch; return the gradient of its mean loss at each of `weights`, (..., 64, 64)."""
        x = torch.randn(BATCH, SIZE, generator=self._generator) * self._deviations
        noise = torch.randn(BATCH, SIZE, generator=self._generator) * NOISE
        return x.T @ (x @ (weights - self._target) - noise) / BATCH

    def risks(self, weights: Tensor) -> list[float]:
        """Return the risk of each of `weights`, computed in float64."""
        missing = (weights.double() - self._target.double()) * self._deviations.double().unsqueeze(1)
        return (missing.square().sum(dim=(-2, -1)) / SIZE).tolist()


def train(steps: int, lr: float, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """Train all modes at `lr`, and float32 and the control at `LEARNING_RATES`.

    Returns:
        The evaluations: step, and by mode the risk and the median ratio of v to float32's; and the mean risks by rate.
    """
    rates = {
        (rate, name): MODES[name]._replace(lr=rate / lr) for rate in LEARNING_RATES for name in ("float32", CONTROL)
    }
    modes: dict[Any, Mode] = {**MODES, **rates}
    problem, comparison = Regression(seed), Comparison(modes, (SIZE, SIZE), (0.9, min(1e-1, HORIZON / steps)), seed)
    evaluations, risks = [], []
    for step in range(1, steps + 1):
        weights = torch.cat([comparison.weights, comparison.exact.float().unsqueeze(0)])
        comparison.step(list(problem.gradients(weights)), lr * (1 - (step - 1) / steps))
        if step % max(1, steps // EVALUATIONS) == 0:
            of_modes = problem.risks(torch.cat([comparison.weights.double(), comparison.exact.unsqueeze(0)]))
            risks.append(dict(zip([*modes, "float64"], of_modes, strict=True)))
            v = dict(
                zip(
                    [*modes, "float64"],
                    [*(v for _, v in comparison.moments()), comparison.exact_moments[1]],
                    strict=True,
                )
            )
            found = {
                name: {"risk": risks[-1][name], "v_ratio": (v[name] / v["float32"].double()).median().item()}
                for name in (*MODES, "float64")
            }
            evaluations.append({"step": step, "modes": found})
            print(f"step {step} of {steps}", file=sys.stderr, flush=True)
    means = {name: statistics.fmean(risk[name] for risk in risks[-AVERAGED:]) for name in rates}
    by_rate = [{"lr": rate, **{name: means[rate, name] for name in ("float32", CONTROL)}} for rate in LEARNING_RATES]
    return evaluations, by_rate


def run(steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Train and return the result, JSON-friendly."""
    evaluations, rates = train(steps, lr, seed)
    last = [evaluation["modes"] for evaluation in evaluations[-AVERAGED:]]
    final = {
        name: {
            "risk": statistics.fmean(modes[name]["risk"] for modes in last),
            **{"risk_end": last[-1][name]["risk"], "v_ratio": last[-1][name]["v_ratio"]},
        }
        for name in last[-1]
    }
    return {
        "environment": describe(torch.device("cpu")),
        **{"steps": steps, "lr": lr, "seed": seed, "horizon": HORIZON, "size": SIZE, "batch": BATCH, "noise": NOISE},
        **{"final": final, "learning_rates": rates, "evaluations": evaluations},
    }


def table(result: dict[str, Any]) -> str:
    """Return the final figures as Markdown."""
    reference = result["final"]["float32"]
    titles = ["states", f"risk, mean of {AVERAGED} evaluations", "over float32's", "at the end", "median v / float32's"]
    lines = [f"{result['steps']} steps, lr {result['lr']}, commit {result['environment']['commit']}", ""]
    lines += [markdown_row(titles), "|---" * len(titles) + "|"]
    for name, row in result["final"].items():
        ratio = row["risk"] / reference["risk"]
        cells = [f"{row['risk']:.3g}", f"{ratio:.2f}", f"{row['risk_end']:.3g}", f"{row['v_ratio']:.3f}"]
        lines.append(markdown_row([name, *cells]))
    lines += ["", markdown_row(["lr", "risk, float32", f"risk, {CONTROL}"]), "|---" * 3 + "|"]
    for row in result["learning_rates"]:
        lines.append(markdown_row([f"{row['lr']:g}", f"{row['float32']:.3g}", f"{row[CONTROL]:.3g}"]))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Train, print the table, and write the result if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=3e-3, help="at the first step; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    result = run(arguments.steps, arguments.lr, arguments.seed)
    print(table(result))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
