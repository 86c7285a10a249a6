"""Run sharding cases on a rank and compare with an unsharded run.

Usage, once per rank: RANK=... WORLD_SIZE=... python sharding_worker.py CASES.json STORE FOLDER

CASES.json is a list of dictionaries. Writes `RANK.json` next to STORE: {case name: {check: names that differ}}. Keeps
checkpoints of two ranks in FOLDER; four ranks and a single process load them.
"""

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharding_modes import check_mode
from sharding_special import CHECKS
from torch.distributed.device_mesh import init_device_mesh


def main(cases_path: str, store: str, folder: str) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (world_size,))
    results: dict[str, Any] = {}
    for case in json.loads(Path(cases_path).read_text()):
        try:
            check = case.get("check")
            results[case["name"]] = CHECKS[check](case, mesh) if check else check_mode(case, mesh, Path(folder))
        except Exception:
            results[case["name"]] = {"failure": traceback.format_exc()}
            break  # the other ranks may wait in a collective
    Path(store).with_name(f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
