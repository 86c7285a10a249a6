"""Validate arguments, DeepSpeed config, data and folder of a training run."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run_folder import RunFolder
from text_data import TextData, read_text

EXAMPLES = Path(__file__).resolve().parent


@dataclass
class Plan:
    """All settings of a run; the run folder stores `settings` as JSON."""

    config: dict[str, Any]
    data: TextData
    folder: RunFolder
    settings: dict[str, Any]


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `demo.py` passes to each run."""
    parser.add_argument("--config", type=Path, help="DeepSpeed config (default: examples/zero2_<optimizer>.json)")
    parser.add_argument("--optimizer", help="AdaX, AdaXW, AdamW, ...: use the optimizer block of zero2_<name>.json")
    parser.add_argument("--data", type=Path, help="text file or folder (default: source of Python's standard library)")
    parser.add_argument("--max-bytes", type=int, default=8_000_000, help="bytes of text to use")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--warmup", type=int, default=40, help="steps of linear warm-up; then cosine decay to 10 %%")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=128, help="context length in bytes")
    parser.add_argument("--seed", type=int, default=0, help="random seed of weights and data order")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--validate-every", type=int, default=100, help="steps between validations")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier run instead of resuming it")


def make_plan(args: argparse.Namespace, ranks: int) -> Plan:
    """Read config and data and return the plan; write nothing.

    Args:
        args: the arguments of `add_run_arguments`, plus `out` and `lr`, which may be None.
        ranks: number of processes.

    Raises:
        ValueError: an argument is invalid, or the folder holds another run.
    """
    for name in ("max_bytes", "steps", "warmup", "layers", "width", "heads", "context", "save_every", "validate_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.width % args.heads:
        raise ValueError(f"--width {args.width} must be a multiple of --heads {args.heads}")
    config = load_config(args.config, args.optimizer, args.lr)
    data = TextData(read_text(args.data, args.max_bytes), args.context, args.seed)
    names = ("layers", "width", "heads", "context", "steps", "warmup", "validate_every", "seed")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"ranks": ranks, "data_sha256": data.digest, "config": config}
    folder = RunFolder(args.out or Path("runs") / config["optimizer"]["type"].lower())
    if not args.fresh:
        folder.check_settings(settings)
    return Plan(config, data, folder, settings)


def load_config(path: Path | None, optimizer: str | None, lr: float | None = None) -> dict[str, Any]:
    """Read a DeepSpeed config; `optimizer` replaces its optimizer block.

    Args:
        path: JSON file. None: `zero2_<optimizer>.json`.
        optimizer: name of the optimizer. None: keep the block of `path`, or AdaX without `path`.
        lr: replaces the learning rate of the block. Default: None, keep it.

    Raises:
        ValueError: `optimizer` is unknown, or the file is unreadable or names no optimizer.
    """
    presets = {file.stem.removeprefix("zero2_"): file for file in EXAMPLES.glob("zero2_*.json")}
    name = (optimizer or "AdaX").lower()
    if name not in presets:
        raise ValueError(f"unknown optimizer {optimizer!r}; expected one of {sorted(presets)} in any letter case")
    try:
        config = json.loads((path or presets[name]).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--config {str(path)!r}: {error}") from error
    if optimizer is not None:
        config["optimizer"] = json.loads(presets[name].read_text())["optimizer"]
    if "type" not in config.get("optimizer", {}):
        raise ValueError(f"--config {str(path)!r} has no 'optimizer' block with a 'type'; add one or pass --optimizer")
    if lr is not None:
        config["optimizer"].setdefault("params", {})["lr"] = lr
    return config
