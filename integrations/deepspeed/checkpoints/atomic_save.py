"""Atomic DeepSpeed checkpoints: write, fsync, rename.

DeepSpeed overwrites the folder of the tag in place, and rank 0 updates `latest` before the other ranks have finished.
Here a checkpoint of tag T is saved in five steps:

1. every rank writes its files to the folder T.saving;
2. rank 0 flushes all files to the disk, and lists them with their sizes in `complete.json`;
3. a previous folder T is renamed to T.replaced, and T.saving to T;
4. `latest` is replaced;
5. T.replaced is removed.

Some file systems cannot rename a folder. There a checkpoint is written in place, and its `complete.json` is empty until
all files are written. A folder without `complete.json` was written by another program and is loaded unchecked.
"""

import contextlib
import errno
import functools
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from adax_triton.moment_optimizer import MomentOptimizer

from .rank_errors import Gather, raise_on_every_rank

MANIFEST = "complete.json"
_SAVING, _REPLACED = ".saving", ".replaced"
_FLUSHES_AT_ONCE = 8
# errno values that mean "not supported". A full or broken disk has other errno values.
_NO_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}
_NO_RENAME = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EMFILE, errno.EXDEV}


def save_atomically(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace `DeepSpeedEngine.save_checkpoint`."""

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
                f"{type(self.checkpoint_engine).__name__} writes checkpoints after save_checkpoint has returned. "
                "If a crash interrupts the save, load_checkpoint does not detect it; for atomic checkpoints use "
                "DeepSpeed's default checkpoint engine",
                stacklevel=2,
            )
            return original(self, save_dir, tag, client_state, save_latest, exclude_frozen_parameters)
        tag = str(f"global_step{self.global_steps}" if tag is None else tag)
        return _save(
            self,
            save_dir,
            tag,
            save_latest,
            lambda folder: original(self, save_dir, folder, client_state, False, exclude_frozen_parameters),
        )

    return save_checkpoint


def _save(engine: Any, save_dir: str, tag: str, as_latest: bool, write: Callable[[str], Any]) -> Any:
    """Publish a checkpoint once every rank has written it.

    Otherwise raises on every rank.

    Args:
        engine: the DeepSpeed engine that saves.
        save_dir: the folder of checkpoints. DeepSpeed raises for an empty name.
        tag: the name of the checkpoint.
        as_latest: whether to update `latest`.
        write: function of a folder name in `save_dir`; writes this rank's files there and waits for the other ranks.
    """
    rank = engine.local_rank if engine.use_node_local_storage() else engine.global_rank
    is_rank_0 = bool(save_dir) and rank == 0
    try:
        with raise_on_every_rank(engine, writes_to=save_dir) as gather:
            per_rank = gather((tag, prepare_staging(save_dir, tag) if is_rank_0 else True))
            if len(tags := {given for given, _ in per_rank}) > 1:
                raise ValueError(f"tag differs between ranks: {sorted(tags)}; pass the same tag on every rank")
            in_place = not all(can_rename for _, can_rename in per_rank)
            if in_place:
                if is_rank_0:
                    prepare_in_place(save_dir, tag)
                gather()  # before any rank writes
            saved = write(tag if in_place else tag + _SAVING)
            if is_rank_0:
                publish(save_dir, tag, as_latest, in_place)
    except Exception:
        if is_rank_0:
            _discard(Path(save_dir, tag + _SAVING))
        raise
    return saved


def checkpoint_to_load(engine: Any, load_dir: str, tag: str | None, gather: Gather) -> str | None:
    """Return the folder to load, the same on every rank.

    Returns None if there is no `latest`. For a universal checkpoint it returns `tag` itself, and DeepSpeed looks for
    the folder.

    Args:
        engine: the DeepSpeed engine that loads.
        load_dir: the folder of checkpoints.
        tag: the name of the checkpoint. None: the one that `latest` names, else the newest complete one.
        gather: from `raise_on_every_rank`.

    Raises:
        OSError: this rank cannot read the checkpoint.
        ValueError: the checkpoint is incomplete, or ranks find different ones.
    """
    if engine.load_universal_checkpoint():
        return tag
    per_rank = gather(folder_to_load(load_dir, None if tag is None else str(tag)))
    folders = {str(folder) for folder, _ in per_rank}
    if len(folders) > 1:
        raise ValueError(f"{load_dir}: ranks find different complete checkpoints, {sorted(folders)}; pass a tag")
    folder, warning = per_rank[torch.distributed.get_rank()]
    if folder is not None:
        _check_readable(os.path.join(load_dir, folder))
    if warning is not None:
        warnings.warn(warning, stacklevel=3)
    return folder


def prepare_staging(save_dir: str, tag: str) -> bool:
    """Create an empty staging folder and test whether folders can be renamed.

    Args:
        save_dir: the folder of checkpoints.
        tag: the name of the checkpoint.

    Returns:
        True if folders can be renamed. Otherwise warns and returns False; then call `prepare_in_place`.
    """
    staged = Path(save_dir, tag + _SAVING)
    if is_complete(str(staged)):
        _rename_to_tag(Path(save_dir), tag)  # the process died between complete.json and the rename
    _remove(staged)
    trial = staged / "trial"
    trial.mkdir(parents=True)
    (trial / "file").write_text("trial")  # because gcsfuse renames only empty folders
    try:
        trial.rename(staged / "renamed")
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        warnings.warn(
            f"{save_dir} cannot rename folders ({error.strerror}): checkpoints are written in place, and an "
            "interrupted save loses the previous checkpoint of its tag",
            stacklevel=3,
        )
        shutil.rmtree(staged, ignore_errors=True)  # this file system may not remove it either
        return False
    _remove(staged / "renamed")
    return True


def prepare_in_place(save_dir: str, tag: str) -> None:
    """Empty the folder of a tag, except for an empty `complete.json`.

    An empty `complete.json` means that the checkpoint is incomplete.
    """
    folder = Path(save_dir, tag)
    folder.mkdir(exist_ok=True)
    replace_file(str(folder / MANIFEST), "{}")
    for path in folder.iterdir():
        if path.name != MANIFEST:
            _remove(path)


def publish(save_dir: str, tag: str, as_latest: bool, in_place: bool = False) -> None:
    """Write `complete.json`, rename the folder to the tag, and update `latest`.

    Call it on one rank, after all ranks have written their files.

    Args:
        save_dir: the folder of checkpoints.
        tag: the name of the checkpoint.
        as_latest: whether to update `latest`.
        in_place: whether the files are already in the folder of the tag. Default: False.
    """
    write_manifest(os.path.join(save_dir, tag if in_place else tag + _SAVING))
    if not in_place:
        _rename_to_tag(Path(save_dir), tag)
    if as_latest:
        replace_file(os.path.join(save_dir, "latest"), tag)
    _remove(Path(save_dir, tag + _REPLACED))


def write_manifest(folder: str) -> None:
    """Flush a folder's files to the disk, then list them in `complete.json`."""
    inside = sorted(path for path in Path(folder).rglob("*") if not path.name.startswith(MANIFEST))
    with ThreadPoolExecutor(_FLUSHES_AT_ONCE) as pool:  # each flush waits for the disk
        list(pool.map(_flush, [*inside, Path(folder)]))
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in inside if path.is_file()}
    replace_file(os.path.join(folder, MANIFEST), json.dumps({"saved": time.time(), "files": sizes}, indent=1))


def replace_file(path: str, text: str) -> None:
    """Replace a small file by a rename and flush it.

    Writes over the file where renaming is not possible.
    """
    part = Path(f"{path}.part")
    part.write_text(text)
    _flush(part)
    try:
        os.replace(part, path)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        Path(path).write_text(text)
        _flush(Path(path))
        with contextlib.suppress(OSError):
            part.unlink()
    _flush(Path(path).parent)


def is_complete(folder: str) -> bool:
    """Return whether a folder has all files of its `complete.json`.

    The sizes must match, too.
    """
    sizes = _manifest(folder).get("files")
    return sizes is not None and all(_size(os.path.join(folder, name)) == size for name, size in sizes.items())


def folder_to_load(load_dir: str, tag: str | None) -> tuple[str | None, str | None]:
    """Return the folder name to load, and a warning or None.

    Args:
        load_dir: the folder of checkpoints.
        tag: the name of the checkpoint. None: the one that `latest` names, else the newest complete one.

    Returns:
        (None, None) if no tag is given and there is no `latest`. The warning says that the folder in `latest` is
        incomplete, and which folder is loaded instead.

    Raises:
        ValueError: the folder of the tag is incomplete, or no folder is complete.
    """
    latest = Path(load_dir, "latest")
    if tag is None and not latest.is_file():
        return None, None
    wanted = latest.read_text().strip() if tag is None else tag
    found = _find_complete(load_dir, wanted)
    if found == wanted:
        return found, None
    problem = f"{os.path.join(load_dir, wanted)} is not a complete checkpoint"
    if found is None:
        complete = _all_complete(load_dir)
        if tag is not None or not complete:
            raise ValueError(f"{problem}; complete checkpoints: {', '.join(complete) or 'none'}")
        found = complete[0]
    return found, f"{problem}; loading {found!r} instead"


def _all_complete(load_dir: str) -> list[str]:
    """Return the names of the complete folders, newest first."""
    names = os.listdir(load_dir) if os.path.isdir(load_dir) else []
    folders = {name: os.path.join(load_dir, name) for name in names}
    listed = {name: folder for name, folder in folders.items() if os.path.isfile(os.path.join(folder, MANIFEST))}
    complete = {name: _manifest(folder) for name, folder in listed.items() if is_complete(folder)}
    return sorted(complete, key=lambda name: complete[name]["saved"], reverse=True)


def _rename_to_tag(save_dir: Path, tag: str) -> None:
    target = save_dir / tag
    if target.exists():
        _remove(save_dir / (tag + _REPLACED))
        target.rename(save_dir / (tag + _REPLACED))
    (save_dir / (tag + _SAVING)).rename(target)
    _flush(target.parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _discard(staged: Path) -> None:
    """Remove the files of a failed save.

    They may have filled the disk.
    """
    with contextlib.suppress(OSError):  # the save has raised its own error
        if not is_complete(str(staged)):
            _remove(staged)


def _check_readable(folder: str) -> None:
    for name in _manifest(folder).get("files", {}):
        if not os.access(path := os.path.join(folder, name), os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


def _find_complete(load_dir: str, tag: str) -> str | None:
    folder = os.path.join(load_dir, tag)
    if tag and os.path.isdir(folder):
        has_no_manifest = not tag.endswith((_SAVING, _REPLACED)) and not os.path.exists(os.path.join(folder, MANIFEST))
        return tag if has_no_manifest or is_complete(folder) else None
    # A process that dies between the two renames leaves no folder of the tag, only these.
    names = (tag + _SAVING, tag + _REPLACED)
    return next((name for name in names if is_complete(os.path.join(load_dir, name))), None)


def _manifest(folder: str) -> dict[str, Any]:
    try:
        return dict(json.loads(Path(folder, MANIFEST).read_text()))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}


def _size(path: str) -> int | None:
    return os.path.getsize(path) if os.path.isfile(path) else None


def _flush(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
        warnings.warn(
            f"the file system of the checkpoints does not support fsync ({error.strerror}): a checkpoint survives a "
            "killed process, but a power failure may damage it",
            stacklevel=1,
        )
