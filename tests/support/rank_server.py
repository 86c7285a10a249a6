"""Fork ranks from a process that has already imported torch and DeepSpeed.

ranks.py runs `TRITON_INTERPRET=... python rank_server.py`. Each line of stdin is a JSON object:

    script, arguments: each rank runs `python script *arguments`
    environments: the environment variables of each rank
    folder: the working folder
    log: file for the output of all ranks
    timeout: seconds after which the ranks are killed

The answer is a line of stdout with a JSON list of exit codes. If one rank fails, or stdin ends, the server kills all
ranks. No rank outlives its request.
"""

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

with contextlib.suppress(ImportError):
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  also imports torch._inductor
import torch  # noqa: F401

POLL_S = 0.02


def serve(answers: TextIO) -> None:
    if len(threads := os.listdir("/proc/self/task")) > 1:
        raise RuntimeError(f"rank_server.py has {len(threads)} threads; only a process with one thread can fork safely")
    gc.freeze()  # skip imported objects: DeepSpeed collects garbage a dozen times per engine
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        print(json.dumps(run(request)), file=answers, flush=True)


def run(request: dict[str, Any]) -> list[int]:
    ranks = [start(request, environment) for environment in request["environments"]]
    exits: dict[int, int] = {}
    deadline = time.monotonic() + request["timeout"]
    while len(exits) < len(ranks) and not any(exits.values()) and time.monotonic() < deadline:
        if select.select([sys.stdin], [], [], POLL_S)[0]:
            break
        for pid in ranks:
            if pid not in exits and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                exits[pid] = os.waitstatus_to_exitcode(ended[1])
    for pid in ranks:
        if pid not in exits:
            os.killpg(pid, signal.SIGKILL)  # with its child processes
            exits[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [exits[pid] for pid in ranks]


def start(request: dict[str, Any], environment: dict[str, str]) -> int:
    """Fork a rank and return its process id."""
    pid = os.fork()
    if pid:
        with contextlib.suppress(PermissionError, ProcessLookupError):  # the rank has set it already
            os.setpgid(pid, pid)
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(descriptor, target)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(request["folder"])
        sys.argv = [request["script"], *request["arguments"]]
        sys.path.insert(0, str(Path(request["script"]).parent))
        runpy.run_path(request["script"], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep stdout for answers: prints of ranks and imports go to stderr
    serve(answers)
