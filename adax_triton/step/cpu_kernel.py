"""Build, cache, load and call the native CPU kernel, `kernels/adax_step.cpp`."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from adax_triton.kernels import tables

# Elements per entry of the chunk table; a multiple of `tables.GROUP`.
CHUNK_SIZE = 16_384
_SOURCES = [Path(tables.__file__).with_name(name) for name in ("adax_step.cpp", "quantization.hpp", "rounding.hpp")]
_COMPILERS = ("c++", "g++", "clang++")
_INSTALL_ADVICE = "Install a C++ compiler, such as g++, or name one in the environment variable CXX"
_CXX_ADVICE = "Unset CXX to use the machine's compiler, or set it to another compiler"
# FMA contraction would change results, and errno would prevent vectorized square roots. -fopenmp-simd enables only
# OpenMP's simd pragmas; threads come from the OpenMP runtime that PyTorch has loaded.
_FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
_X86 = ("x86_64", "amd64")
_NATIVE = dict.fromkeys(_X86, ("-march=native",)) | dict.fromkeys(("aarch64", "arm64"), ("-mcpu=native",))
# Names in the C++ source.
_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}
_STATES = {
    "float32": "full_precision",
    "bfloat16": "bfloat16_moments",
    "8bit_v16": "moments_8bit_v16",
    "8bit": "moments_8bit",
}
_MASTERS = {None: "no_master", "int16": "int16_remainder", "int8": "int8_remainder", "float32": "float32_copy"}


class CpuKernelError(RuntimeError):
    """The CPU kernel cannot be built or loaded."""


class KernelVariant(NamedTuple):
    """Compile-time options that the CPU and Triton kernels share.

    Args:
        param_dtype: float32, bfloat16, float16 or float64.
        grad_dtype: one of the same dtypes.
        states: `"float32"`, `"bfloat16"`, `"8bit_v16"` or `"8bit"`. Default: `"float32"`. float64 parameters
            accept only `"float32"`, and their states are then float64.
        master: None, `"int16"` or `"int8"` for the remainder of bfloat16 parameters, `"float32"` for a master copy.
            Default: None.
        stochastic: round the parameters stochastically; bfloat16 without a master. Default: False.
        telemetry: write the sums of each chunk, see `tables.SUM_COLUMNS`. Default: False.
        param_is_copy: the float32 master is the weight; the parameter is only written. Default: False.
    """

    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    states: str = "float32"
    master: str | None = None
    stochastic: bool = False
    telemetry: bool = False
    param_is_copy: bool = False

    def definitions(self) -> dict[str, str | int]:
        """Return the preprocessor definitions of the C++ kernel for this variant."""
        return {
            **tables.definitions(),
            "CHUNK_SIZE": CHUNK_SIZE,
            "PARAM": _DTYPES[self.param_dtype],
            "GRAD": _DTYPES[self.grad_dtype],
            "STATES": _STATES[self.states],
            "MASTER": _MASTERS[self.master],
            "STOCHASTIC": int(self.stochastic),
            "TELEMETRY": int(self.telemetry),
            "PARAM_IS_COPY": int(self.param_is_copy),
        }


class _Threads:
    """Chooses the number of OpenMP threads.

    A forked child does not have the threads of its parent's steps, and OpenMP would wait for them forever.
    """

    def __init__(self) -> None:
        self._used = self._lost = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        self._lost = self._used

    def count(self) -> int:
        threads = 1 if self._lost else torch.get_num_threads()
        self._used |= threads > 1
        return threads


_threads = _Threads()


class CpuKernel:
    """A compiled variant.

    Args:
        library: path of its shared library.

    Raises:
        OSError: the library cannot be loaded.
    """

    def __init__(self, library: Path) -> None:
        functions = ctypes.CDLL(str(library))
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        self._step = functions.adax_step
        self._step.argtypes = (pointer, pointer, integer, pointer, pointer, ctypes.c_int)
        self._step.restype = None
        self._sum_of_squares = functions.sum_of_squares
        self._sum_of_squares.argtypes = (pointer, pointer, integer, pointer, ctypes.c_int)
        self._sum_of_squares.restype = None
        functions.instruction_set.restype = ctypes.c_char_p
        self.instruction_set: str = functions.instruction_set().decode()
        openmp = _openmp()
        if openmp is not None:
            functions.use_openmp(*openmp)

    def step(self, tensors: Tensor, chunks: Tensor, scalars: Tensor, chunk_sums: Tensor | None = None) -> None:
        """Update every tensor of a table in place; see `reference.adax_update`.

        All arguments are contiguous CPU tensors.

        Args:
            tensors: (n, 9) int64, see `tables.TENSOR_COLUMNS`. The addresses are of contiguous CPU arrays.
            chunks: (k,) int64, see `device_tables.chunk_table` with `CHUNK_SIZE`.
            scalars: (rows, 10) float32, or float64 for float64 parameters; see `tables.SCALAR_COLUMNS`.
            chunk_sums: (k, 5), same dtype as `scalars`; a variant with telemetry writes it, see `tables.SUM_COLUMNS`.
                Default: None, no telemetry.
        """
        sums = None if chunk_sums is None else chunk_sums.data_ptr()
        threads = _threads.count()
        self._step(tensors.data_ptr(), chunks.data_ptr(), chunks.numel(), scalars.data_ptr(), sums, threads)

    def sum_of_squares(self, tensors: Tensor, chunks: Tensor, partials: Tensor) -> None:
        """Write the sum of squares of each chunk's gradients.

        Squares and sums are float64.

        Args:
            tensors, chunks: see `step`.
            partials: (k,) float64 on the CPU, receives the sums. The thread count does not change their bits.
        """
        threads = _threads.count()
        self._sum_of_squares(tensors.data_ptr(), chunks.data_ptr(), chunks.numel(), partials.data_ptr(), threads)


@functools.cache
def cpu_kernel(variant: KernelVariant) -> CpuKernel:
    """Return the kernel of a variant, compiled or from the cache.

    Raises:
        CpuKernelError: the build failed. The message contains the compiler's output.
    """
    try:
        compiler = _compiler()
        key = _key(compiler, variant)
    except OSError as error:
        raise CpuKernelError(
            f"Cannot build the CPU kernel: {error}. Check the compiler, or reinstall adax-triton."
        ) from error
    problem: Exception | None = None
    for find_folder in (_cache_folder, _private_folder):  # fall back if the first is read-only or noexec
        try:
            return _load_cached(find_folder(), key) or CpuKernel(_build(compiler, variant, find_folder(), key))
        except (OSError, AttributeError) as error:
            problem = error
    raise CpuKernelError(
        f"Cannot build the CPU kernel with {compiler[0]}: {problem}. {_CXX_ADVICE}, or set XDG_CACHE_HOME to a folder "
        "that allows writing and execution."
    ) from problem


def _load_cached(folder: Path, key: str) -> CpuKernel | None:
    for library in folder.glob(f"{key}-*.so"):
        with contextlib.suppress(OSError, AttributeError):  # ignore a broken file; the caller builds it again
            # A truncated file can crash the process when loaded, so its name contains its size.
            if library.name == _file_name(key, library):
                return CpuKernel(library)
    return None


@functools.cache
def build_problem() -> str | None:
    """Build a kernel unless one is cached; return the error or None."""
    try:
        cpu_kernel(KernelVariant(torch.float32, torch.float32))
    except CpuKernelError as error:
        return str(error)
    return None


def instruction_set() -> str:
    """Return the vector instructions of compiled kernels, such as `"AVX-512"` or `"NEON"`.

    Raises:
        CpuKernelError: no kernel can be built here.
    """
    return cpu_kernel(KernelVariant(torch.float32, torch.float32)).instruction_set


def describe_cache() -> str:
    """Return the kernel cache folder, and advice if it cannot be written."""
    folder = _cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return (
            f"{folder} cannot be written ({error.strerror}), so each process compiles again; set XDG_CACHE_HOME to "
            "another folder"
        )
    return str(folder)


def _compiler() -> tuple[str, ...]:
    try:
        command = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise CpuKernelError(f"CXX is {os.environ['CXX']!r}: {error}. {_CXX_ADVICE}.") from error
    if command:
        found = shutil.which(command[0])
        if found is None:
            raise CpuKernelError(f"CXX names the compiler {command[0]!r}, which was not found. {_CXX_ADVICE}.")
        return (found, *command[1:])
    for name in _COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return (found,)
    raise CpuKernelError(f"No C++ compiler was found among {', '.join(_COMPILERS)}. {_INSTALL_ADVICE}.")


def _arguments(variant: KernelVariant) -> list[str]:
    machine = platform.machine().lower()
    arguments = [*_FLAGS, *_NATIVE.get(machine, ())]
    if machine in _X86:
        # A group of 32 one-byte values fills a 256-bit vector.
        arguments.append(f"-mprefer-vector-width={256 if variant.states in ('8bit_v16', '8bit') else 512}")
    return arguments + [f"-D{name}={value}" for name, value in variant.definitions().items()]


def _key(compiler: tuple[str, ...], variant: KernelVariant) -> str:
    # Hash everything that the machine code depends on, because machines may share a cache.
    status = os.stat(compiler[0])
    parts = (
        *(*(source.read_text(encoding="utf-8") for source in _SOURCES), *_arguments(variant)),
        *(*compiler, str(status.st_size), str(status.st_mtime_ns)),
        _processor(),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _file_name(key: str, library: str | Path) -> str:
    return f"{key}-{os.stat(library).st_size}.so"


@functools.cache
def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith(("flags", "Features")):
                return platform.machine() + line
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def _cache_folder() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    with contextlib.suppress(RuntimeError):  # no home folder
        return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "adax_triton"
    return _private_folder()


@functools.cache
def _private_folder() -> Path:
    folder, process = tempfile.mkdtemp(prefix="adax_triton-"), os.getpid()

    def remove() -> None:
        if os.getpid() == process:  # do not delete it at the end of a forked child
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)


def _build(compiler: tuple[str, ...], variant: KernelVariant, folder: Path, key: str) -> Path:
    """Compile a variant into a folder and return the library.

    Raises:
        CpuKernelError: the compiler fails.
        OSError: the folder cannot be written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Build to a temporary file, then rename: concurrent builds need no lock, which a killed process could leave behind.
    handle, building = tempfile.mkstemp(prefix="building-", suffix=".so", dir=folder)
    try:
        os.close(handle)
        command = [*compiler, *_arguments(variant), str(_SOURCES[0]), "-o", building]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if result.returncode != 0 or os.stat(building).st_size == 0:
            output = " ".join((result.stderr + result.stdout).split())[:500] or "nothing"
            raise CpuKernelError(
                f"{shlex.join(compiler)} failed to build the CPU kernel, with exit status {result.returncode}. "
                f"{_CXX_ADVICE}. Its output: {output}"
            )
        library = folder / _file_name(key, building)
        os.replace(building, library)
        return library
    finally:
        with contextlib.suppress(OSError):  # renamed already
            os.unlink(building)


@functools.cache
def _openmp() -> tuple[ctypes.c_void_p, ctypes.c_void_p] | None:
    # Find GOMP_parallel and omp_get_thread_num in PyTorch's OpenMP runtime; libomp and libiomp export both. Linking
    # with OpenMP could load a second runtime with its own threads.
    for library in (None, torch._C.__file__):
        with contextlib.suppress(OSError, AttributeError):
            functions = ctypes.CDLL(library)
            parallel, number = functions.GOMP_parallel, functions.omp_get_thread_num
            return ctypes.cast(parallel, ctypes.c_void_p), ctypes.cast(number, ctypes.c_void_p)
    return None
