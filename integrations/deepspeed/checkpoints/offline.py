"""Convert DeepSpeed checkpoints between Adam and AdaX on disk, for `adax-triton convert`."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adax_triton.convert.files import Progress, reject_unsafe_pickles

from .adam_conversion import adax_from_deepspeed_adam, deepspeed_adam_from_adax
from .atomic_save import MANIFEST, folder_to_load, replace_file, write_manifest
from .universal import read_optimizer_file

CONVERTIBLE_KINDS = ("adax", "adaxw", "adam", "adamw")
# Keys of the inner optimizer's state dict in a rank's file: the first at ZeRO 1, 2 and BF16_Optimizer, the second at
# ZeRO 3.
_KEYS = ("base_optimizer_state", "optimizer_state_dict")


def convert_folder(
    source: Path, target: Path, to: str | None, beta2: float | None, lr: float | None, progress: Progress
) -> str:
    """Copy a ZeRO 1, 2 or 3 checkpoint with converted optimizer states.

    The copy has the states that `switching_optimizer` would load, and the source's number of ranks. Only one optimizer
    file at a time is in memory.

    Args:
        source: a checkpoint, or a folder of checkpoints and `latest`.
        target: the folder of checkpoints to create, with this one and `latest`.
        to: one of `CONVERTIBLE_KINDS`; names that end in w have decoupled weight decay.
        beta2: betas[1] of the new rule. Default: None, 1e-4 for AdaX and 0.999 for Adam.
        lr: learning rate of all groups. Default: None, those of the checkpoint.
        progress: called with the number of files and a label. Returns a context manager that yields
            advance(count, file name).

    Returns:
        A sentence for the user: the folder and the number of files.

    Raises:
        ValueError: the checkpoint is of another kind, incomplete, or of an optimizer that cannot be converted. No
            target is left.
    """
    if to not in CONVERTIBLE_KINDS:
        raise ValueError(f"--to {to}: a DeepSpeed checkpoint can be converted to {', '.join(CONVERTIBLE_KINDS)}")
    folder = _checkpoint_folder(source)
    optimizer_files = _optimizer_files(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with progress(len(files), "convert") as advance:
            for path in files:
                written = part / folder.name / path.relative_to(folder)
                written.parent.mkdir(parents=True, exist_ok=True)
                if path in optimizer_files:
                    torch.save(_convert_file(path, to, beta2, lr), written)
                else:
                    shutil.copyfile(path, written)  # a link would change when DeepSpeed overwrites the source
                advance(1, path.name)
        write_manifest(str(part / folder.name))
        if (folder.parent / "zero_to_fp32.py").is_file():
            shutil.copy(folder.parent / "zero_to_fp32.py", part)
        replace_file(str(part / "latest"), folder.name)
        os.rename(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return f"{target / folder.name}: {len(optimizer_files)} optimizer files converted, {len(files)} files in all"


def _checkpoint_folder(source: Path) -> Path:
    """Return the folder of a tag.

    Raises if its `complete.json` says that it is incomplete.
    """
    at_tag = not (source / "latest").is_file()
    folder, tag = (source.absolute().parent, source.absolute().name) if at_tag else (source, None)
    name, warning = folder_to_load(str(folder), tag)
    if name is None or warning is not None:
        raise ValueError(warning or f"{source} has no checkpoint")
    return folder / name


def _optimizer_files(folder: Path) -> set[Path]:
    names = sorted(path.name for path in folder.iterdir())
    if "zero" in names:
        raise ValueError(f"{folder} is a universal checkpoint; convert the checkpoint that it was made from")
    if "offloaded_tensors" in names:
        raise ValueError(
            f"{folder} was saved with optimizer offload to NVMe; convert a checkpoint that was saved without it"
        )
    found = {path for path in folder.iterdir() if path.name.endswith("_optim_states.pt")}
    other = sorted(path.name for path in found if "zero_pp_rank_" not in path.name)
    if not found or other:
        raise ValueError(
            f"{folder} has no optimizer files of ZeRO 1, 2 or 3{'; found ' + other[0] if other else ''} "
            "(for ZeRO 0 in fp32, convert the file of model states with --key optimizer)"
        )
    return found


def _convert_file(path: Path, to: str, beta2: float | None, lr: float | None) -> dict[str, Any]:
    with reject_unsafe_pickles(path):
        saved: dict[str, Any] = read_optimizer_file(str(path))
    zero = saved["optimizer_state_dict"]
    key = next((key for key in _KEYS if key in zero), _KEYS[0])
    if not isinstance(zero.get(key), Mapping) or "param_groups" not in zero[key]:
        raise ValueError(f"{path} is an elastic checkpoint; save it with zero_optimization.elastic_checkpoint=false")
    try:
        zero[key] = _converted_state_dict(zero[key], to, beta2)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path.name}: {error}") from None
    for group in zero[key]["param_groups"]:
        group["decoupled_weight_decay"] = to.endswith("w")
        if lr is not None:
            group["lr"] = lr
    return saved


def _converted_state_dict(state_dict: Mapping[str, Any], to: str, beta2: float | None) -> dict[str, Any]:
    if to.startswith("adax"):
        return adax_from_deepspeed_adam(state_dict, beta2=1e-4 if beta2 is None else beta2)
    if not all("second_moment" in group for group in state_dict["param_groups"]):
        raise ValueError(f"the checkpoint was not saved by adax_triton; --to {to} needs one of AdaX or AdaXW")
    decay = 0.999 if beta2 is None else beta2
    return deepspeed_adam_from_adax(state_dict, [(group["betas"][0], decay) for group in state_dict["param_groups"]])
