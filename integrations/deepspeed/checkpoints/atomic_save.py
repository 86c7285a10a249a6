"""Atomic DeepSpeed checkpoints: write, fsync, rename.

DeepSpeed writes into the folder of the tag itself, over its old files, and rank 0 lets `latest` name it before the
other ranks have finished. Here a checkpoint of tag T is written as T.saving. When every rank has finished, all files
are flushed to the disk, `complete.json` lists them and their sizes, the folder gets its name, and only then `latest`
changes, by one rename. The previous checkpoint of the tag is kept, as T.replaced, until the new one has its name.

Some file systems cannot rename a folder. There a checkpoint is written in place: its `complete.json` lists nothing
until all files are written. A folder without a list was written by another program and is loaded unchecked.
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

from .failures import Meet, failing_together
from .universal import Method

LIST = "complete.json"
_SAVING, _REPLACED = ".saving", ".replaced"
_FLUSHES_AT_ONCE = 8
# What file systems answer to an operation that they do not have; a full or broken disk answers otherwise.
_NO_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}
_NO_RENAME = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EMFILE, errno.EXDEV}


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
        return _save(
            self,
            save_dir,
            tag,
            save_latest,
            lambda folder: original(self, save_dir, folder, client_state, False, exclude_frozen_parameters),
        )

    return save_checkpoint


def _save(engine: Any, save_dir: str, tag: str, as_latest: bool, write: Callable[[str], Any]) -> Any:
    """Publish a checkpoint that every rank has written, or raise on every rank.

    Args:
        engine: the DeepSpeed engine that saves.
        save_dir: the folder of checkpoints. DeepSpeed refuses an empty name.
        tag: the checkpoint's.
        as_latest: whether `latest` is to name it.
        write: given the name of a folder in `save_dir`, writes the files of this rank and waits for the other ranks.
    """
    first = bool(save_dir) and (engine.local_rank if engine.use_node_local_storage() else engine.global_rank) == 0
    try:
        with failing_together(engine, writes_to=save_dir) as meet:
            in_place = not all(meet(begin(save_dir, tag) if first else True))
            if in_place:
                if first:
                    begin_in_place(save_dir, tag)
                meet()  # before any rank writes
            saved = write(tag if in_place else tag + _SAVING)
            if first:
                publish(save_dir, tag, as_latest, in_place)
    except Exception:
        if first:
            _discard(Path(save_dir, tag + _SAVING))
        raise
    return saved


def complete_tag(engine: Any, load_dir: str, tag: str | None, meet: Meet) -> str | None:
    """Return the folder to load, the same on every rank, or the tag if DeepSpeed is to search.

    Args:
        engine: the DeepSpeed engine that loads.
        load_dir: the folder of checkpoints.
        tag: the checkpoint's, or None for the one that `latest` names, else the last one that is complete.
        meet: from `failing_together`.

    Raises:
        OSError: this rank cannot read the checkpoint.
        ValueError: the checkpoint is not complete, or not the same on every rank.
    """
    if engine.load_universal_checkpoint():
        return tag
    everywhere = meet(folder_to_load(load_dir, None if tag is None else str(tag)))
    folders = {str(folder) for folder, _ in everywhere}
    if len(folders) > 1:
        raise ValueError(f"{load_dir}: ranks find different complete checkpoints, {sorted(folders)}; pass a tag")
    folder, warning = everywhere[torch.distributed.get_rank()]
    if folder is not None:
        _refuse_unreadable(os.path.join(load_dir, folder))
    if warning is not None:
        warnings.warn(warning, stacklevel=3)
    return folder


def begin(save_dir: str, tag: str) -> bool:
    """Create an empty folder to write into, and try whether folders can be renamed.

    Args:
        save_dir: the folder of checkpoints.
        tag: the checkpoint's.

    Returns:
        Whether they can. If not, a warning says so, and `begin_in_place` comes next.
    """
    staged = Path(save_dir, tag + _SAVING)
    if is_complete(str(staged)):
        _give_name(Path(save_dir), tag)  # the process died between its list and its name
    _remove(staged)
    trial = staged / "trial"
    trial.mkdir(parents=True)
    (trial / "file").write_text("gcsfuse renames empty folders only")
    try:
        trial.rename(staged / "renamed")
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        warnings.warn(
            f"{save_dir} cannot rename folders ({error.strerror}): checkpoints are written in place, and a save that "
            "is cut short loses the previous checkpoint of its tag",
            stacklevel=3,
        )
        shutil.rmtree(staged, ignore_errors=True)  # may be refused as well
        return False
    _remove(staged / "renamed")
    return True


def begin_in_place(save_dir: str, tag: str) -> None:
    """Empty the folder of a tag except for a list that says it is not complete."""
    folder = Path(save_dir, tag)
    folder.mkdir(exist_ok=True)
    write_flushed(str(folder / LIST), "{}")
    for path in folder.iterdir():
        if path.name != LIST:
            _remove(path)


def publish(save_dir: str, tag: str, as_latest: bool, in_place: bool = False) -> None:
    """Give a checkpoint that is written whole its list and its name.

    Args:
        save_dir: the folder of checkpoints.
        tag: as it was given to `begin`.
        as_latest: whether `latest` is to name it.
        in_place: whether it was written into the folder of its tag. Default: False.
    """
    list_files(os.path.join(save_dir, tag if in_place else tag + _SAVING))
    if not in_place:
        _give_name(Path(save_dir), tag)
    if as_latest:
        write_flushed(os.path.join(save_dir, "latest"), tag)
    _remove(Path(save_dir, tag + _REPLACED))


def list_files(folder: str) -> None:
    """Flush all files in a folder to the disk, then write their list, which makes it complete."""
    inside = sorted(path for path in Path(folder).rglob("*") if not path.name.startswith(LIST))
    with ThreadPoolExecutor(_FLUSHES_AT_ONCE) as pool:  # each waits for the disk
        list(pool.map(_flush, [*inside, Path(folder)]))
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in inside if path.is_file()}
    write_flushed(os.path.join(folder, LIST), json.dumps({"saved": time.time(), "files": sizes}, indent=1))


def write_flushed(path: str, text: str) -> None:
    """Replace a small file by one rename, or write over it if the file system has none."""
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
    listed = {name: folder for name, folder in folders.items() if os.path.isfile(os.path.join(folder, LIST))}
    complete = {name: _read_list(folder) for name, folder in listed.items() if is_complete(folder)}
    return sorted(complete, key=lambda name: complete[name]["saved"], reverse=True)


def _give_name(save_dir: Path, tag: str) -> None:
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
    """Remove what a failed save has left, which may have filled the disk."""
    with contextlib.suppress(OSError):  # the save has raised its own error
        if not is_complete(str(staged)):
            _remove(staged)


def _refuse_unreadable(folder: str) -> None:
    for name in _read_list(folder).get("files", {}):
        if not os.access(path := os.path.join(folder, name), os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


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
            f"the file system of the checkpoints refuses fsync ({error.strerror}): a checkpoint is complete after a "
            "process was killed, but may not be after a power failure",
            stacklevel=1,
        )
