"""Raise one rank's save or load error on every rank.

Then no rank hangs.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch

_FULL_BELOW_BYTES = 2**20
_KINDS = (ValueError, TypeError, AssertionError, RuntimeError)

Gather = Callable[..., list[Any]]


@contextlib.contextmanager
def raise_on_every_rank(engine: Any, writes_to: str | None = None) -> Iterator[Gather]:
    """Raise one rank's error in the block on every rank.

    The ranks exchange errors at the end of the block, in each call of the yielded function, and before each DeepSpeed
    collective that a rank could miss after an error. A rank with an error goes straight to the next exchange.

    Args:
        engine: the DeepSpeed engine that saves or loads in the block.
        writes_to: the folder that the block writes to. Default: None, the block only reads.

    Yields:
        gather(value): returns the values of all ranks, in the order of ranks. Values are small and picklable.

    Raises:
        OSError, ValueError, TypeError, AssertionError, RuntimeError: the error of the first rank that failed; the
            message starts with the rank's number. An error of another type becomes a RuntimeError.
    """
    errors: list[Exception] = []

    def gather(value: Any = None, error: Exception | None = None) -> list[Any]:
        per_rank: list[Any] = [None] * torch.distributed.get_world_size()
        sent = (value, None if error is None else _with_rank(error, writes_to))
        torch.distributed.all_gather_object(per_rank, sent)
        errors.extend(found for _, found in per_rank if found is not None)
        if errors:
            raise errors[0] from error
        return [value for value, _ in per_rank]

    with contextlib.ExitStack() as restoring:
        for owner, name in _methods_before_collectives(engine):
            restoring.callback(_call_first(gather, owner, name))
        try:
            yield gather
        except Exception as error:
            if not errors:
                gather(error=error)
            raise
        gather()


def _with_rank(error: Exception, writes_to: str | None) -> Exception:
    """Return the error with this rank's number.

    Other ranks can unpickle its type.
    """
    rank = f"rank {torch.distributed.get_rank()}"
    if isinstance(error, RuntimeError) and writes_to and _is_full(writes_to):  # torch.save gives no reason
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


def _methods_before_collectives(engine: Any) -> list[tuple[Any, str]]:
    """Return (owner, method name) of the DeepSpeed methods that precede a collective.

    If the ranks did not exchange errors before these methods, an error on one rank would make the others wait until
    the process group times out. tests/deepspeed_runs/test_deepspeed_save_failures.py fails if one entry is removed.
    """
    methods = (
        (engine.optimizer, "checkpoint_event_prologue"),  # partitions small weights at ZeRO 3
        (engine, "load_module_state_dict"),  # gathers and broadcasts weights at ZeRO 3
        (engine.checkpoint_engine, "commit"),  # before the last barrier of a save
        (engine.optimizer, "checkpoint_event_epilogue"),  # gathers small weights at ZeRO 3
        (engine.optimizer, "update_lp_params"),  # gathers weights from a universal checkpoint
    )
    return [(owner, name) for owner, name in methods if hasattr(owner, name)]


def _call_first(gather: Gather, owner: Any, name: str) -> Callable[[], None]:
    """Call `gather` before a method of one object.

    Returns a function that undoes it.
    """
    original = getattr(owner, name)
    replaced = vars(owner).get(name)
    setattr(owner, name, lambda *args, **named: (gather(), original(*args, **named))[1])
    return lambda: delattr(owner, name) if replaced is None else setattr(owner, name, replaced)
