"""Machine, versions and commit of a measurement.

    python -m adax_triton.bench.harness.environment cuda

prints the output of nvidia-smi, then the result of `describe` as one line of JSON.
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
    """Return date, commit, versions and device, JSON-friendly."""
    installed = versions(("triton", "deepspeed"))
    described: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed.get("triton"),
        "deepspeed": installed.get("deepspeed"),
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


def origin(result: dict[str, Any]) -> str:
    """Return machine, versions, commit and date of a result in one line."""
    environment = result["environment"]
    parts = [environment["device"]]
    if environment.get("driver"):
        parts.append(f"driver {environment['driver']}")
    if environment.get("threads") is not None:
        parts.append(f"{environment['threads']} thread{'' if environment['threads'] == 1 else 's'}")
    parts += [f"{name} {environment[name]}" for name in ("torch", "triton", "deepspeed") if environment.get(name)]
    return ", ".join([*parts, f"commit {environment['commit']}", environment["date"][:10]])


def commit() -> str:
    """Return $COMMIT, or the commit of the checkout, or "unknown".

    The suffix "-dirty" marks a checkout whose code differs from its commit. Set $CHECKOUT to the checkout if this file
    is a copy outside of it.
    """
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    where = os.environ.get("CHECKOUT", Path(__file__).resolve().parent)
    # Results and pages are not code: several benchmarks write them before all are committed together.
    code = (":(top)", ":(top,exclude)bench/results", ":(top,exclude)docs", ":(top,exclude)*.md")
    try:
        described = _git("describe", "--always", "--abbrev=12", cwd=where)
        return described + ("-dirty" if _git("diff", "HEAD", "--name-only", "--", *code, cwd=where) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str, cwd: Path | str) -> str:
    return subprocess.run(["git", *words], cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return {import name: version} of the installed packages."""
    distributions = importlib.metadata.packages_distributions()
    return {
        package: importlib.metadata.version(distributions[package][0])
        for package in packages
        if package in distributions
    }


def driver() -> str | None:
    """Return the GPU driver's version, from nvidia-smi or the amdgpu kernel module."""
    amd = Path("/sys/module/amdgpu/version")
    if torch.version.hip is not None:
        return amd.read_text().strip() if amd.exists() else None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
    print(json.dumps(describe(torch.device(sys.argv[1]))))
