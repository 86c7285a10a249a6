"""Delay Ctrl-C until a step is whole."""

from __future__ import annotations

# The functions of `signal` make an enum of each handler, which takes 4 us.
import _signal  # type: ignore[import-not-found]
import threading
from typing import Any


class DelayedInterrupt:
    """Context in which SIGINT is remembered, and handled at its end.

    Python handles signals on the main thread only, so on other threads this does nothing. Nor does it where the program
    ignores SIGINT or has no handler in Python.
    """

    _handler: Any = None
    _remembered: tuple[Any, ...] | None = None

    def __enter__(self) -> None:
        if threading.get_ident() == threading.main_thread().ident:
            handler = _signal.getsignal(_signal.SIGINT)
            if callable(handler):
                self._handler = handler
                _signal.signal(_signal.SIGINT, self._remember)

    def __exit__(self, *error: object) -> None:
        if self._handler is not None:
            _signal.signal(_signal.SIGINT, self._handler)
            if self._remembered is not None:
                self._handler(*self._remembered)

    def _remember(self, *arguments: Any) -> None:
        self._remembered = arguments
