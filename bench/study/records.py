"""The file of a study: one line of JSON per run.

A line without a run has the environment of the runs after it.
"""

from __future__ import annotations

import fcntl
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from .run import Run

# Runs of one file share these keys of their environment. Another text or device gives other losses.
SHARED = ("torch", "device", "text")


class Contents(NamedTuple):
    """Records by run, and the environments of all starts."""

    records: dict[Run, dict[str, Any]]
    starts: list[dict[str, Any]]


def read(path: Path) -> Contents:
    """Return the contents of a file; a missing file is empty.

    A last line that a killed process did not finish is ignored.
    """
    return _parse(path.read_bytes() if path.exists() else b"")


def run_of(record: dict[str, Any]) -> Run:
    """Return the run that a record describes."""
    return Run(**{name: record[name] for name in Run._fields})


def _parse(content: bytes) -> Contents:
    lines = [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
    starts = [line["environment"] for line in lines if "environment" in line]
    return Contents({run_of(line): line for line in lines if "environment" not in line}, starts)


class Writer:
    """Appends records to an open file.

    Args:
        file: opened for appending, in binary mode.
        records: of the file, by run; `append` adds to them.
    """

    def __init__(self, file: IO[bytes], records: dict[Run, dict[str, Any]]) -> None:
        self._file, self.records = file, records

    def append(self, record: dict[str, Any]) -> None:
        """Append the record of a run, which a kill of this process does not lose."""
        self._write(record)
        self.records[run_of(record)] = record

    def start(self, environment: dict[str, Any]) -> None:
        """Append the environment of the runs that follow."""
        self._write({"environment": environment})

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
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
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process writes {path}; wait for it, or pass another --out") from error
        file.seek(0)
        content = file.read()
        earlier, starts = _parse(content)
        for start, key in itertools.product(starts, SHARED):
            if start.get(key) != environment.get(key):
                raise ValueError(
                    f"{path} has runs with {key}={start.get(key)!r}, but this is {key}={environment.get(key)!r}; "
                    "pass another --out"
                )
        file.truncate(content.rfind(b"\n") + 1)
        found = Writer(file, earlier)
        found.start(environment)
        yield found
