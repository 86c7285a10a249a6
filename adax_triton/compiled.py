"""Functions of CPU tensors, compiled by PyTorch into vectorised, multi-threaded loops and called without its checks."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
import threading
import types
import warnings
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

# The size that differs between calls, in the shapes of an `Input`.
ANY = -1
# What a tensor is compiled for: its dtype and its shape; None where there is no tensor.
Input = tuple[torch.dtype, tuple[int, ...]] | None
# The leading size while compiling. A prime, so that nothing holds of it by chance that does not hold of every size.
_SIZES_OF_DIMS = {1: 131_071, 2: 4_099}
_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
# Dynamo and the patches below belong to one thread at a time.
_lock = threading.RLock()


@functools.cache
def compiler_problem() -> str | None:
    """Return why CPU code cannot be compiled here, or None; found out once, by looking for the C++ compiler."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError) as error:
        return " ".join(str(error).split())
    return None


def ensure_cache_folder() -> None:
    """Name another cache folder, with a warning, if the one in the environment cannot be made.

    PyTorch makes it when an optimizer gets its first group, and without it has no optimizers either.
    """
    folder = os.environ.get(_CACHE_VARIABLE)
    if folder is None or "torch._dynamo" in sys.modules:
        return
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        os.environ[_CACHE_VARIABLE] = tempfile.mkdtemp(prefix="torchinductor_")
        warnings.warn(
            f"{_CACHE_VARIABLE}: {folder} cannot be made ({error.strerror}); compiled code goes to "
            f"{os.environ[_CACHE_VARIABLE]}",
            stacklevel=2,
        )


def may_compile() -> bool:
    """Whether to compile and to call compiled code here; warns once where the machine or a switch prevents it."""
    # A mode must see every operation. And what compiled code does to a fake tensor's memory ends the process.
    if torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    problem = compiler_problem()
    if problem is not None:
        _warn_uncompiled(f"{problem}. Install a C++ compiler, such as g++, or name one in the environment variable CXX")
    return problem is None


def compiled_program(
    function: Callable[..., Any], inputs: tuple[Input, ...], constants: tuple[Hashable, ...]
) -> Program | None:
    """Return the compiled `function(*tensors, *constants)`, or None, with one warning, where compiling fails.

    It is compiled on tensors made for that, when it is first asked for.

    Args:
        function: of plain tensor operations; returns None or one tensor.
        inputs: one per tensor, contiguous and on the CPU; one number, that of the first tensor, in all places of `ANY`.
        constants: what the function branches on.
    """
    with _lock:
        found = _program(function, inputs, constants, torch.get_num_threads())
    if isinstance(found, Program):
        return found
    _warn_uncompiled(found)
    return None


@functools.cache
def _program(
    function: types.FunctionType, inputs: tuple[Input, ...], constants: tuple[Hashable, ...], threads: int
) -> Program | str:
    # Dynamo counts recompilations per code object and gives up after eight; each program gets its own.
    dtypes = ["None" if each is None else str(each[0]).removeprefix("torch.") for each in inputs]
    name = "_".join(map(str, [function.__name__, *dtypes, *constants, threads]))
    twin = types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    try:
        return Program(twin, inputs, constants)
    # Every part of the compiler, and of the machine that it needs, raises errors of its own.
    except Exception as error:
        said = str(error).partition("Output:")[2] or str(error)  # of a C++ compiler, not the long command
        return f"{type(error).__name__}: {' '.join(said.split())[:300]}"


_warned: list[str] = []


def _warn_uncompiled(problem: str) -> None:
    if not _warned:
        _warned.append(problem)
        warnings.warn(
            f"adax_triton steps CPU tensors with uncompiled PyTorch, several times slower: {problem}", stacklevel=2
        )


class Program:
    """A function as compiled; see `compiled_program`.

    Dynamo's checks cost 0.1 ms per call, as long as a step of 100,000 elements takes. They hold by what the inputs say,
    so what the compiler made is called itself.
    """

    def __init__(
        self, function: types.FunctionType, inputs: tuple[Input, ...], constants: tuple[Hashable, ...]
    ) -> None:
        assert inputs[0] is not None
        size = _SIZES_OF_DIMS[len(inputs[0][1])]
        tensors = [
            None
            if each is None
            else torch.ones([size if given == ANY else given for given in each[1]], dtype=each[0], device="cpu")
            for each in inputs
        ]
        self._compiled: Callable[..., Sequence[Tensor]] | None = None
        self._first_inputs: Sequence[Tensor | int] = ()
        traced = torch.compile(function, dynamic=True, fullgraph=True, backend=self._compile)
        # Else a float of a module, which never changes, would be one more input.
        with torch._dynamo.config.patch(specialize_float=True):
            traced(*tensors, *constants)
        if self._compiled is None:
            raise RuntimeError("torch.compile is switched off")
        # The index of a tensor; or a number, None where it is the one that differs.
        self._inputs: list[tuple[int | None, int | None]] = [
            (next(index for index, tensor in enumerate(tensors) if tensor is value), None)
            if isinstance(value, Tensor)
            else (None, None if value == size else value)
            for value in self._first_inputs
        ]
        self._first_inputs = ()

    def __call__(self, *tensors: Any) -> Any:
        """Return `function(*tensors, *constants)`; autograd does not record it."""
        assert self._compiled is not None
        size = tensors[0].shape[0]
        results = self._compiled(
            *(
                tensors[index] if index is not None else size if number is None else number
                for index, number in self._inputs
            )
        )
        return results[0] if results else None

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
        from torch._inductor.compile_fx import compile_fx

        with _better_vectors(inputs):
            compiled: Any = compile_fx(graph, inputs, config_patches=COMPILE_OPTIONS)

        def first_call(*values: Tensor | int) -> Sequence[Tensor]:
            self._first_inputs = values
            results = compiled(*values)
            self._compiled = compiled  # it has run
            return results

        return first_call


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
