"""Processes of `adax-triton bench cpu`: another copy of the package, and first steps of new processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adax_triton.bench.step import cpu_workloads

from .cpu_workloads import FUSED, OURS, Sizes

BASELINE = "baseline"

# Safe path: the folder of the script has modules of common names.
_SCRIPT = [sys.executable, "-P", cpu_workloads.__file__]


class Baseline:
    """A process that times workloads with another copy of the package.

    Args:
        package: the folder that has `adax_triton` in it, as by `pip install --target`.

    Raises:
        ValueError: the folder has no `adax_triton`.
    """

    def __init__(self, package: Path) -> None:
        self._package = check_package(package)
        self._process = subprocess.Popen(
            [*_SCRIPT, "serve"], env=_environment(package), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, name: str, sizes: Sizes) -> str | None:
        """Prepare a workload; return why it is absent, or None."""
        answer = self._ask({"start": name, "sizes": sizes})
        (found,) = answer["package"]
        if Path(found).parent.resolve() != self._package:
            raise RuntimeError(f"The baseline process imported {found}, not adax_triton of {self._package}")
        return next(iter(answer["absent"].values()), None)

    def sample(self) -> dict[str, float]:
        """Return the seconds of one sample, by side."""
        return self._ask({})

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):  # other lines are the log of some package
                return json.loads(line)
        raise RuntimeError(f"The baseline process ended with exit code {self._process.wait()}")


def check_package(package: Path) -> Path:
    """Return the absolute path of a folder that has `adax_triton` in it.

    Raises:
        ValueError: it has none.
    """
    if not (package / "adax_triton" / "__init__.py").is_file():
        raise ValueError(
            f"--package {package}: expected a folder that has adax_triton in it; make one by "
            f"pip install --no-deps --target {package} CHECKOUT"
        )
    return package.resolve()


def first_steps(sizes: Sizes, processes: int, package: Path | None) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of the first step of new processes, by state of the kernel cache, then by side.

    Args:
        sizes: of the tensor.
        processes: per side and state of the cache.
        package: the other copy of the package, whose side is `BASELINE`. Default: none.
    """
    sides: dict[str, tuple[str, Path | None]] = {OURS: (OURS, None), FUSED: (FUSED, None)}
    if package is not None:
        sides[BASELINE] = (OURS, package)
    found: dict[str, dict[str, list[float]]] = {cache: {side: [] for side in sides} for cache in ("empty", "filled")}
    for _ in range(processes):
        for side, (kind, where) in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                for cache in found:
                    arguments = ["first", kind, str(sizes.first_numel)]
                    found[cache][side].append(_run(arguments, _environment(where, folder))["seconds"])
    return found


def _run(arguments: Sequence[str], environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run([*_SCRIPT, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def _environment(package: Path | None, cache: str | None = None) -> dict[str, str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    if package is not None:
        environment["PYTHONPATH"] = str(package.resolve())
    if cache is not None:
        environment |= {"XDG_CACHE_HOME": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        environment["TRITON_CACHE_DIR"] = f"{cache}/triton"
    return environment
