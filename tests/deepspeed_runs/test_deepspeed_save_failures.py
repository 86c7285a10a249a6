"""A DeepSpeed save or load error on one rank raises on all.

Every rank raises at once, and no checkpoint is damaged. One pair of processes, deepspeed_save_failures_worker.py, runs
all cases with real DeepSpeed.
"""

import errno
import json
import os
from typing import Any

import pytest
from paths import SUPPORT
from ranks import run_ranks

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.deepspeed

SECONDS = 10  # ranks that hang end after 30


def failure(action: str, stage: int, function: str, error: str, rank: int, call: int = 1, **options: bool) -> Any:
    name = "-".join([f"{action}-z{stage}-{function.rpartition('.')[2]}-{error}-rank{rank}-call{call}", *options])
    keys = ("name", "action", "stage", "function", "error", "rank", "call", "options")
    values = (name, action, stage, function, error, rank, call, options)
    return pytest.param(dict(zip(keys, values, strict=True)), id=name)


# Rank 0 writes two files, rank 1 one. Only rank 0 creates folders, renames and flushes.
SAVES = [
    failure("save", 2, "torch.save", "ENOSPC", 0),
    failure("save", 2, "torch.save", "ENOSPC", 1),
    failure("save", 3, "torch.save", "ENOSPC", 0, call=2),
    failure("save", 2, "torch.save", "full", 1),
    failure("save", 3, "torch.save", "EACCES", 1),
    failure("save", 2, "torch.save", "vanishes", 0),
    failure("save", 3, "torch.save", "vanishes", 1),
    failure("save", 2, "os.mkdir", "EACCES", 0),
    failure("save", 2, "os.rename", "ENOSPC", 0),  # the trial rename
    failure("save", 3, "os.rename", "EIO", 0, call=2),  # the checkpoint
    failure("save", 2, "os.replace", "ENOSPC", 0),  # complete.json
    failure("save", 2, "os.fsync", "EIO", 0),
    failure("save", 3, "deepspeed.runtime.engine.copyfile", "ENOSPC", 0),  # zero_to_fp32.py
]
LOADS = [
    failure("load", 2, "os.listdir", "ENOENT", 1),
    failure("load", 2, "os.path.getsize", "EACCES", 0),
    failure("load", 3, "os.access", "EACCES", 1, call=2),
    *(
        failure("load", stage, "torch.load", "EIO", rank, call)
        for stage in (2, 3)
        for rank in (0, 1)
        for call in (1, 3)
    ),
    failure("load", 3, "torch.load", "vanishes", 1, call=3),
    failure("load", 3, "torch.load", "EIO", 1, call=4, load_optimizer_states=False),
]
# Fail at the second file of weights: DeepSpeed gathers the weights after reading it.
UNIVERSALS = [failure("universal", stage, "torch.load", "EIO", 1, call=6) for stage in (2, 3)]
FILE_SYSTEMS = [
    pytest.param({"name": f"no-{without}-{error}", "without": without, "error": error}, id=f"no-{without}-{error}")
    for without, error in (("fsync", "EINVAL"), ("rename", "ENOSYS"), ("rename", "EMFILE"))
]

Results = list[dict[str, Any]]  # one for each rank


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("failures")
    cases = [parameter.values[0] for parameter in (*SAVES, *LOADS, *UNIVERSALS, *FILE_SYSTEMS)]
    (folder / "cases.json").write_text(json.dumps(cases))
    worker = SUPPORT / "deepspeed_save_failures_worker.py"
    arguments = [str(folder / "cases.json"), str(folder)]
    run_ranks(worker, arguments, 2, folder, {"TRITON_INTERPRET": "0"}, folder / "ranks.log")
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def assert_raised_on_both_ranks(found: Results, rank: int, error: str) -> None:
    assert found[0]["error"] == found[1]["error"]
    assert max(of_rank["seconds"] for of_rank in found) < SECONDS
    if error == "vanishes":  # the other rank may notice it first
        assert "rank " in found[0]["error"]
    else:
        number = errno.ENOSPC if error == "full" else getattr(errno, error)
        assert f"rank {rank}: {os.strerror(number)}" in found[0]["error"]


@pytest.mark.parametrize("case", SAVES)
def test_failed_save_raises_on_every_rank_and_publishes_nothing(results: Results, case: dict[str, Any]) -> None:
    found = [of_rank[case["name"]] for of_rank in results]
    assert_raised_on_both_ranks(found, case["rank"], case["error"])
    for of_rank in found:
        assert of_rank["latest_stayed"]
        assert [name for name in of_rank["left"] if not name.endswith(".saving")] == []
        assert of_rank["left"] == [] or case["call"] == 2  # complete, but its rename failed
        assert of_rank["saved_then"]


@pytest.mark.parametrize("case", LOADS)
def test_failed_load_raises_on_every_rank(results: Results, case: dict[str, Any]) -> None:
    found = [of_rank[case["name"]] for of_rank in results]
    assert_raised_on_both_ranks(found, case["rank"], case["error"])
    assert all(of_rank["saved_then"] for of_rank in found)


@pytest.mark.parametrize("case", UNIVERSALS)
def test_failed_load_of_a_universal_checkpoint_raises_on_every_rank(results: Results, case: dict[str, Any]) -> None:
    found = [of_rank[case["name"]] for of_rank in results]
    assert_raised_on_both_ranks(found, case["rank"], case["error"])
    assert [of_rank["loaded"] for of_rank in found] == [0.0, 0.0]


@pytest.mark.parametrize("stage", [2, 3])
def test_training_continues_exactly_after_failures(results: Results, stage: int) -> None:
    assert [of_rank[f"stage-{stage}"]["deviation"] for of_rank in results] == [0.0, 0.0]


@pytest.mark.parametrize("case", FILE_SYSTEMS)
def test_file_system_without_an_operation_gets_complete_checkpoints(results: Results, case: dict[str, Any]) -> None:
    found = [of_rank[case["name"]] for of_rank in results]
    assert_raised_on_both_ranks(found, 1, "ENOSPC")
    assert [len(of_rank["warnings"]) for of_rank in found] == [1, 0]
    assert os.strerror(getattr(errno, case["error"])) in found[0]["warnings"][0]
    for of_rank in found:
        assert of_rank["loaded"] == 0.0
        assert of_rank["folder_first"] == ""
        assert "third is not a complete checkpoint; complete checkpoints: second, first" in of_rank["folder_third"]
        assert of_rank["names"] == ["first", "second", *(["third"] if case["without"] == "rename" else [])]
