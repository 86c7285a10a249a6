"""Fork ranks from a process that has imported torch and DeepSpeed, which takes seconds in a new one.

Usage, by ranks.py: TRITON_INTERPRET=... python rank_server.py. Each line of the input is a JSON object:

    script, arguments: what every rank runs, as `python script *arguments`
    environments: the environment variables of each rank
    folder: the working folder
    log: the file that the output of all ranks goes to
    timeout: seconds after which the ranks are killed

The answer is a line with a JSON list of exit codes. A rank that fails has the others killed. No rank outlives its
request, nor the process that made it: the end of the input has them killed, too.
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
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  takes torch._inductor along, as ranks would
import torch  # noqa: F401

POLL_S = 0.02


def serve(answers: TextIO) -> None:
    if len(threads := os.listdir("/proc/self/task")) > 1:
        raise RuntimeError(f"{len(threads)} threads: a process that has threads cannot be forked safely")
    gc.freeze()  # DeepSpeed collects garbage a dozen times for each engine: what is imported is none
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
            os.killpg(pid, signal.SIGKILL)  # with the processes that it has started
            exits[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [exits[pid] for pid in ranks]


def start(request: dict[str, Any], environment: dict[str, str]) -> int:
    """Fork one rank, and return its process id."""
    pid = os.fork()
    if pid:
        with contextlib.suppress(PermissionError, ProcessLookupError):  # the rank has done it, and gone on
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
    os.dup2(2, 1)  # what ranks and imports print is no answer
    serve(answers)
