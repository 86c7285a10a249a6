"""Build and cache of the native CPU kernel."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adax_triton.step import cpu_kernel as module
from adax_triton.step.cpu_kernel import CpuKernelError, KernelVariant, build_problem, cpu_kernel

PLAIN = KernelVariant(torch.float32, torch.float32)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Clear all caches and return an empty cache folder."""
    caches = (module.cpu_kernel, module.build_problem, module._cache_folder, module._private_folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cache in caches:
        cache.cache_clear()
    yield tmp_path / "adax_triton"
    for cache in caches:
        cache.cache_clear()


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def test_a_kernel_is_built_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_problem() is None
    (library,) = files(fresh)
    assert library.suffix == ".so"
    module.cpu_kernel.cache_clear()
    monkeypatch.setattr(module, "_build", lambda *_: pytest.fail("built again"))
    cpu_kernel(PLAIN)
    assert module.instruction_set() in ("AVX-512", "AVX2", "baseline x86-64", "SVE", "NEON", "baseline")


@pytest.mark.parametrize("kept", [0, 4, 0.5, 1])
def test_a_broken_file_is_built_again(fresh: Path, kept: float) -> None:
    folder = fresh.parent
    library = module._build(module._compiler(), PLAIN, folder, module._key(module._compiler(), PLAIN))
    content = library.read_bytes()
    fresh.mkdir()
    broken = fresh / library.name
    broken.write_bytes(b"\0" * len(content) if kept == 1 else content[: int(kept * len(content) if kept < 1 else kept)])
    assert build_problem() is None
    assert broken.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_replaced(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    file = fresh.parent / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert build_problem() is None
    assert len(files(module._private_folder())) == 1


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    problem = build_problem()
    assert (
        problem is not None and "CXX names the compiler 'no-such-compiler', which was not found. Unset CXX" in problem
    )


def test_without_a_compiler_the_error_names_cxx(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    with pytest.raises(CpuKernelError, match="CXX"):
        cpu_kernel(PLAIN)


def test_the_error_contains_the_compiler_output(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    compiler = fresh.parent / "compiler"
    compiler.write_text("#!/bin/sh\necho out of order >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(CpuKernelError, match="out of order"):
        cpu_kernel(PLAIN)
    assert files(fresh) == []


@pytest.mark.parametrize(("value", "message"), [("g++ 'x", "No closing quotation"), ("/bin/true", "exit status 0")])
def test_a_cxx_that_is_no_compiler_raises(
    value: str, message: str, monkeypatch: pytest.MonkeyPatch, fresh: Path
) -> None:
    monkeypatch.setenv("CXX", value)
    with pytest.raises(CpuKernelError, match=message):
        cpu_kernel(PLAIN)
    assert files(fresh) == []


@pytest.mark.parametrize("value", ["", "  "])
def test_a_blank_cxx_is_ignored(value: str, monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    monkeypatch.setenv("CXX", value)
    assert build_problem() is None


def test_missing_sources_raise(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    monkeypatch.setattr(module, "_SOURCES", [fresh / "adax_step.cpp"])
    with pytest.raises(CpuKernelError, match=r"adax_step\.cpp"):
        cpu_kernel(PLAIN)


def test_a_folder_that_is_deleted_is_made_again(fresh: Path) -> None:
    assert build_problem() is None
    shutil.rmtree(fresh)
    cpu_kernel(PLAIN._replace(grad_dtype=torch.bfloat16))
    assert len(files(fresh)) == 1


def test_a_relative_cache_folder_is_ignored(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(fresh.parent))
    monkeypatch.chdir(fresh.parent)
    assert build_problem() is None
    assert len(files(fresh.parent / ".cache" / "adax_triton")) == 1


def test_a_fork_leaves_the_private_folder(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    program = (
        "import os, sys\n"
        "from adax_triton.step import cpu_kernel as module\n"
        "folder = module._private_folder()\n"
        "if os.fork() == 0: sys.exit(0)\n"
        "os.wait()\n"
        "print(folder.exists(), folder)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    existed, folder = done.stdout.split()
    assert existed == "True" and not Path(folder).exists()


def test_concurrent_builds_leave_one_library(fresh: Path) -> None:
    program = "from adax_triton.step.cpu_kernel import build_problem; assert build_problem() is None"
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(4)]
    assert [process.wait(120) for process in processes] == [0] * 4
    assert len(files(fresh)) == 1
