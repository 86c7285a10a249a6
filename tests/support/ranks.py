"""Run a script on several ranks; all processes end with the call."""

from __future__ import annotations

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

LAUNCH_TIMEOUT_S = 900
# torch and DeepSpeed read these when they are imported.
SHARED_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


def run_ranks(
    script: Path,
    arguments: Sequence[str],
    world_size: int,
    folder: Path,
    environment: Mapping[str, str],
    log: Path,
    timeout: float = LAUNCH_TIMEOUT_S,
) -> None:
    """Run a script on all ranks; a failure raises the log's end.

    The ranks have `RANK`, `LOCAL_RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`, one thread each and no GPU.
    rank_server.py forks them.

    Args:
        script: Python file.
        arguments: command-line arguments of the script.
        world_size: number of ranks.
        folder: working folder of the ranks.
        environment: variables of all ranks, including `TRITON_INTERPRET`.
        log: file for the output of all ranks; overwritten.
        timeout: seconds after which the ranks are killed.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # torch looks for ninja here
    shared = {**os.environ, "PATH": path, **SHARED_ENVIRONMENT, **rendezvous, **environment}
    log.write_text("")
    request = {
        "script": str(script),
        "arguments": list(arguments),
        "environments": [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)],
        "folder": str(folder),
        "log": str(log),
        "timeout": timeout,
    }
    server = rank_server(environment["TRITON_INTERPRET"])
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    assert json.loads(server.stdout.readline()) == [0] * world_size, log.read_text()[-4000:]


@functools.cache
def rank_server(interpret: str) -> subprocess.Popen[str]:
    """Start rank_server.py, which ends with this process."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("rank_server.py"))],
        env={**os.environ, **SHARED_ENVIRONMENT, "TRITON_INTERPRET": interpret},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.kill)
    return server
