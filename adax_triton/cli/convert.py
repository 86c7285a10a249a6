"""Convert checkpoints to another optimizer or precision.

The source is a file or a folder. A file holds an optimizer's state dict, or a dictionary with one, or with a list of
them, under --key. Checkpoints of Lightning have the key optimizer_states. A folder is a DeepSpeed checkpoint, or the
folder that contains checkpoints and the file `latest`. Folders convert between Adam(W) and AdaX(W);
`engine.load_checkpoint` loads the result. Hyper-parameters are kept unless given. Files are read with
torch.load(weights_only=True). The source is not modified. The target is written atomically.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

from adax_triton.convert.files import OPTIMIZER_KINDS, Progress, convert_file, convert_optimizer, convert_precision
from adax_triton.state.precision import MASTER_WEIGHTS, STATES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `adax-triton convert`."""
    parser.add_argument("source", type=Path, help="state dict file, or folder of a DeepSpeed checkpoint")
    parser.add_argument("target", type=Path, help="file or folder to write; must not exist")
    parser.add_argument(
        "--to",
        choices=OPTIMIZER_KINDS,
        help="target optimizer; a final w means decoupled weight decay; folders support adax, adaxw, adam and adamw",
    )
    parser.add_argument("--key", help="key of the optimizer's state dict in the file, or of a list of them")
    parser.add_argument(
        "--beta2",
        type=float,
        help="betas[1] of the result, if the rule changes; default: 1e-4 for AdaX, 0.999 for Adam",
    )
    parser.add_argument("--lr", type=float, help="learning rate of all groups; default: keep them")
    parser.add_argument("--states", choices=STATES, help="new precision of the states (files only)")
    parser.add_argument(
        "--master-weights", choices=MASTER_WEIGHTS, help="new precision of the masters (only files that have masters)"
    )


def main(arguments: argparse.Namespace) -> int:
    """Convert; print one line to stderr and return 1 on bad input."""
    from adax_triton.bench.harness.progress import progress

    try:
        summary = _convert(arguments, progress)
    except (OSError, TypeError, ValueError) as error:
        print(f"adax-triton convert: {error}", file=sys.stderr)
        return 1
    print(summary)
    return 0


def _convert(arguments: argparse.Namespace, progress: Progress) -> str:
    source, target = arguments.source, arguments.target
    if target.exists():
        raise ValueError(f"{target} exists already; choose a new path")
    if source.is_file():
        if not (arguments.to or arguments.states or arguments.master_weights):
            raise ValueError("nothing to convert to; give --to, --states or --master-weights")
        convert = functools.partial(_convert_state_dict, arguments=arguments)
        return convert_file(source, target, arguments.key, convert, progress)
    if not source.is_dir():
        raise ValueError(f"{source} is neither a file nor a folder")
    if (source / ".metadata").is_file():
        raise ValueError(
            f"{source} is a checkpoint of torch.distributed.checkpoint; make a file of it with dcp_to_torch_save of "
            "torch.distributed.checkpoint.format_utils, convert the file, and make a folder with torch_save_to_dcp"
        )
    for option in ("key", "states", "master_weights"):
        if getattr(arguments, option) is not None:
            name = f"--{option.replace('_', '-')}"
            raise ValueError(f"{name} is for files; for DeepSpeed set the precision in its configuration")
    from adax_triton.integrations.deepspeed.checkpoints.offline import convert_folder

    return convert_folder(source, target, arguments.to, arguments.beta2, arguments.lr, progress)


def _convert_state_dict(state_dict: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.to is not None:
        state_dict = convert_optimizer(state_dict, arguments.to, beta2=arguments.beta2, lr=arguments.lr)
    if arguments.states is not None or arguments.master_weights is not None:
        state_dict = convert_precision(state_dict, states=arguments.states, master_weights=arguments.master_weights)
    return state_dict
