"""Clipping by the norm of several ranks equals one process (clipping_worker.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from sharding_launch import Results, launch

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

CASES: dict[str, dict[str, Any]] = {
    "fsdp2": {"check": "dtensors", "dtype": "float32"},
    "fsdp2, 8bit_v16": {"check": "dtensors", "dtype": "bfloat16", "states": "8bit_v16", "master_weights": "24bit"},
    "manual": {"check": "dtensors", "manual": True},
    "ZeRO-1": {"check": "zero"},
    "unequal parts": {"check": "unequal parts"},
    "idle rank": {"check": "unequal parts", "idle": True},
}
INTERPRETED = ("fsdp2", "manual", "unequal parts", "idle rank")


@pytest.fixture(scope="module", params=["compiled", "interpreted"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of both ranks, with the native kernel or the interpreter."""
    interpreted = request.param == "interpreted"
    cases = {name: case for name, case in CASES.items() if not interpreted or name in INTERPRETED}
    return launch(tmp_path_factory.mktemp("norm"), 2, cases, str(int(interpreted)), "clipping_worker.py")


def of_case(results: Results, case: str) -> list[dict[str, Any]]:
    if case not in results:
        pytest.skip("too slow in the interpreter")
    return results[case]


@pytest.mark.parametrize("case", CASES)
def test_norm_and_step_equal_one_process(results: Results, case: str) -> None:
    for result in of_case(results, case):
        ours, expected = result["norms"]
        assert ours == expected
        assert expected[1] < 100.0 < expected[0]  # one of the two steps is clipped
        assert result["differing"] == []


@pytest.mark.parametrize("case", [case for case in CASES if case != "ZeRO-1"])
def test_nan_on_one_rank_skips_the_step_on_all_ranks(results: Results, case: str) -> None:
    for result in of_case(results, case):
        assert result["skipped"] is True
        assert result["norm"] == "nan"


@pytest.mark.parametrize("case", ["fsdp2", "fsdp2, 8bit_v16", "manual"])
def test_steps_after_a_skipped_step_equal_one_process(results: Results, case: str) -> None:
    for result in of_case(results, case):
        ours, expected = result["more"]
        assert ours == expected
        assert result["differing after"] == []
