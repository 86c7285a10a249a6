"""What each low-memory state costs in precision: moments and updates beside the same recursion in float64.

Every mode steps the same simulated gradients with the package's own codes (`stored`, `rounding`, `reference`):

    m <- m + (1 - b1)(g - m)
    v <- v + w_t (g^2 - v)          w_t = b2 / ((1 + b2)^t - 1)
    u  = m / (sqrt(v) + eps)        then m and v are rounded into what the mode stores

`u*`, `m*` and `v*` are those of the float64 recursion, which stores what it computes. Next to ours stand two rules that
round `v` to the nearest: bfloat16, and FlashOptim's for v (arXiv:2602.23349, algorithm 3) with a float32 group scale
where theirs is float16, and m left in float32.

    python -m adax_triton.bench.precision.study --steps 30000 --out bench/results/precision-30k.json

prints a table, and ends with 1 where one of our modes misses a goal of `goals`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from adax_triton.bench.harness.environment import describe
from torch import Tensor

from adax_triton.state.precision import Precision, state_layouts
from adax_triton.update.coefficients import step_scalars
from adax_triton.update.quantization import GROUP
from adax_triton.update.quantized_update import load_moments, store_moments
from adax_triton.update.reference import adax_update
from adax_triton.update.rounding import random_bits, random_key

from .error_stats import Tally
from .gradients import KINDS

BETAS = (0.9, 1e-4)
EPS = 1e-12
# Limits of the relative error of the update; and of every bias.
MOST_ERROR = {"bfloat16": 0.03, "8bit_v16": 0.03, "8bit": 0.13}
MOST_BIAS = 0.01
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


class Mode(NamedTuple):
    """How moments are kept: one of `precision.STATES`, or None for 8-bit roots of v; and how v is rounded."""

    states: str | None
    stochastic: bool


MODES = {
    "float32": Mode("float32", False),
    "bfloat16": Mode("bfloat16", True),
    "8bit_v16": Mode("8bit_v16", True),
    "8bit": Mode("8bit", True),
    "bfloat16, v to nearest": Mode("bfloat16", False),
    "8-bit root of v, to nearest": Mode(None, False),
}


class Stored(NamedTuple):
    """The moments as a mode stores them; `group` holds exponents beside codes, float32 scales beside 8-bit roots."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    group: Tensor | None


def new_moments(mode: Mode, numel: int) -> Stored:
    """Return zero moments of a mode for a 1-D tensor."""
    if mode.states is None:
        codes = torch.zeros(numel, dtype=torch.uint8)
        return Stored(torch.zeros(numel), codes, torch.zeros(numel // GROUP))
    layouts = state_layouts(torch.empty(numel), Precision(mode.states))
    tensors = {name: torch.zeros(layout.shape, dtype=layout.dtype) for name, layout in layouts.items()}
    return Stored(tensors["exp_avg"], tensors["exp_avg_sq"], tensors.get("group_exponents"))


def load(stored: Stored) -> tuple[Tensor, Tensor]:
    """Return the float32 moments that `stored` stands for; new tensors."""
    if stored.group is None or stored.group.dtype != torch.float32:
        return load_moments(*stored)
    roots = stored.exp_avg_sq.view(-1, GROUP) / 255.0 * stored.group.view(-1, 1)
    return stored.exp_avg.clone(), roots.square().view(-1)


def store(first: Tensor, second: Tensor, stored: Stored, random: Tensor | None) -> None:
    """Round float32 moments into `stored`; v stochastically unless `random` is None."""
    if stored.group is None or stored.group.dtype != torch.float32:
        store_moments((first, second), *stored, random)
        return
    roots = second.sqrt().view(-1, GROUP)
    scale = roots.amax(dim=1, keepdim=True)
    codes = (roots / torch.where(scale == 0, 1.0, scale) * 255.0).round()
    stored.exp_avg.copy_(first)
    stored.exp_avg_sq.copy_(codes.view(-1))
    stored.group.copy_(scale.view(-1))


def advance(grad: Tensor, stored: Stored, scalars: Tensor, random: Tensor | None) -> Tensor:
    """Step the stored moments, in place, and return the update u.

    Args:
        grad: (n,) float32, n a multiple of 32.
        stored: of the same n.
        scalars: (3,) float32: `one_minus_beta1`, `exp_avg_sq_weight` and `eps` of `schedule.StepScalars`.
        random: (n,) int32 random bits; None to round v to nearest.
    """
    first, second = load(stored)
    update = advance_exact(grad, first, second, scalars)
    store(first, second, stored, random)
    return update


def advance_exact(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Tensor) -> Tensor:
    """Step moments in their own dtype, in place, and return the update u."""
    update = torch.zeros_like(exp_avg)
    weights = {"one_minus_beta1": scalars[0], "exp_avg_sq_weight": scalars[1], "eps": scalars[2]}
    adax_update(update, grad, exp_avg, exp_avg_sq, step_size=-1.0, decay=0.0, l2=0.0, grad_factor=1.0, **weights)
    return update


def scalars_of(step: int) -> Tensor:
    """Return the scalars of `advance` for step t, in float64."""
    row = step_scalars(
        step=step,
        lr=1.0,
        betas=BETAS,
        eps=EPS,
        weight_decay=0.0,
        decoupled_weight_decay=True,
        second_moment="adax",
        eps_placement="normalized",
        maximize=False,
    )
    return torch.tensor([row.one_minus_beta1, row.exp_avg_sq_weight, row.eps], dtype=torch.float64)


def study(kind: str, steps: int, numel: int, seed: int, eager: bool) -> dict[str, dict[str, Any]]:
    """Step every mode on the same gradients of one kind.

    Args:
        kind: of `gradients.KINDS`.
        steps: how many.
        numel: elements; a multiple of 32.
        seed: of the gradients and of the random bits.
        eager: do not compile; better for less than some thousand steps.

    Returns:
        Per mode, the figures of `precision_tally.Tally`.
    """
    compiled: Callable[[Any], Any] = (lambda function: function) if eager else torch.compile
    step_mode, step_exact = compiled(advance), compiled(advance_exact)
    generator = torch.Generator().manual_seed(seed)
    gradient = KINDS[kind](numel, steps, generator)
    index = torch.arange(numel, dtype=torch.int32)
    stored = {name: new_moments(mode, numel) for name, mode in MODES.items()}
    exact = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
    tally = Tally(len(MODES), numel, steps, compiled)
    for step in range(1, steps + 1):
        scalars, grad = scalars_of(step), gradient(step)
        random = random_bits(index, random_key(seed, step))
        update = step_exact(grad.double(), *exact, scalars)
        row = scalars.float()
        updates = [
            step_mode(grad, stored[name], row, random if mode.stochastic else None) for name, mode in MODES.items()
        ]
        tally.add_updates(step, grad, torch.stack(updates), update)
        if tally.is_sampled(step):
            tally.add_moments([load(moments) for moments in stored.values()], exact)
            tally.count_zeros([moments.exp_avg_sq for moments in stored.values()])
    return dict(zip(MODES, tally.figures(), strict=True))


def goals(mode: str, figures: dict[str, Any]) -> dict[str, bool]:
    """Return which goals one of our modes meets: errors below `MOST_ERROR`, biases below `MOST_BIAS`, no v of 0."""
    return {
        "update_error": figures["update_error"] < MOST_ERROR[mode],
        "update_bias": abs(figures["update_bias"]) < MOST_BIAS,
        "v_bias": abs(figures["v_bias"]) < MOST_BIAS,
        "zero_codes": figures["zero_codes"] == 0,
        "unseen": figures["unseen_largest_update"] == 0,
    }


def run(kinds: list[str], steps: int, numel: int, seed: int, eager: bool) -> dict[str, Any]:
    """Study several kinds of gradients and return the result, JSON-friendly."""
    result: dict[str, Any] = {
        "environment": describe(torch.device("cpu")),
        **{"steps": steps, "numel": numel, "seed": seed, "betas": BETAS, "eps": EPS},
        **{"most_error": MOST_ERROR, "most_bias": MOST_BIAS},
        "kinds": {},
    }
    for kind in kinds:
        print(f"{kind}: {steps} steps", file=sys.stderr, flush=True)
        rows = study(kind, steps, numel, seed, eager)
        for name, figures in rows.items():
            if name in MOST_ERROR:
                figures["goals"] = goals(name, figures)
        result["kinds"][kind] = rows
    return result


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown, with PASS or the goals that failed."""
    titles = ["gradients", "mode", *COLUMNS.values(), "v codes of 0", "largest update ratio", "goals"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for kind, rows in result["kinds"].items():
        for name, figures in rows.items():
            cells = [f"{100 * figures[key]:.4g}" for key in COLUMNS]
            failed = [goal for goal, met in figures.get("goals", {}).items() if not met]
            verdict = "" if "goals" not in figures else f"FAIL: {', '.join(failed)}" if failed else "PASS"
            tail = [str(figures["zero_codes"]), f"{figures['largest_update_ratio']:.3g}", verdict]
            lines.append("| " + " | ".join([kind, name, *cells, *tail]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the study from the command line; return 1 where one of our modes misses a goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30_000, help="default: %(default)s")
    parser.add_argument("--numel", type=int, default=2048, help="elements, a multiple of 32; default: %(default)s")
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS), help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--eager", action="store_true", help="do not compile the steps")
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    arguments = parser.parse_args(argv)
    if arguments.numel < GROUP or arguments.numel % GROUP:
        parser.error(f"--numel {arguments.numel}: expected a multiple of {GROUP}")
    torch.set_num_threads(1)
    result = run(arguments.kinds, arguments.steps, arguments.numel, arguments.seed, arguments.eager)
    print(table(result))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    ours = [figures["goals"] for rows in result["kinds"].values() for figures in rows.values() if "goals" in figures]
    return 0 if all(all(met.values()) for met in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
