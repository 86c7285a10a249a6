"""Run the launches of deepspeed_checkpoint_worker.py one after another, each on its number of ranks.

Usage: python deepspeed_checkpoint_launch.py CASES.json FOLDER LAUNCH...

FOLDER/results.json becomes {case name: [result of each leg]}. No process outlives the script.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LAUNCH_TIMEOUT_S = 900
RANKS_OF_LAUNCH = {"0": 1, "1": 2, "2": 1}


def main(cases_path: str, folder: str, *launches: str) -> None:
    results: dict[str, Any] = {}
    for launch in launches:
        log = Path(folder) / f"ranks-{launch}.log"
        returned = run_ranks(cases_path, folder, launch, log)
        if returned != [0] * RANKS_OF_LAUNCH[launch]:
            sys.exit(f"launch {launch} returned {returned}: {log.read_text()[-4000:]}")
        for name, legs in json.loads((Path(folder) / f"results-{launch}.json").read_text()).items():
            if not isinstance(legs, list):
                sys.exit(f"{name}: {legs['failure']}")
            results.setdefault(name, []).extend(legs)
    (Path(folder) / "results.json").write_text(json.dumps(results))


def run_ranks(cases_path: str, folder: str, launch: str, log: Path) -> list[int | None]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    world_size = RANKS_OF_LAUNCH[launch]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "0",
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",  # also where DeepSpeed asks for the contrary: nothing of ours needs it
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # where torch looks for ninja
    }
    worker = Path(__file__).with_name("deepspeed_checkpoint_worker.py")
    with log.open("w") as output:
        ranks = [
            subprocess.Popen(
                [sys.executable, str(worker), cases_path, folder, launch],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for rank in range(world_size)
        ]
        try:
            deadline = time.monotonic() + LAUNCH_TIMEOUT_S
            while time.monotonic() < deadline and None in [rank.poll() for rank in ranks]:
                if any(rank.returncode for rank in ranks):
                    break
                time.sleep(0.2)
            return [rank.returncode for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
