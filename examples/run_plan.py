"""What determines one training run: command line, DeepSpeed config, data, folder; checked before anything starts."""

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
    """Everything one run is determined by; `settings` is the JSON image of it, kept in the run folder."""

    config: dict[str, Any]
    data: TextData
    folder: RunFolder
    settings: dict[str, Any]


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `demo.py` hands on to each of its runs."""
    parser.add_argument("--config", type=Path, help="DeepSpeed config (default: zero2_<optimizer>.json beside me)")
    parser.add_argument("--optimizer", help="AdaX, AdaXW, AdamW, ...: use the optimizer block of zero2_<name>.json")
    parser.add_argument("--data", type=Path, help="text file or folder (default: source of Python's standard library)")
    parser.add_argument("--max-bytes", type=int, default=8_000_000, help="how much of the data to use")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--warmup", type=int, default=40, help="steps of linear warm-up, before a cosine to a tenth")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=128, help="bytes the model sees")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the data")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--validate-every", type=int, default=100, help="steps between validations")
    parser.add_argument("--fresh", action="store_true", help="drop an earlier run in the folder instead of resuming it")


def make_plan(args: argparse.Namespace, ranks: int) -> Plan:
    """Turn the arguments into a plan; reads config and data, writes nothing.

    Args:
        args: those of `add_run_arguments`, and `out` and `lr`, which may be None.
        ranks: processes that will train together.

    Raises:
        ValueError: an argument makes no sense, or the folder holds another run; the message names it.
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
    """Read a DeepSpeed config; `optimizer` puts another config's optimizer block in the place of its own.

    Args:
        path: JSON file; None is `zero2_<optimizer>.json`.
        optimizer: name of the optimizer; None keeps the block of `path`, and is AdaX when there is no `path`.
        lr: learning rate instead of the block's.

    Raises:
        ValueError: nothing is known of `optimizer`, or the file cannot be read or names no optimizer.
    """
    presets = {file.stem.removeprefix("zero2_"): file for file in EXAMPLES.glob("zero2_*.json")}
    name = (optimizer or "AdaX").lower()
    if name not in presets:
        raise ValueError(f"optimizer {optimizer!r} is unknown: expected one of {sorted(presets)}, in any letter case")
    try:
        config = json.loads((path or presets[name]).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--config {str(path)!r}: {error}") from error
    if optimizer is not None:
        config["optimizer"] = json.loads(presets[name].read_text())["optimizer"]
    if "type" not in config.get("optimizer", {}):
        raise ValueError(f"--config {str(path)!r} has no 'optimizer' block with a 'type'")
    if lr is not None:
        config["optimizer"].setdefault("params", {})["lr"] = lr
    return config
