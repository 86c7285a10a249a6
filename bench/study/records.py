"""The file of a study: one line of JSON per run.

A line without a run has the environment of the runs after it.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .run import Run

# Runs of one file share these keys of their environment. Another text or device gives other losses.
SHARED = ("torch", "device", "text")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, one per run.

    A last line that a killed process did not finish is ignored.
    """
    found = {run_of(line): line for line in _lines(path) if "environment" not in line}
    return list(found.values())


def environments(path: Path) -> list[dict[str, Any]]:
    """Return the environments of a file, one per start."""
    return [line["environment"] for line in _lines(path) if "environment" in line]


def run_of(record: dict[str, Any]) -> Run:
    """Return the run that a record describes."""
    return Run(**{name: record[name] for name in Run._fields})


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


class Writer:
    """Appends records to an open file.

    Args:
        file: opened for appending, in binary mode.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def append(self, record: dict[str, Any]) -> None:
        """Append a line, which a kill of this process does not lose."""
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()


@contextmanager
def writer(path: Path, environment: dict[str, Any]) -> Iterator[Writer]:
    """Open a file for appending and write the environment.

    Args:
        path: created with its folders.
        environment: of the runs that follow.

    Raises:
        ValueError: the file has runs of an environment that differs in `SHARED`, or another process writes it.
    """
    for earlier in environments(path):
        for key in SHARED:
            if earlier.get(key) != environment.get(key):
                raise ValueError(
                    f"{path} has runs with {key}={earlier.get(key)!r}, but this is {key}={environment.get(key)!r}; "
                    "pass another --out"
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process writes {path}; wait for it, or pass another --out") from error
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        found = Writer(file)
        found.append({"environment": environment})
        yield found
