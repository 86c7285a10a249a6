"""Compare a small GPT's validation loss between precisions of weights and states.

Trains with AdaXW in plain PyTorch on the CPU, with linear warm-up and cosine decay. All runs of a seed start from the
same weights, which bfloat16 can represent, and see the same batches. A parameter p and its gradient are both float32 or
both bfloat16. Forward and backward use `p.float()`, so only the storage differs.

    difference = loss of the mode - loss of float32, per seed;    its mean, and standard error s / sqrt(seeds)

    python examples/compare_modes.py --out bench/results/gpt-modes.json

The script trains each mode with each learning rate of `--lr`.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from adax_triton.bench.harness.environment import describe
from gpt import GPT
from text_data import TextData, read_text
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR
from train_gpt import learning_rate_factor

from adax_triton import AdaXW

REFERENCE = "float32"
VALIDATION_BATCHES = 32
SHAPE = {"layers": 2, "width": 128, "heads": 4, "context": 64}


class Mode(NamedTuple):
    """Precision of the weights and their states; see the arguments of `AdaX`."""

    dtype: torch.dtype
    states: str
    master_weights: str | None = None
    weight_rounding: str = "nearest"


MODES = {
    REFERENCE: Mode(torch.float32, "float32"),
    "bfloat16 + master float32, states float32": Mode(torch.bfloat16, "float32", "float32"),
    "bfloat16 + master 24bit, states 8bit_v16": Mode(torch.bfloat16, "8bit_v16", "24bit"),
    "bfloat16 + master 24bit, states 8bit": Mode(torch.bfloat16, "8bit", "24bit"),
    "bfloat16 stochastic, states bfloat16": Mode(torch.bfloat16, "bfloat16", None, "stochastic"),
    "bfloat16 nearest, states float32": Mode(torch.bfloat16, "float32"),
}


def train(mode: Mode, data: TextData, seed: int, settings: argparse.Namespace, lr: float) -> float:
    """Train a new model; return its validation loss in nats per byte."""
    torch.manual_seed(seed)
    model = GPT(**SHAPE)
    for param in model.parameters():
        param.data = param.data.to(torch.bfloat16).to(mode.dtype)
    params = dict(model.named_parameters())
    optimizer = AdaXW(
        params.values(),
        lr=lr,
        betas=(0.9, settings.beta2),
        states=mode.states,
        master_weights=mode.master_weights,
        weight_rounding=mode.weight_rounding,
        seed=seed,
    )
    schedule = LambdaLR(optimizer, learning_rate_factor(settings.warmup, settings.steps))
    for step in range(settings.steps):
        batch = data.batch(step, rank=0, ranks=1, size=settings.batch)
        loss = functional_call(model, {name: param.float() for name, param in params.items()}, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        upcast = {name: param.float() for name, param in params.items()}
        batches = data.held_out(rank=0, ranks=1, size=settings.batch, batches=VALIDATION_BATCHES)
        return statistics.fmean(functional_call(model, upcast, batch).item() for batch in batches)


def summary(losses: list[float], reference: list[float]) -> dict[str, object]:
    """Return the mean loss, the mean paired difference and its standard error."""
    differences = [loss - other for loss, other in zip(losses, reference, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return {
        "validation_loss": losses,
        "mean": statistics.fmean(losses),
        "difference": statistics.fmean(differences),
        "standard_error": error,
    }


def run(settings: argparse.Namespace) -> dict[str, object]:
    """Train all modes, learning rates and seeds; return a JSON-friendly result."""
    text = read_text(settings.data, settings.max_bytes)
    result: dict[str, object] = {
        "environment": describe(torch.device("cpu")),
        **SHAPE,
        **{name: getattr(settings, name) for name in ("steps", "batch", "warmup", "beta2", "seeds")},
        "weights": sum(param.numel() for param in GPT(**SHAPE).parameters()),
        "text_bytes": len(text),
    }
    begun, rates = time.perf_counter(), []
    for lr in settings.lr:
        losses: dict[str, list[float]] = {name: [] for name in MODES}
        for seed in range(settings.seeds):
            data = TextData(text, SHAPE["context"], seed)
            for name, mode in MODES.items():
                losses[name].append(train(mode, data, seed, settings, lr))
                spent = time.perf_counter() - begun
                print(f"lr {lr}, seed {seed}, {name}: {losses[name][-1]:.4f}, {spent:.0f} s", file=sys.stderr)
        rates.append({"lr": lr, "modes": {name: summary(found, losses[REFERENCE]) for name, found in losses.items()}})
    return {**result, "text_sha256": data.digest, "rates": rates}


def table(result: dict[str, object]) -> str:
    """Return the result as Markdown."""
    head = f"{result['weights']:,} weights, {result['steps']} steps of {result['batch']} x {result['context']} bytes"
    seeds = range(result["seeds"])
    titles = ["lr", "weights and states", *(f"seed {seed}" for seed in seeds), "mean", "difference from float32"]
    lines = [f"{head}, commit {result['environment']['commit']}", "", "| " + " | ".join(titles) + " |"]
    lines.append("|---" * len(titles) + "|")
    for rate in result["rates"]:
        for name, row in rate["modes"].items():
            losses = [f"{loss:.4f}" for loss in row["validation_loss"]]
            error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.4f}"
            difference = "" if name == REFERENCE else f"{row['difference']:+.4f}{error}"
            lines.append("| " + " | ".join([f"{rate['lr']:g}", name, *losses, f"{row['mean']:.4f}", difference]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a text file or a folder (default: Python's standard library)")
    parser.add_argument("--max-bytes", type=int, default=4_000_000, help="bytes of text to use; default: %(default)s")
    parser.add_argument("--steps", type=int, default=250, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="windows of 64 bytes; default: %(default)s")
    parser.add_argument("--warmup", type=int, default=25, help="steps; default: %(default)s")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3], help="default: %(default)s")
    parser.add_argument("--beta2", type=float, default=1e-4, help="AdaX's growth rate; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    settings = parser.parse_args(argv)
    torch.set_num_threads(settings.threads)
    result = run(settings)
    print(table(result))
    if settings.out:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
