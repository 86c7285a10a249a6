"""`adax-triton convert`: checkpoints of one optimizer or precision as checkpoints of another, off line.

A file holds a state dict, or a dictionary that has one under --key. A folder is a DeepSpeed checkpoint, or has such and
`latest`; it goes from Adam or AdamW to AdaX or AdaXW or back, and `engine.load_checkpoint` resumes from the result.
Hyper-parameters stay, but for those given. Nothing is unpickled but tensors and plain values, the source is not
changed, and the target appears when it is complete.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from adax_triton.convert.files import FORMS, Progress, convert_optimizer, convert_precision, reject_unsafe_pickles
from adax_triton.state.precision import MASTER_WEIGHTS, STATES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `adax-triton convert`."""
    parser.add_argument("source", type=Path, help="file of a state dict, or folder of a DeepSpeed checkpoint")
    parser.add_argument("target", type=Path, help="file or folder to write; must not exist")
    parser.add_argument(
        "--to", choices=FORMS, help="with a w: decoupled weight decay; the first four are of folders, too"
    )
    parser.add_argument("--key", help="where in the file's dictionary the state dict is")
    parser.add_argument("--beta2", type=float, help="betas[1] of the new rule; default: 1e-4 for AdaX, 0.999 for Adam")
    parser.add_argument("--lr", type=float, help="learning rate of all groups; default: as they are")
    parser.add_argument("--states", choices=STATES, help="of a file: keep the states so")
    parser.add_argument("--master-weights", choices=MASTER_WEIGHTS, help="of a file that has masters: keep them so")


def main(arguments: argparse.Namespace) -> int:
    """Convert; return 1 after one sentence on standard error where something does not fit."""
    from adax_triton.bench.harness.progress import progress

    try:
        written = _convert(arguments, progress)
    except (OSError, TypeError, ValueError) as error:
        print(f"adax-triton convert: {error}", file=sys.stderr)
        return 1
    print(written)
    return 0


def _convert(arguments: argparse.Namespace, progress: Progress) -> str:
    source, target = arguments.source, arguments.target
    if target.exists():
        raise ValueError(f"{target} exists already; name a target that does not")
    if source.is_file():
        return convert_file(arguments, progress)
    if not source.is_dir():
        raise ValueError(f"{source} is neither a file nor a folder")
    for option in ("key", "states", "master_weights"):
        if getattr(arguments, option) is not None:
            name = f"--{option.replace('_', '-')}"
            raise ValueError(f"{name} is for files; a DeepSpeed checkpoint is loaded as the configuration says")
    from adax_triton.integrations.deepspeed.checkpoints.offline import convert_folder

    return convert_folder(source, target, arguments.to, arguments.beta2, arguments.lr, progress)


def convert_file(arguments: argparse.Namespace, progress: Progress) -> str:
    """Convert a file; return a sentence of what has been written."""
    source, target, key = arguments.source, arguments.target, arguments.key
    if not (arguments.to or arguments.states or arguments.master_weights):
        raise ValueError("nothing to convert to: give --to, --states or --master-weights")
    with progress(3, "convert") as advance:
        with reject_unsafe_pickles(source):
            saved = torch.load(source, map_location="cpu", weights_only=True)
        advance(1, "read")
        state_dict = _state_dict_of(saved, source, key)
        if arguments.to is not None:
            state_dict = convert_optimizer(state_dict, arguments.to, beta2=arguments.beta2, lr=arguments.lr)
        if arguments.states is not None or arguments.master_weights is not None:
            state_dict = convert_precision(state_dict, states=arguments.states, master_weights=arguments.master_weights)
        advance(1, "converted")
        part = target.with_name(f"{target.name}.part")
        try:
            torch.save(state_dict if key is None else {**saved, key: state_dict}, part)
            os.rename(part, target)
        finally:
            part.unlink(missing_ok=True)
        advance(1, "written")
    return f"{target}: {len(state_dict['state'])} states in {len(state_dict['param_groups'])} groups"


def _state_dict_of(saved: Any, source: Path, key: str | None) -> dict[str, Any]:
    if not isinstance(saved, dict):
        raise ValueError(f"{source} holds a {type(saved).__name__}; expected a dictionary")
    found = saved if key is None else saved.get(key)
    if isinstance(found, dict) and "state" in found and "param_groups" in found:
        return found
    keys = [
        name for name, value in saved.items() if isinstance(value, dict) and {"state", "param_groups"} <= set(value)
    ]
    where = f"{source}[{key!r}]" if key is not None else str(source)
    advice = f"give --key {' or '.join(map(str, keys))}" if keys else "nor has any of its keys"
    raise ValueError(f"{where} is not the state dict of an optimizer; {advice}")
