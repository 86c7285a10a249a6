"""What every worker of DeepSpeed cases does on its rank, but for running a case."""

import json
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

Case = dict[str, Any]


def start() -> None:
    """Meet the other ranks."""
    # An inference-only kernel that DeepSpeed would compile for every new environment.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=120), verbose=False)


def run_cases(
    cases_path: str,
    results_path: str,
    defaults: Mapping[str, Any],
    run: Callable[[Case], Any],
    others: Mapping[str, Any] | None = None,
) -> None:
    """Run the cases of a file, write {case name: result} on rank 0, and leave the other ranks.

    Args:
        cases_path: a JSON list of dictionaries, each with a name.
        results_path: of the JSON file to write. The result of a case that raises is {"failure": traceback}.
        defaults: of every case.
        run: returns the result of a case.
        others: results of no case. Default: None.
    """
    results = dict(others or {})
    for given in json.loads(Path(cases_path).read_text()):
        case = {**defaults, **given}
        try:
            results[case["name"]] = run(case)
        except Exception:
            results[case["name"]] = {"failure": traceback.format_exc()}
    if dist.get_rank() == 0:
        Path(results_path).write_text(json.dumps(results))
    dist.destroy_process_group()
