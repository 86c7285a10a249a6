"""The result of `sweep.py`.

{"environment": ..., "settings": ..., "configs": {optimizer: DeepSpeed config with its best rate},
 "losses": {optimizer: {learning rate: [validation loss of seed 0, 1, ...]}}}
"""

import json
import math
from pathlib import Path
from typing import Any

from adax_triton.bench.harness.command import markdown_table
from adax_triton.bench.study.analysis import Interval, interval
from run_plan import Plan

COMMITTED = Path(__file__).resolve().parent / "sweep.json"
# Settings that the runs of a sweep share.
SHARED = ("layers", "width", "heads", "context", "steps", "warmup", "ranks")


def best_rate(losses: dict[str, list[float]]) -> str:
    """Return the learning rate with the lowest mean loss.

    Args:
        losses: by learning rate, one per seed; a rate with a loss that is not finite is the last choice.
    """
    totals = {rate: sum(values) for rate, values in losses.items()}
    return min(totals, key=lambda rate: totals[rate] if math.isfinite(totals[rate]) else math.inf)


def paired(result: dict[str, Any], optimizer: str, against: str) -> Interval:
    """Return the mean difference of two optimizers at their best rates.

    Args:
        result: of a sweep.
        optimizer, against: the difference is the loss of `optimizer` minus that of `against`.

    Returns:
        The mean over the seeds with its 95 % interval.
    """
    ours, theirs = (result["losses"][name] for name in (optimizer, against))
    return interval([a - b for a, b in zip(ours[best_rate(ours)], theirs[best_rate(theirs)], strict=True)])


def spread(plans: list[Plan], path: Path = COMMITTED) -> tuple[int, Interval] | None:
    """Return the recorded number of seeds and difference of two runs.

    Args:
        plans: of two runs on the text of Python's standard library.
        path: result of a sweep.

    Returns:
        None if the sweep had other settings.
    """
    if len(plans) != 2 or not path.exists():
        return None
    result = json.loads(path.read_text())
    names = [plan.config["optimizer"]["type"] for plan in plans]
    for name, plan in zip(names, plans, strict=True):
        if result["settings"] != shared_settings(plan) or result["configs"].get(name) != plan.config:
            return None
    return len(next(iter(result["losses"][names[0]].values()))), paired(result, *names)


def shared_settings(plan: Plan) -> dict[str, Any]:
    """Return the settings that all runs of a sweep share."""
    return {name: plan.settings[name] for name in SHARED}


def table(result: dict[str, Any]) -> str:
    """Return mean losses and differences from the last optimizer, as Markdown."""
    rates = sorted({rate for losses in result["losses"].values() for rate in losses}, key=float)
    rows = []
    for name, losses in result["losses"].items():
        means = [f"{sum(losses[rate]) / len(losses[rate]):.3f}" if rate in losses else "" for rate in rates]
        best = rates.index(best_rate(losses))
        means[best] = f"**{means[best]}**"
        rows.append([name, *means])
    text = "\n".join(markdown_table(["learning rate", *rates], rows))
    *others, last = result["losses"]
    return "\n".join([text, "", *(f"{name} - {last}: {paired(result, name, last)}" for name in others)])
