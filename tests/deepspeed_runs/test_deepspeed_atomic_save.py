"""A save killed before any file operation leaves a complete checkpoint.

The folder must have the old or the new checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from adax_triton.integrations.deepspeed.checkpoints.atomic_save import (
    folder_to_load,
    prepare_in_place,
    prepare_staging,
    publish,
)

FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"}


def save(folder: Path, tag: str, contents: str) -> None:
    in_place = not prepare_staging(str(folder), tag)
    if in_place:
        prepare_in_place(str(folder), tag)
    staged = folder / (tag if in_place else f"{tag}.saving")
    (staged / "inner").mkdir()
    for name in ("weights", "inner/states"):
        (staged / name).write_text(contents)
    publish(str(folder), tag, as_latest=True, in_place=in_place)


def contents(folder: Path) -> str:
    """Return the contents of the checkpoint to load, which must be complete."""
    name, _ = folder_to_load(str(folder), None)
    assert name is not None
    (found,) = {(folder / name / file).read_text() for file in ("weights", "inner/states")}
    return found


def contents_or_none(folder: Path) -> str | None:
    try:
        return contents(folder)
    except ValueError as error:
        assert "complete checkpoints: none" in str(error)
        return None


def is_killed(before_operation: int, action: Callable[[], None]) -> bool:
    """Run an action and kill its process before its n-th file operation.

    Return False if the action has fewer operations.
    """
    pid = os.fork()
    if pid == 0:
        left = before_operation

        def on_event(event: str, _: tuple[Any, ...]) -> None:
            nonlocal left
            if event in FILE_EVENTS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(on_event)
            action()
            os._exit(0)
        finally:
            os._exit(1)  # must not return to pytest
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def found_after_each_kill(
    folder: Path, tag: str, read: Callable[[Path], Any], expecting: Callable[[], AbstractContextManager[Any]]
) -> list[Any]:
    """Return the folder's contents after each kill and after a full save.

    There is one kill before each operation of a save.
    """
    found = []
    for count in itertools.count():
        place = folder / str(count)
        place.mkdir()
        with expecting():
            save(place, "same", "old")
            killed = is_killed(count, lambda place=place: save(place, tag, "new" * 100))
            found.append(read(place))
            save(place, tag, "newer")
        assert contents(place) == "newer"
        assert {path.name for path in place.iterdir()} == {"same", tag, "latest"}
        if not killed:
            break
    return found


@pytest.mark.parametrize("tag", ["same", "other"])
def test_kill_at_any_operation_leaves_a_complete_checkpoint(tmp_path: Path, tag: str) -> None:
    found = found_after_each_kill(tmp_path, tag, contents, contextlib.nullcontext)
    assert len(found) > 21
    switched = found.index("new" * 100)
    assert found == ["old"] * switched + ["new" * 100] * (len(found) - switched)


@pytest.mark.parametrize("tag", ["same", "other"])
def test_kill_without_rename_leaves_a_complete_checkpoint_or_none(
    tmp_path: Path, tag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, refuse)
    refused = functools.partial(pytest.warns, UserWarning, match=r"cannot rename folders \(Function not implemented\)")
    found = found_after_each_kill(tmp_path, tag, contents_or_none, refused)
    kinds = ["old", "new" * 100] if tag == "other" else ["old", None, "new" * 100]
    assert [kind for kind, _ in itertools.groupby(found)] == kinds


def test_incomplete_folder_raises_if_named_and_is_skipped_otherwise(tmp_path: Path) -> None:
    for tag in ("first", "second"):
        save(tmp_path, tag, tag)
    (tmp_path / "second" / "inner" / "states").write_text("sec")
    name, warning = folder_to_load(str(tmp_path), None)
    assert name == "first"
    assert warning is not None and "second is not a complete checkpoint; loading 'first' instead" in warning
    with pytest.raises(ValueError, match="second is not a complete checkpoint; complete checkpoints: first"):
        folder_to_load(str(tmp_path), "second")
    with pytest.raises(ValueError, match="third is not a complete checkpoint; complete checkpoints: first"):
        folder_to_load(str(tmp_path), "third")
    (tmp_path / "latest").write_text("")
    assert folder_to_load(str(tmp_path), None)[0] == "first"
    (tmp_path / "first" / "weights").unlink()
    with pytest.raises(ValueError, match="is not a complete checkpoint; complete checkpoints: none"):
        folder_to_load(str(tmp_path), None)


def test_folder_of_another_program_is_loaded_unchecked(tmp_path: Path) -> None:
    assert folder_to_load(str(tmp_path), None) == (None, None)
    for tag in ("theirs", "theirs.saving"):
        (tmp_path / tag).mkdir()
    (tmp_path / "latest").write_text("theirs\n")
    assert folder_to_load(str(tmp_path), None) == ("theirs", None)
    assert folder_to_load(str(tmp_path), "theirs") == ("theirs", None)
    with pytest.raises(ValueError, match=r"theirs\.saving is not a complete checkpoint"):
        folder_to_load(str(tmp_path), "theirs.saving")
