"""One training run of the study."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adax_triton import AdaXW

from .problems import PROBLEMS, Problem, Task, learning_rate_factor
from .rules import BETA1, RULES, step_settings

EPS = 1e-8
POINTS = 8  # validation losses and update sizes of a run


class Run(NamedTuple):
    """Settings that identify a run; its record has the same keys."""

    problem: str
    rule: str
    steps: int
    states: str
    lr: float
    seed: int


def train(run: Run, device: torch.device | None = None) -> dict[str, Any]:
    """Train one run.

    Args:
        run: names in `PROBLEMS` and `RULES`, and settings.
        device: default: the CPU.

    Returns:
        The fields of `run`, and

        loss: the last validation loss, or the mean of the second half of `curve` of an online problem; None if the
            run diverged.
        curve: validation losses after each eighth of the steps.
        area: their mean, the area under the curve.
        update: root mean square of the updates at these steps, divided by the learning rate of the schedule.
            Infinite and NaN values of both lists are None.
        seconds: duration.
    """
    start = time.perf_counter()
    problem = PROBLEMS[run.problem]
    task = problem.build(run.seed, device or torch.device("cpu"))
    curve, update = _train(task, problem, run)
    diverged = len(curve) < POINTS or not all(map(math.isfinite, curve))
    half = curve[POINTS // 2 :]
    loss = None if diverged else sum(half) / len(half) if problem.online else curve[-1]
    return {
        **run._asdict(),
        "loss": loss,
        "area": None if diverged else sum(curve) / POINTS,
        "curve": [_rounded(value, 6) for value in curve],
        "update": [_rounded(value, 4) for value in update],
        "seconds": round(time.perf_counter() - start, 2),
    }


def _rounded(value: float, digits: int) -> float | None:
    """Return a value for JSON, which has no infinity and no NaN."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _train(task: Task, problem: Problem, run: Run) -> tuple[list[float], list[float]]:
    rule = RULES[run.rule]
    optimizer = AdaXW(
        task.params,
        lr=run.lr,
        betas=(BETA1, rule.beta2(1, run.steps)),
        eps=EPS,
        second_moment=rule.second_moment,
        states=run.states,
        seed=run.seed,
        max_grad_norm=problem.max_grad_norm,
    )
    (group,) = optimizer.param_groups
    points = {round(run.steps * (index + 1) / POINTS) for index in range(POINTS)}
    curve: list[float] = []
    update: list[float] = []
    for step in range(1, run.steps + 1):
        task.loss(step).backward()
        lr = run.lr * learning_rate_factor(problem.schedule, step, run.steps)
        group.update(step_settings(rule, step, run.steps, lr, problem.weight_decay))
        before = [param.detach().clone() for param in task.params] if step in points else []
        optimizer.step()
        optimizer.zero_grad()
        if step in points:
            update.append(_update_size(task.params, before, lr))
            curve.append(task.validate())
            if not math.isfinite(curve[-1]):
                break
    return curve, update


@torch.no_grad()
def _update_size(params: Sequence[Tensor], before: list[Tensor], lr: float) -> float:
    squares = sum((param - old).double().square().sum().item() for param, old in zip(params, before, strict=True))
    return math.sqrt(squares / sum(old.numel() for old in before)) / lr
