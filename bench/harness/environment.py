"""What a result must say of where it was measured.

    python -m adax_triton.bench.harness.environment cuda

prints what the driver's own program says of the GPU, then one line of JSON: what `describe` returns.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def describe(device: torch.device) -> dict[str, Any]:
    """Return device, versions, commit and date of a run, JSON-friendly."""
    described: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "deepspeed": _version("deepspeed"),
        "device": _cpu_name(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "device": properties.name,
            "driver": driver(),
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return described


def commit() -> str:
    """Return the variable COMMIT; else the checkout's commit, `-dirty` if its code differs; without git "unknown".

    The checkout is where this file lies, or where the variable CHECKOUT says: a copy cannot ask git for it.
    """
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    where = os.environ.get("CHECKOUT", Path(__file__).resolve().parent)
    # Results are written one by one, before they are committed together.
    code = (":(top)", ":(top,exclude)bench/results", ":(top,exclude)docs", ":(top,exclude)*.md")
    try:
        described = _git("describe", "--always", "--abbrev=12", cwd=where)
        return described + ("-dirty" if _git("diff", "HEAD", "--name-only", "--", *code, cwd=where) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str, cwd: Path | str) -> str:
    return subprocess.run(["git", *words], cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of what is installed among packages, by the names under which they are imported."""
    distributions = importlib.metadata.packages_distributions()
    return {
        package: importlib.metadata.version(distributions[package][0])
        for package in packages
        if package in distributions
    }


def driver() -> str | None:
    """Return the version of a GPU's driver: NVIDIA's, by its own program, or that of the kernel's amdgpu module."""
    amd = Path("/sys/module/amdgpu/version")
    if torch.version.hip is not None:
        return amd.read_text().strip() if amd.exists() else None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
    print(json.dumps(describe(torch.device(sys.argv[1]))))
