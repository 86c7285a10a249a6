"""Test the launcher of multi-rank tests.

If a rank fails, the launch fails and the other ranks end.

As a script this file is one rank: python test_ranks.py CASES.json RESULTS.json. A case names the rank that raises and
says whether the other rank waits for it in a collective.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.deepspeed

ENDED_WITHIN_S = 60.0  # half of the collective timeout


def launch(folder: Path, *cases: dict[str, Any]) -> dict[str, Any]:
    (folder / "cases.json").write_text(json.dumps(cases))
    arguments = [str(folder / name) for name in ("cases.json", "results.json")]
    run_ranks(Path(__file__).resolve(), arguments, 2, folder, {"TRITON_INTERPRET": "0"}, folder / "log")
    return json.loads((folder / "results.json").read_text())


def test_failure_of_any_rank_fails_the_case(tmp_path: Path) -> None:
    cases = [{"name": str(rank), "fails": rank, "waits": False} for rank in (0, 1, None)]
    results = launch(tmp_path, *cases)
    assert "ArithmeticError: on rank 0" in results["0"]["failure"]
    assert "ArithmeticError: on rank 1" in results["1"]["failure"]
    assert results["None"] == [0]


@pytest.mark.parametrize("rank", [0, 1])
def test_failure_ends_a_waiting_rank(tmp_path: Path, rank: int) -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=f"ArithmeticError: on rank {rank}"):
        launch(tmp_path, {"name": "case", "fails": rank, "waits": True, "patience": 1.0})
    assert time.monotonic() - start < ENDED_WITHIN_S


def test_ranks_get_environment_arguments_and_folder(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print(os.environ['RANK'], os.environ['OWN'], sys.argv[1:], os.getcwd())")
    run_ranks(script, ["given"], 2, tmp_path, {"TRITON_INTERPRET": "0", "OWN": "value"}, tmp_path / "log")
    assert sorted((tmp_path / "log").read_text().splitlines()) == [f"{i} value ['given'] {tmp_path}" for i in (0, 1)]


def test_timeout_kills_ranks_and_their_children(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open(os.environ['RANK'], 'w').write(f'{os.getpid()} {child.pid}')\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(AssertionError):
        run_ranks(script, [], 2, tmp_path, {"TRITON_INTERPRET": "0"}, tmp_path / "log", timeout=1.0)
    pids = [int(pid) for rank in "01" for pid in (tmp_path / rank).read_text().split()]
    assert len(pids) == 4
    assert not [pid for pid in pids if is_running(pid)]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def run_rank(cases_path: str, results_path: str) -> None:
    from datetime import timedelta

    import deepspeed_cases
    import torch.distributed as dist

    def run(case: dict[str, Any]) -> list[int]:
        if "patience" in case:
            deepspeed_cases.RANKS_TIMEOUT = timedelta(seconds=case["patience"])
        if case["fails"] == int(os.environ["RANK"]):
            raise ArithmeticError(f"on rank {os.environ['RANK']}")
        if case["waits"]:
            dist.barrier()
        return [0]

    deepspeed_cases.start()
    deepspeed_cases.run_cases(cases_path, results_path, {}, run)


if __name__ == "__main__":
    run_rank(*sys.argv[1:])
