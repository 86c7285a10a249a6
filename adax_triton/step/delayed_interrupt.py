"""Delay Ctrl-C until a step has finished."""

from __future__ import annotations

# `signal` would convert each handler to an enum, which takes 4 us.
import _signal  # type: ignore[import-not-found]
import threading
from typing import Any


class DelayedInterrupt:
    """Context manager that defers SIGINT to the end of its block.

    The context manager does nothing on other threads, because Python handles signals on the main thread. It also does
    nothing if the program ignores SIGINT or has no Python handler.
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
