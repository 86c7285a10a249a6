"""Folders of DeepSpeed checkpoints that are whole or not there, whatever kills a process while one is written.

DeepSpeed writes into the folder of the tag itself, over what may be there, and rank 0 lets `latest` name it before the
other ranks have finished. Here a checkpoint of tag T is written beside it, as T.saving. When every rank has finished,
all is flushed to the disk, `complete.json` lists its files and their sizes, the folder gets its name, and only then
`latest` changes, by one rename. A checkpoint that had the tag is kept, as T.replaced, until the new one has it.

A folder without a list was written by another program; whether it is whole is not known.
"""

import functools
import json
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from adax_triton.moment_optimizer import MomentOptimizer

from .deepspeed_universal import Method

LIST = "complete.json"
_SAVING, _REPLACED = ".saving", ".replaced"
_FLUSHES_AT_ONCE = 8


def save_whole(original: Method) -> Method:
    """Wrap `DeepSpeedEngine.save_checkpoint`."""

    @functools.wraps(original)
    def save_checkpoint(
        self: Any,
        save_dir: str,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        client_state = client_state or {}
        if not isinstance(self.basic_optimizer, MomentOptimizer):
            return original(self, save_dir, tag, client_state, save_latest, exclude_frozen_parameters)
        if self.checkpoint_engine.is_decoupled():
            warnings.warn(
                f"{type(self.checkpoint_engine).__name__} writes checkpoints after save_checkpoint has returned: one "
                "that a crash cuts short is not told from a whole one",
                stacklevel=2,
            )
            return original(self, save_dir, tag, client_state, save_latest, exclude_frozen_parameters)
        tag = str(f"global_step{self.global_steps}" if tag is None else tag)
        first = (self.local_rank if self.use_node_local_storage() else self.global_rank) == 0
        if first and save_dir:
            begin(save_dir, tag)
        # The others wait for the first rank before they write, and all for each other when they have written.
        saved = original(self, save_dir, tag + _SAVING, client_state, False, exclude_frozen_parameters)
        if first:
            publish(save_dir, tag, save_latest)
        torch.distributed.barrier()
        return saved

    return save_checkpoint


def complete_tag(engine: Any, load_dir: str, tag: str | None) -> str | None:
    """Return the folder to load, the same on every rank, or the tag where DeepSpeed itself says that there is none.

    Args:
        engine: that is to load it.
        load_dir: the folder of checkpoints.
        tag: the checkpoint's, or None for the one that `latest` names, else the last one that is complete.

    Raises:
        ValueError: the checkpoint is not complete, or not on every rank.
    """
    if engine.load_universal_checkpoint():
        return tag
    found: tuple[str | None, str | None] | ValueError
    try:
        found = folder_to_load(load_dir, None if tag is None else str(tag))
    except ValueError as error:  # the other ranks are to raise it, too
        found = error
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, found)
    for other in everywhere:
        if isinstance(other, ValueError):
            raise other
    folders = {str(folder) for folder, _ in everywhere}
    if len(folders) > 1:
        raise ValueError(f"{load_dir}: ranks find different complete checkpoints, {sorted(folders)}; pass a tag")
    folder, warning = everywhere[torch.distributed.get_rank()]
    if warning is not None:
        warnings.warn(warning, stacklevel=3)
    return folder


def begin(save_dir: str, tag: str) -> None:
    """Clear the folder to write into of what a process that died has left.

    Args:
        save_dir: the folder of checkpoints.
        tag: the checkpoint's.
    """
    if is_complete(os.path.join(save_dir, tag + _SAVING)):
        _give_name(Path(save_dir), tag)  # died between its list and its name
    _remove(Path(save_dir, tag + _SAVING))


def publish(save_dir: str, tag: str, as_latest: bool) -> None:
    """Give a checkpoint that is written whole its list and its name.

    Args:
        save_dir: the folder of checkpoints.
        tag: as it was given to `begin`.
        as_latest: whether `latest` is to name it.
    """
    list_files(os.path.join(save_dir, tag + _SAVING))
    _give_name(Path(save_dir), tag)
    if as_latest:
        write_flushed(os.path.join(save_dir, "latest"), tag)
    _remove(Path(save_dir, tag + _REPLACED))


def list_files(folder: str) -> None:
    """Flush all files in a folder to the disk, then write their list, which makes it complete."""
    inside = sorted(path for path in Path(folder).rglob("*") if path.name != LIST)
    with ThreadPoolExecutor(_FLUSHES_AT_ONCE) as pool:  # each waits for the disk
        list(pool.map(_flush, [*inside, Path(folder)]))
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in inside if path.is_file()}
    write_flushed(os.path.join(folder, LIST), json.dumps({"saved": time.time(), "files": sizes}, indent=1))


def write_flushed(path: str, text: str) -> None:
    """Write a small file such that it has its old or its new contents, whenever the process or the machine stops."""
    part = Path(f"{path}.part")
    part.write_text(text)
    _flush(part)
    os.replace(part, path)
    _flush(Path(path).parent)


def is_complete(folder: str) -> bool:
    """Whether a folder has a list, and every file of the list in its size."""
    sizes = _read_list(folder).get("files")
    return sizes is not None and all(_size(os.path.join(folder, name)) == size for name, size in sizes.items())


def folder_to_load(load_dir: str, tag: str | None) -> tuple[str | None, str | None]:
    """Return the name of the folder to load, and a warning if it is not the one asked for.

    Args:
        load_dir: the folder of checkpoints.
        tag: the checkpoint's, or None for the one that `latest` names, else the last one that is complete.

    Returns:
        Twice None where there is no `latest` to say that anything was saved.

    Raises:
        ValueError: the tag's folder is not complete; or, without a tag, none is.
    """
    latest = Path(load_dir, "latest")
    if tag is None and not latest.is_file():
        return None, None
    wanted = latest.read_text().strip() if tag is None else tag
    found = _complete_folder(load_dir, wanted)
    if found == wanted:
        return found, None
    problem = f"{os.path.join(load_dir, wanted)} is not a complete checkpoint"
    if found is None:
        complete = _complete_folders(load_dir)
        if tag is not None or not complete:
            raise ValueError(f"{problem}; complete are: {', '.join(complete) or 'none'}")
        found = complete[0]
    return found, f"{problem}; loading {found!r} instead"


def _complete_folders(load_dir: str) -> list[str]:
    """Return the names of the folders that are complete, the one saved last first."""
    names = os.listdir(load_dir) if os.path.isdir(load_dir) else []
    folders = {name: os.path.join(load_dir, name) for name in names}
    complete = {name: _read_list(folder) for name, folder in folders.items() if is_complete(folder)}
    return sorted(complete, key=lambda name: complete[name]["saved"], reverse=True)


def _give_name(save_dir: Path, tag: str) -> None:
    target = save_dir / tag
    if target.exists():
        _remove(save_dir / (tag + _REPLACED))
        target.rename(save_dir / (tag + _REPLACED))
    (save_dir / (tag + _SAVING)).rename(target)
    _flush(target.parent)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _complete_folder(load_dir: str, tag: str) -> str | None:
    folder = os.path.join(load_dir, tag)
    if tag and os.path.isdir(folder):
        unknown = not tag.endswith((_SAVING, _REPLACED)) and not os.path.exists(os.path.join(folder, LIST))
        return tag if unknown or is_complete(folder) else None
    # Only a process that died between two renames leaves neither under the tag.
    names = (tag + _SAVING, tag + _REPLACED)
    return next((name for name in names if is_complete(os.path.join(load_dir, name))), None)


def _read_list(folder: str) -> dict[str, Any]:
    try:
        return dict(json.loads(Path(folder, LIST).read_text()))
    except (OSError, ValueError):
        return {}


def _size(path: str) -> int | None:
    return os.path.getsize(path) if os.path.isfile(path) else None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
