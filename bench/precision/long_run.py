"""Show the bias of rounding v to nearest over 100,000 training steps.

    python -m adax_triton.bench.precision.long_run --out bench/results/long-run-100k.json

W (64 x 64) is fitted to noisy observations of a linear map, with a new batch of 8 at each step:

    y = x W* + 0.01 z,    x_i ~ N(0, 1 / i^2),    loss = |x W - y|^2 / 2,    risk = E |x (W - W*)|^2 / 64, exactly

The gradients shrink as W approaches W*, and v has to follow. All modes start at 0 and see the same batches. The
learning rate falls linearly to 0. The control keeps float32 states, with v rounded to the nearest bfloat16 after each
step.

If v stops falling, steps become too small. A larger learning rate partly compensates, so float32 and the control are
also trained at other rates. The ratio of v does not depend on the rate.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from adax_triton.bench.harness.command import count, markdown_table, publish
from adax_triton.bench.harness.environment import describe
from torch import Tensor

from .comparison import Comparison, Mode
from .update_error import to_bfloat16

SIZE = 64  # of W; 4096 elements are the fewest with low-precision states
BATCH = 8
NOISE = 1e-2
SEED = 0
HORIZON = 10.0  # beta2 * steps
EVALUATIONS = 100
AVERAGED = 5  # evaluations at the end; their mean is the final risk
LR = 3e-3
LEARNING_RATES = (1e-3, LR, 1e-2, 3e-2)
CONTROL = "float32, v rounded to nearest bfloat16"
MODES = {states: Mode(states) for states in ("float32", "bfloat16", "8bit_v16", "8bit")}
MODES[CONTROL] = Mode(rounding=lambda m, v: to_bfloat16(v))


class Regression:
    """The problem: its batches, gradients and risk."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(SEED)
        self._target = torch.randn(SIZE, SIZE, generator=self._generator)
        self._deviations = torch.arange(1, SIZE + 1).pow(-1.0)

    def gradients(self, weights: Tensor) -> Tensor:
        """Draw a batch; return the gradient of its mean loss.

        The gradient is taken at each of `weights`, (..., 64, 64).
        """
        x = torch.randn(BATCH, SIZE, generator=self._generator) * self._deviations
        noise = torch.randn(BATCH, SIZE, generator=self._generator) * NOISE
        return x.T @ (x @ (weights - self._target) - noise) / BATCH

    def risks(self, weights: Tensor) -> list[float]:
        """Return the risk of each of `weights`, computed in float64."""
        missing = (weights.double() - self._target.double()) * self._deviations.double().unsqueeze(1)
        return (missing.square().sum(dim=(-2, -1)) / SIZE).tolist()


def train(steps: int) -> dict[str, Any]:
    """Train all modes; return the evaluations and their summary, JSON-friendly."""
    others = [(name, rate) for rate in LEARNING_RATES if rate != LR for name in ("float32", CONTROL)]
    modes: dict[Any, Mode] = MODES | {one: MODES[one[0]]._replace(lr=one[1] / LR) for one in others}
    problem, comparison = Regression(), Comparison(modes, (SIZE, SIZE), (0.9, min(1e-1, HORIZON / steps)), SEED)
    evaluations: list[dict[str, Any]] = []
    risks: list[dict[Any, float]] = []
    for step in range(1, steps + 1):
        weights = torch.cat([comparison.weights, comparison.exact.float().unsqueeze(0)])
        comparison.step(list(problem.gradients(weights)), LR * (1 - (step - 1) / steps))
        if step % max(1, steps // EVALUATIONS) == 0:
            found = problem.risks(torch.cat([comparison.weights.double(), comparison.exact.unsqueeze(0)]))
            risks.append(dict(zip([*modes, "float64"], found, strict=True)))
            v = dict(zip(modes, (moments[1].double() for moments in comparison.moments()), strict=True))
            v["float64"] = comparison.exact_moments[1]
            ratios = {name: (v[name] / v["float32"]).median().item() for name in (*MODES, "float64")}
            of_modes = {name: {"risk": risks[-1][name], "v_ratio": ratio} for name, ratio in ratios.items()}
            evaluations.append({"step": step, "modes": of_modes})
            print(f"step {step} of {steps}", file=sys.stderr, flush=True)
    means = {name: statistics.fmean(risk[name] for risk in risks[-AVERAGED:]) for name in risks[-1]}
    final = {
        name: {"risk": means[name], "risk_end": row["risk"], "v_ratio": row["v_ratio"]}
        for name, row in evaluations[-1]["modes"].items()
    }
    rates = [
        {"lr": rate, **{name: means[name if rate == LR else (name, rate)] for name in ("float32", CONTROL)}}
        for rate in LEARNING_RATES
    ]
    return {"final": final, "learning_rates": rates, "evaluations": evaluations}


def table(result: dict[str, Any]) -> str:
    """Return the final figures as Markdown."""
    full = result["final"]["float32"]["risk"]
    titles = [
        "states",
        f"risk, mean of {AVERAGED} evaluations",
        "ratio to float32",
        "at the end",
        "median ratio of v to float32",
    ]
    rows = [
        [name, f"{row['risk']:.3g}", f"{row['risk'] / full:.2f}", f"{row['risk_end']:.3g}", f"{row['v_ratio']:.3f}"]
        for name, row in result["final"].items()
    ]
    rates = [[f"{row['lr']:g}", f"{row['float32']:.3g}", f"{row[CONTROL]:.3g}"] for row in result["learning_rates"]]
    title = f"{result['steps']} steps, lr {result['lr']}, commit {result['environment']['commit']}"
    of_rates = markdown_table(["lr", "risk, float32", f"risk, {CONTROL}"], rates)
    return "\n".join([title, "", *markdown_table(titles, rows), "", *of_rates])


def main(argv: list[str] | None = None) -> int:
    """Train, print the table, and write the result with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=count, default=100_000, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = {"steps": arguments.steps, "lr": LR, "seed": SEED, "horizon": HORIZON}
    settings |= {"size": SIZE, "batch": BATCH, "noise": NOISE}
    result = {"environment": describe(torch.device("cpu")), **settings, **train(arguments.steps)}
    publish(result, table, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
