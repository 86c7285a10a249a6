"""Progress of a benchmark, on standard error."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[int, str], None]]:
    """Show how far something is: a bar of tqdm, or a line where tqdm is not installed; in a log, every 10 seconds.

    Args:
        total: units of work.
        label: what is done.

    Yields:
        A function of how many more units are done, and of what is done now.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        yield _Line(total, label).advance
        print(file=sys.stderr)
        return
    with tqdm(total=total, desc=label, dynamic_ncols=True, mininterval=_interval_s()) as bar:

        def advance(count: int, now: str) -> None:
            bar.set_postfix_str(now, refresh=False)
            bar.update(count)

        yield advance


def _interval_s() -> float:
    return 0.2 if sys.stderr.isatty() else 10.0


class _Line:
    def __init__(self, total: int, label: str) -> None:
        self.done, self.total, self.label, self._next_s = 0, total, label, 0.0

    def advance(self, count: int, now: str) -> None:
        self.done += count
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + _interval_s()
        print(f"\r{self.label}: {self.done}/{self.total}, {now} ", end="", file=sys.stderr, flush=True)
