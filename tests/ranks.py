"""Processes that work together, one per rank, none of which outlives the call."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

LAUNCH_TIMEOUT_S = 900


def run_ranks(
    script: Path, arguments: Sequence[str], world_size: int, folder: Path, environment: Mapping[str, str], log: Path
) -> None:
    """Run a script on every rank, in a folder, and fail with the end of the log if one of them does.

    The ranks see `RANK`, `LOCAL_RANK`, `WORLD_SIZE` and an address to meet at; no GPU, and one thread each.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    with log.open("w") as output:
        ranks = [
            subprocess.Popen(
                [sys.executable, str(script), *arguments],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for rank in range(world_size)
        ]
        try:
            deadline = time.monotonic() + LAUNCH_TIMEOUT_S
            # A rank whose partner has died waits for it until its own timeout.
            while time.monotonic() < deadline and None in [rank.poll() for rank in ranks]:
                if any(rank.returncode for rank in ranks):
                    break
                time.sleep(0.1)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * world_size, log.read_text()[-4000:]
