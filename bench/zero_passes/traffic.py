"""Bytes that a block of code reads and writes in tensors, by the operations PyTorch dispatches and our own steps."""

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

# Smaller tensors are scalars and tables.
SMALLEST_NUMEL = 1024
STEP = "step"
_OVERWRITING = ("copy_", "fill_", "zero_")
_ALLOCATING = ("empty", "new_empty", "empty_like", "empty_strided")


class Traffic(TorchDispatchMode):
    """Counts the bytes of every operation within a `with` block, once for each tensor that it reads or writes.

    A step of this package counts as what its formula reads and writes, whatever would run it, and is not taken. What
    PyTorch's own operations move inside of them is not looked into.

    Attributes:
        bytes: by the name of the operation; those of our steps under `STEP`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)
        self._patches = ExitStack()

    def __enter__(self) -> Traffic:
        def counted(memory: LaunchCache, steps: Sequence[TensorStep], *arguments: Any) -> list[Any]:
            self.bytes[STEP] += sum(map(step_bytes, steps))
            return []  # a plan without launches is not used again

        def nothing(plan: StepPlan, *arguments: Any) -> StepResult:
            return StepResult(True, None, None)

        self._patches.enter_context(mock.patch.object(LaunchCache, "launches", counted))
        self._patches.enter_context(mock.patch.object(StepPlan, "run", nothing))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        self.bytes[name] += _bytes(function, name, args, kwargs or {}, result)
        return result


def step_bytes(step: TensorStep) -> int:
    """Return what an update of one tensor reads and writes; a copy of float32 weights is written only."""
    written = [*step.written, *([] if step.group_exponents is None else [step.group_exponents])]
    return sum(map(_size, written)) * 2 + _size(step.grad) - (_size(step.param) if step.param_is_copy else 0)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    if name in _ALLOCATING:
        return 0
    schema = function._schema
    is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)
    if is_view:
        return 0
    total = 0
    for index, argument in enumerate(schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        size = sum(map(_size, _large(value)))
        written = argument.alias_info is not None and argument.alias_info.is_write
        read = not (written and name.removeprefix("_foreach_") in _OVERWRITING)
        total += size * (written + read)
    if all(value.alias_info is None for value in schema.returns):
        total += sum(map(_size, _large(result)))
    return total


def _large(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.numel() >= SMALLEST_NUMEL]
