"""Build DeepSpeed's async_io by compiling several source files as one.

This takes one minute instead of five. `make env` runs this script, which builds async_io if libaio is installed, so
that no test has to.
"""

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops import op_builder
from torch.utils import cpp_extension

# Source folders whose files all include torch's headers, which takes half a minute per file.
_MERGED = ("py_lib", "pin_memory")


def build_root() -> Path:
    """Return the build folder of the installed versions."""
    versions = f"{deepspeed.__version__}-{torch.__version__}-{sys.version_info.major}.{sys.version_info.minor}"
    return Path(cpp_extension.get_default_build_root()) / f"merged-{versions}"


def merge_sources() -> None:
    """Patch DeepSpeed to compile merged copies of its sources, in separate folders."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(build_root())
    for name in ("PinMemoryBuilder", "AsyncIOBuilder"):
        if hasattr(op_builder, name):  # versions before 0.19.8 have no PinMemoryBuilder
            merge_sources_of(getattr(op_builder, name))


def merge_sources_of(builder: Any) -> None:
    folder, include_paths = build_root() / f"{builder.NAME}-sources", builder().include_paths()
    sources = merged(folder, builder().sources(), include_paths)
    flags = [flag for flag in builder().cxx_args() if flag not in ("-g", "-O3")]  # these double the build time
    builder.sources = lambda self: sources
    builder.cxx_args = lambda self: flags
    builder.include_paths = lambda self: [str(folder / path) for path in include_paths]


def merged(folder: Path, sources: list[str], include_paths: list[str]) -> list[str]:
    """Copy sources into a folder, and return the files to compile."""
    original = Path(op_builder.__file__).parents[1]
    for path in include_paths:
        for file in (original / path).iterdir():
            text = file.read_text()
            write(folder / path / file.name, f"#pragma once\n{text}" if file.suffix == ".h" else text)
    alone = [path for path in sources if Path(path).parent.name not in _MERGED]
    lines = [f'#include "{path}"\n' for path in sources if path not in alone]
    write(folder / "merged.cpp", "".join(lines))
    return [str(folder / "merged.cpp"), *(str(folder / path) for path in alone)]


def write(path: Path, text: str) -> None:
    """Write a file only if its content differs, to avoid ninja rebuilds."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # torch looks for ninja there
    if op_builder.AsyncIOBuilder().is_compatible(verbose=False):
        merge_sources()
        op_builder.AsyncIOBuilder().load()
