"""A hundred thousand steps of a small regression: what rounding v to the nearest does to AdaX, and the modes do not.

W (64 x 64) is fitted to noisy observations of a linear map, a fresh batch of 8 at each step:

    y = x W* + 0.01 z,    x_i ~ N(0, 1 / i^2),    loss = |x W - y|^2 / 2,    risk = E |x (W - W*)|^2 / 64, exactly

The gradients become smaller as W approaches W*, and v has to follow. All modes see the same batches, from the same
start, through the real optimizer: one `AdaX`, with a parameter group for each mode, and a learning rate that falls
linearly to 0. The control keeps float32 states, and its v is rounded to the nearest bfloat16 after each step.

A v that no longer falls makes steps too small, as a smaller learning rate would, and another learning rate can make up
for some of that: `learning_rates` has the risks of several, for v in float32 and for the control, by the reference
update. The ratio of v does not depend on such a choice.

    python -m adax_triton.bench.precision.long_run --steps 100000 --out bench/results/long-run-100k.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from adax_triton.bench.harness.environment import describe
from torch import Tensor

from adax_triton import AdaX
from adax_triton.state.allocation import local_state_tensors
from adax_triton.update.coefficients import StepScalars, step_scalars
from adax_triton.update.quantized_update import load_moments
from adax_triton.update.reference import adax_update

SIZE = 64  # of W: 4096 elements, from which on states are compact
BATCH = 8
NOISE = 1e-2
HORIZON = 10.0  # betas[1] * steps
CONTROL = "float32, v rounded to nearest bfloat16"
MODES = {"float32": "float32", "bfloat16": "bfloat16", "8bit_v16": "8bit_v16", "8bit": "8bit", CONTROL: "float32"}
EVALUATIONS = 100
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
AVERAGED = 5  # the last evaluations, whose mean is the final risk


class Regression:
    """The problem: its batches, its gradients and its risk.

    Args:
        seed: of W* and of the batches.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._target = torch.randn(SIZE, SIZE, generator=self._generator)
        self._deviations = torch.arange(1, SIZE + 1).pow(-1.0)

    def gradients(self, weights: Tensor) -> Tensor:
        """Return the gradients of one new batch's mean loss at each of `weights`, (..., 64, 64)."""
        x = torch.randn(BATCH, SIZE, generator=self._generator) * self._deviations
        noise = torch.randn(BATCH, SIZE, generator=self._generator) * NOISE
        return x.T @ (x @ (weights - self._target) - noise) / BATCH

    def risk(self, weights: Tensor) -> Tensor:
        """Return the risk of each of `weights`, in float64."""
        missing = (weights.double() - self._target.double()) * self._deviations.double().unsqueeze(1)
        return missing.square().sum(dim=(-2, -1)) / SIZE


def scalars_of(step: int, lr: float, beta2: float) -> StepScalars:
    """Return what `AdaX` takes for step t, without weight decay."""
    return step_scalars(
        step=step,
        lr=lr,
        betas=(0.9, beta2),
        eps=1e-12,
        weight_decay=0.0,
        decoupled_weight_decay=False,
        second_moment="adax",
        eps_placement="normalized",
        maximize=False,
    )


class Exact:
    """The float64 recursion beside the optimizer: another mode, with its own weights."""

    def __init__(self) -> None:
        self.weights, self.exp_avg, self.exp_avg_sq = (torch.zeros(SIZE, SIZE, dtype=torch.float64) for _ in range(3))

    def step(self, grad: Tensor, scalars: StepScalars) -> None:
        """Apply one step."""
        adax_update(self.weights, grad.double(), self.exp_avg, self.exp_avg_sq, **scalars._asdict())


def compare_rates(steps: int, rates: tuple[float, ...], seed: int) -> list[dict[str, float]]:
    """Train with v in float32, and with v rounded to nearest bfloat16, at several learning rates side by side."""
    problem, beta2 = Regression(seed), beta2_for(steps)
    weights, exp_avg, exp_avg_sq = (torch.zeros(len(rates), 2, SIZE, SIZE) for _ in range(3))
    step_sizes = torch.tensor(rates).view(-1, 1, 1, 1)
    risks = []
    for step in range(1, steps + 1):
        scalars = scalars_of(step, 1 - (step - 1) / steps, beta2)._asdict()
        scalars["step_size"] = step_sizes * scalars["step_size"]
        adax_update(weights, problem.gradients(weights), exp_avg, exp_avg_sq, **scalars)
        exp_avg_sq[:, 1].copy_(exp_avg_sq[:, 1].to(torch.bfloat16))
        if is_evaluated(step, steps):
            risks.append(problem.risk(weights))
    means = torch.stack(risks[-AVERAGED:]).mean(dim=0).tolist()
    return [{"lr": lr, "float32": full, CONTROL: control} for lr, (full, control) in zip(rates, means, strict=True)]


def beta2_for(steps: int) -> float:
    """Return the rule's parameter for a run of so many steps."""
    return min(1e-1, HORIZON / steps)


def is_evaluated(step: int, steps: int) -> bool:
    """Whether the risk is taken after this step."""
    return step % max(1, steps // EVALUATIONS) == 0


def second_moment(optimizer: AdaX, param: Tensor) -> Tensor:
    """Return v in float32, as it stands in the optimizer's state."""
    state = local_state_tensors(optimizer.state[param])
    return load_moments(state["exp_avg"], state["exp_avg_sq"], state.get("group_exponents"))[1]


def train(steps: int, lr: float, seed: int) -> list[dict[str, Any]]:
    """Train all modes; return the evaluations: step, and per mode the risk and the median ratio of v to float32's."""
    problem = Regression(seed)
    beta2 = beta2_for(steps)
    params = {name: torch.nn.Parameter(torch.zeros(SIZE, SIZE)) for name in MODES}
    groups = [{"params": [param], "states": MODES[name]} for name, param in params.items()]
    optimizer = AdaX(groups, lr=lr, betas=(0.9, beta2), weight_decay=0.0, seed=seed)
    exact = Exact()
    evaluations = []
    begun = time.perf_counter()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - (step - 1) / steps)
        weights = torch.stack([*(param.detach() for param in params.values()), exact.weights.float()])
        gradients = problem.gradients(weights)
        for param, grad in zip(params.values(), gradients, strict=False):
            param.grad = grad
        optimizer.step()
        exact.step(gradients[-1], scalars_of(step, optimizer.param_groups[0]["lr"], beta2))
        rounded = optimizer.state[params[CONTROL]]["exp_avg_sq"]
        rounded.copy_(rounded.to(torch.bfloat16))
        if is_evaluated(step, steps):
            evaluations.append({"step": step, "modes": _evaluate(problem, optimizer, params, exact)})
        if step % max(1, steps // 20) == 0:
            print(f"step {step} of {steps}, {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    return evaluations


def _evaluate(
    problem: Regression, optimizer: AdaX, params: dict[str, torch.nn.Parameter], exact: Exact
) -> dict[str, dict[str, float]]:
    risks = problem.risk(torch.stack([*(param.detach().double() for param in params.values()), exact.weights]))
    seconds = {name: second_moment(optimizer, param).double() for name, param in params.items()}
    names = {**seconds, "float64": exact.exp_avg_sq}
    return {
        name: {"risk": risk, "v_ratio": (second / seconds["float32"]).median().item()}
        for (name, second), risk in zip(names.items(), risks.tolist(), strict=True)
    }


def run(steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Train and return the result, JSON-friendly."""
    result = {
        "environment": describe(torch.device("cpu")),
        **{"steps": steps, "lr": lr, "seed": seed, "horizon": HORIZON, "size": SIZE, "batch": BATCH, "noise": NOISE},
    }
    evaluations = train(steps, lr, seed)
    last = evaluations[-AVERAGED:]
    final = {
        name: {
            "risk": sum(evaluation["modes"][name]["risk"] for evaluation in last) / len(last),
            "risk_end": last[-1]["modes"][name]["risk"],
            "v_ratio": last[-1]["modes"][name]["v_ratio"],
        }
        for name in last[-1]["modes"]
    }
    rates = compare_rates(steps, LEARNING_RATES, seed)
    return {**result, "final": final, "learning_rates": rates, "evaluations": evaluations}


def table(result: dict[str, Any]) -> str:
    """Return the final figures as Markdown."""
    reference = result["final"]["float32"]
    lines = [
        f"{result['steps']} steps, lr {result['lr']}, commit {result['environment']['commit']}",
        "",
        f"| states | risk, mean of {AVERAGED} evaluations | over float32's | at the end | median v / float32's |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["final"].items():
        ratio = row["risk"] / reference["risk"]
        lines.append(f"| {name} | {row['risk']:.3g} | {ratio:.2f} | {row['risk_end']:.3g} | {row['v_ratio']:.3f} |")
    lines += ["", f"| lr | risk, float32 | risk, {CONTROL} |", "|---|---|---|"]
    lines += [f"| {row['lr']:g} | {row['float32']:.3g} | {row[CONTROL]:.3g} |" for row in result["learning_rates"]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=3e-3, help="at the first step; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
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
