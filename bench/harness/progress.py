"""Progress bars on standard error."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[int, str], None]]:
    """Show a progress bar, or nothing where tqdm is not installed.

    Yields `advance(count, text)`, which counts more units as done and shows the current task.
    """
    if importlib.util.find_spec("tqdm") is None:
        yield lambda count, text: None
        return
    from tqdm import tqdm

    # A log gets a line every 10 seconds.
    interval_s = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(total=total, desc=label, dynamic_ncols=True, mininterval=interval_s) as bar:

        def advance(count: int, text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update(count)

        yield advance
