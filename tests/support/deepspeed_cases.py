"""Shared setup and result files of the DeepSpeed workers."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

Case = dict[str, Any]

RANKS_TIMEOUT = timedelta(seconds=120)


def start() -> None:
    """Initialise the process group."""
    # DeepSpeed would compile this inference-only kernel for every new environment.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", timeout=RANKS_TIMEOUT, verbose=False)


def run_cases(
    cases_path: str,
    results_path: str,
    defaults: Mapping[str, Any],
    run: Callable[[Case], Any],
    others: Mapping[str, Any] | None = None,
) -> None:
    """Run a file's cases and write the results on rank 0.

    Rank 0 writes {case name: result}. The process group ends afterwards.

    Args:
        cases_path: a JSON list of dictionaries, each with a name.
        results_path: the JSON file to write. If a case raises on any rank, its result is {"failure": tracebacks}. If
            it raises on some ranks while the others wait, this process ends.
        defaults: default values of every case.
        run: returns the result of a case.
        others: more entries of the results file. Default: None.
    """
    results = dict(others or {})
    for given in json.loads(Path(cases_path).read_text()):
        case = {**defaults, **given}
        result = failure = None
        try:
            result = run(case)
        except Exception:
            failure = traceback.format_exc()
            print(f"{case['name']} on rank {dist.get_rank()}:\n{failure}", file=sys.stderr, flush=True)
        shared = Path(f"{results_path}.{os.environ['MASTER_PORT']}.{len(results)}")  # of this launch and case
        found = "\n".join(filter(None, failures_of_ranks(shared, failure)))
        results[case["name"]] = {"failure": found} if found else result
    if dist.get_rank() == 0:
        Path(results_path).write_text(json.dumps(results))
    dist.destroy_process_group()


def failures_of_ranks(shared: Path, failure: str | None) -> list[str | None]:
    """Return the failure of each rank, exchanged by files.

    After a failure, collectives may be out of sync.

    Args:
        shared: prefix of the files.
        failure: the traceback of this rank, or None.

    Raises:
        TimeoutError: a rank has written no file.
    """
    own = Path(f"{shared}.{dist.get_rank()}")
    part = Path(f"{own}.part")
    part.write_text(json.dumps(failure))
    part.rename(own)
    files = [Path(f"{shared}.{rank}") for rank in range(dist.get_world_size())]
    deadline = time.monotonic() + RANKS_TIMEOUT.total_seconds()
    while not all(file.exists() for file in files):
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{', '.join(file.name for file in files if not file.exists())} not written within {RANKS_TIMEOUT}"
            )
        time.sleep(0.01)
    return [json.loads(file.read_text()) for file in files]
