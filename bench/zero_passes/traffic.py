"""Count the tensor bytes that code reads and writes, per PyTorch operation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adax_triton.step.launch import LaunchCache
from adax_triton.step.plan import StepPlan, StepResult
from adax_triton.step.tensor_step import TensorStep

SMALLEST_NUMEL = 1024  # smaller tensors are scalars and tables
STEP = "step"
_OVERWRITING = ("copy_", "fill_", "zero_")
_ALLOCATING = ("empty", "new_empty", "empty_like", "empty_strided")


class Traffic(TorchDispatchMode):
    """Counts the bytes of every operation in a `with` block.

    Each tensor that an operation reads or writes is counted once. Steps of this package are counted by their formula
    and not executed. Traffic inside PyTorch's operations is not counted.

    Attributes:
        bytes: by name of the operation; our steps are `STEP`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)
        self._patches = ExitStack()

    def __enter__(self) -> Traffic:
        def count(memory: LaunchCache, steps: Sequence[TensorStep], *arguments: Any) -> list[Any]:
            self.bytes[STEP] += sum(map(step_bytes, steps))
            return []  # a plan without launches is not reused

        done = StepResult(True, None, None)
        self._patches.enter_context(mock.patch.object(LaunchCache, "launches", count))
        self._patches.enter_context(mock.patch.object(StepPlan, "run", lambda *arguments: done))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        if name not in _ALLOCATING:
            self.bytes[name] += _bytes(function._schema, name, args, kwargs or {}, result)
        return result


def step_bytes(step: TensorStep) -> int:
    """Return the bytes that one tensor's update reads and writes.

    A low-precision copy is only written.
    """
    written = [*step.written, *([] if step.group_exponents is None else [step.group_exponents])]
    copied = step.param.nbytes if step.param_is_copy else 0
    return 2 * sum(tensor.nbytes for tensor in written) + step.grad.nbytes - copied


def _bytes(schema: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    if any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns):
        return 0  # a view
    total = 0
    for index, argument in enumerate(schema.arguments):
        written = argument.alias_info is not None and argument.alias_info.is_write
        read = not (written and name.removeprefix("_foreach_") in _OVERWRITING)
        total += _size(args[index] if index < len(args) else kwargs.get(argument.name)) * (written + read)
    return total + (_size(result) if all(value.alias_info is None for value in schema.returns) else 0)


def _size(value: Any) -> int:
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.numel() >= SMALLEST_NUMEL)
