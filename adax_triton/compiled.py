"""Functions of CPU tensors, compiled by PyTorch into vectorised, multi-threaded loops and called without its checks."""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# No mask within the loop. And no fused multiply-adds, which would be others for every set of dtypes and for the ends of
# tensors: weights kept whole beside bfloat16 must be those of float32 bit for bit, and so must shards of any size.
COMPILE_OPTIONS: dict[str, str | int | bool | Callable[..., object]] = {
    "cpp.enable_floating_point_contract_flag": "off",
    "cpp.enable_loop_tail_vec": False,
}
# The beginnings of PyTorch's versions in which `_better_vectors` was tried.
BETTER_VECTORS_OF = ("2.13.",)


@functools.cache
def compiler_problem() -> str | None:
    """Return why CPU code cannot be compiled here, or None; found out once, by looking for the C++ compiler."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        return " ".join(str(error).split())
    return None


def call_compiled(function: Callable[..., Any], tensors: Sequence[Tensor | None], *constants: Hashable) -> Any:
    """Return `function(*tensors, *constants)`, compiled at the first call with these dtypes and constants.

    Nothing else is compiled for or checked: calls may differ in sizes only, and in those only as one number does.

    Args:
        function: of plain tensor operations; returns None or one tensor.
        tensors: contiguous CPU tensors that autograd does not record, or None.
        constants: what the function branches on.
    """
    dtypes = (*(None if tensor is None else tensor.dtype for tensor in tensors),)
    return _program(function, dtypes, constants, torch.get_num_threads())(tensors)


@functools.cache
def _program(
    function: types.FunctionType, dtypes: tuple[torch.dtype | None, ...], constants: tuple[Hashable, ...], threads: int
) -> _Program:
    # Dynamo counts recompilations per code object and gives up after eight; each program gets its own.
    words = [function.__name__, *(str(dtype).removeprefix("torch.") for dtype in dtypes), *map(str, constants), threads]
    name = "_".join(map(str, words))
    twin = types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    return _Program(twin, constants)


class _Program:
    # Dynamo's checks cost 0.1 ms per call, as long as a step of 100,000 elements takes. They hold by what
    # `call_compiled` asks for; so after the first call, which Dynamo traces, what the compiler made is called itself.
    def __init__(self, function: types.FunctionType, constants: tuple[Hashable, ...]) -> None:
        self._constants = constants
        self._traced = torch.compile(function, dynamic=True, fullgraph=True, backend=self._compile)
        self._compiled: Callable[..., Sequence[Tensor]] | None = None
        self._first_inputs: Sequence[Tensor | int] = ()
        # Where each input is found: the index of a tensor, and of one of its numbers where the input is a number.
        self._inputs: list[tuple[int, int | None]] = []

    def __call__(self, tensors: Sequence[Any]) -> Any:
        if not self._inputs:
            # Else a float of a module, which never changes, would be one more input.
            with torch._dynamo.config.patch(specialize_float=True):
                result = self._traced(*tensors, *self._constants)
            self._inputs = [_place(value, tensors) for value in self._first_inputs]
            self._first_inputs = ()
            return result
        assert self._compiled is not None
        results = self._compiled(
            *(
                tensors[index] if number is None else _numbers_of(tensors[index])[number]
                for index, number in self._inputs
            )
        )
        return results[0] if results else None

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
        from torch._inductor.compile_fx import compile_fx

        with _better_vectors(inputs):
            compiled: Any = compile_fx(graph, inputs, config_patches=COMPILE_OPTIONS)
        self._compiled = compiled

        def first_call(*values: Tensor | int) -> Sequence[Tensor]:
            self._first_inputs = values
            return compiled(*values)

        return first_call


def _place(value: Tensor | int, tensors: Sequence[Tensor | None]) -> tuple[int, int | None]:
    given = [(index, tensor) for index, tensor in enumerate(tensors) if tensor is not None]
    if isinstance(value, Tensor):
        return next(index for index, tensor in given if tensor is value), None
    sizes = ((index, number) for index, tensor in given for number, size in enumerate(tensor.shape) if size == value)
    # Where a view begins is a number too; nothing is computed from it.
    starts = ((index, tensor.dim()) for index, tensor in given if tensor.storage_offset() == value)
    return next(itertools.chain(sizes, starts))


def _numbers_of(tensor: Tensor) -> tuple[int, ...]:
    return *tensor.shape, tensor.storage_offset()


@contextlib.contextmanager
def _better_vectors(inputs: Sequence[Tensor | int]) -> Iterator[None]:
    """Have PyTorch's compiler write as one instruction or none what it writes as dozens, or as loads that stall.

    - A bit cast takes vectors apart, where a load from the vector's own place is enough.
    - A vector of int32 is loaded through a copy on the stack if its length is given, be it that of a whole one.
    - So are halves of a vector of 16-bit numbers: where there are such numbers, loops take as many as fill one.

    These are private parts of it, so another PyTorch than those whose parts were read keeps its own: slower, with the
    same results.
    """
    if not torch.__version__.startswith(BETTER_VECTORS_OF):
        yield
        return
    from torch._inductor.codegen.cpp import CppVecKernel, CppVecOverrides, cexpr_index
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.virtualized import V

    isa, load_line = pick_vec_isa(), CppVecKernel._get_vec_load_line
    numbers_in_vector = isa._dtype_nelements

    def to_dtype_bitcast(value: object, dtype: torch.dtype, src_dtype: torch.dtype) -> str:
        return f"{V.kernel._get_vec_type(dtype)}::loadu(&{value})"

    def _get_vec_load_line(kernel: Any, var: str, index: Any, dtype: torch.dtype, load_mask: Any = None) -> str:
        line = load_line(kernel, var, index, dtype, load_mask)
        length = f", {cexpr_index(kernel.tiling_factor)})"
        return line.removesuffix(length) + ")" if dtype == torch.int32 and line.endswith(length) else line

    replaced: list[tuple[Any, str, Any]] = [
        (CppVecOverrides, "to_dtype_bitcast", staticmethod(to_dtype_bitcast)),
        (CppVecKernel, "_get_vec_load_line", _get_vec_load_line),
    ]
    has_halves = any(isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) for value in inputs)
    if has_halves and torch.bfloat16 in numbers_in_vector:  # not of a processor without vectors
        table = {**numbers_in_vector, torch.float32: numbers_in_vector[torch.bfloat16]}
        replaced.append((isa, "_dtype_nelements", table))
    # As they stand in the class: a static method would come back as a function.
    originals = [(owner, name, vars(owner).get(name, getattr(owner, name))) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)
