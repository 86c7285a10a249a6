"""An error on one rank of a DeepSpeed save or load is raised on every rank, instead of leaving the others waiting."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch

_FULL_BELOW_BYTES = 2**20
_KINDS = (ValueError, TypeError, AssertionError, RuntimeError)

Meet = Callable[..., list[Any]]


@contextlib.contextmanager
def failing_together(engine: Any, writes_to: str | None = None) -> Iterator[Meet]:
    """Raise on every rank what one rank raises in the block.

    The ranks meet at the end of the block, in the calls of the function that is yielded, and before each collective of
    DeepSpeed's save and load that a rank could miss because of an error. A rank that fails goes to the next meeting.

    Args:
        engine: the DeepSpeed engine that saves or loads in the block.
        writes_to: the folder that the block writes to. Default: None, it only reads.

    Yields:
        Function of a small value: returns the values of all ranks.

    Raises:
        OSError, ValueError, TypeError, AssertionError, RuntimeError: the error of the first rank that failed, with its
            number; another type is raised as RuntimeError.
    """
    shared: list[Exception] = []

    def meet(value: Any = None, error: Exception | None = None) -> list[Any]:
        everywhere: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(
            everywhere, (value, None if error is None else _of_this_rank(error, writes_to))
        )
        shared.extend(found for _, found in everywhere if found is not None)
        if shared:
            raise shared[0] from error
        return [value for value, _ in everywhere]

    with contextlib.ExitStack() as restoring:
        for owner, name in _before_collectives(engine):
            restoring.callback(_call_before(meet, owner, name))
        try:
            yield meet
        except Exception as error:
            if not shared:
                meet(error=error)
            raise
        meet()


def _of_this_rank(error: Exception, writes_to: str | None) -> Exception:
    """Return an error that other ranks can unpickle and that names this one."""
    rank = f"rank {torch.distributed.get_rank()}"
    if isinstance(error, RuntimeError) and writes_to and _is_full(writes_to):  # torch.save does not say why it failed
        return OSError(errno.ENOSPC, f"{rank}: {os.strerror(errno.ENOSPC)}", writes_to)
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, f"{rank}: {error.strerror}", error.filename)
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)
    return kind(f"{rank}: {error}" if type(error) is kind else f"{rank}: {type(error).__name__}: {error}")


def _is_full(folder: str) -> bool:
    try:
        return shutil.disk_usage(folder).free < _FULL_BELOW_BYTES
    except OSError:
        return False


def _before_collectives(engine: Any) -> list[tuple[Any, str]]:
    """Return (owner, method name) of what DeepSpeed calls on every rank or, after an error, is to call on none."""
    methods = (
        (engine.optimizer, "checkpoint_event_prologue"),  # partitions small weights at ZeRO 3
        (engine, "load_module_state_dict"),  # gathers and broadcasts weights at ZeRO 3
        (engine.checkpoint_engine, "commit"),  # before the last barrier of a save
        (engine.optimizer, "checkpoint_event_epilogue"),  # gathers small weights at ZeRO 3
        (engine.optimizer, "update_lp_params"),  # gathers weights from a universal checkpoint
    )
    return [(owner, name) for owner, name in methods if hasattr(owner, name)]


def _call_before(meet: Meet, owner: Any, name: str) -> Callable[[], None]:
    """Have `meet` called before a method of one object; return what takes that back."""
    original = getattr(owner, name)
    replaced = vars(owner).get(name)
    setattr(owner, name, lambda *args, **named: (meet(), original(*args, **named))[1])
    return lambda: delattr(owner, name) if replaced is None else setattr(owner, name, replaced)
