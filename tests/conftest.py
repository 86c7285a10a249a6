"""Where tests run: on a GPU where there is one, else the kernel in Triton's interpreter on CPU tensors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

LAUNCH_TIMEOUT_S = 900

# Triton decides at its import, so this comes before any import of it; torch.cuda is also the HIP device.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    """Where the kernel's tensors lie."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def compiled_cpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Has CPU tensors stepped by PyTorch, although the kernel would run on them in the interpreter."""
    monkeypatch.setattr("adax_triton.backends._interpreting", lambda: False)
    return torch.device("cpu")


@pytest.fixture(params=["kernel", "cpu"])
def backend(request: pytest.FixtureRequest) -> torch.device:
    """The device whose tensors are stepped by the kernel, and that of those stepped by PyTorch on the CPU."""
    return request.getfixturevalue("device" if request.param == "kernel" else "compiled_cpu")


@pytest.fixture(scope="session")
def launch_deepspeed() -> Callable[[Path, list[dict[str, Any]]], dict[str, Any]]:
    """Runs cases of deepspeed_worker.py, with files in a folder, and returns their results."""
    return launch


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(folder: Path, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Run deepspeed_worker.py on two ranks and return its results; no process outlives the call."""
    (folder / "cases.json").write_text(json.dumps(cases))
    worker = Path(__file__).with_name("deepspeed_worker.py")
    command = [sys.executable, str(worker), str(folder / "cases.json"), str(folder / "results.json")]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "0",
    }
    log = folder / "ranks.log"
    with log.open("w") as output:
        ranks = [
            subprocess.Popen(
                command,
                env={**environment, "RANK": rank, "LOCAL_RANK": rank},
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for rank in ("0", "1")
        ]
        try:
            deadline = time.monotonic() + LAUNCH_TIMEOUT_S
            # A rank whose partner has died waits for it until its own timeout.
            while time.monotonic() < deadline and None in [rank.poll() for rank in ranks]:
                if any(rank.returncode for rank in ranks):
                    break
                time.sleep(0.2)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], log.read_text()[-4000:]
    return json.loads((folder / "results.json").read_text())
