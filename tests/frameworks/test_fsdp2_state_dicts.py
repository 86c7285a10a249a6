"""FSDP2 as torchtitan uses it: mixed precision, state dict options, containers (fsdp2_worker.py).

Oracles: the same run with torch's AdamW to rounding, and one process with the same gradients bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from sharding_launch import Results, launch

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

MODES = ("float32", "8bit_v16", "8bit, 24bit")
TRAINING: dict[str, dict[str, Any]] = {
    "mixed precision": {"check": "training", "mixed": True},
    "no reshard": {"check": "training", "reshard_after_forward": False},
    "CPU offload": {"check": "training", "offload": True},
    "compiled blocks": {"check": "training", "compile": True},
}
HSDP: dict[str, dict[str, Any]] = {"HSDP": {"check": "training", "hsdp": True}}
OPTIONS = {f"options of {mode}": {"check": "options", "mode": mode, "lr": 1e-2} for mode in MODES}
CONTAINERS = {f"containers of {mode}": {"check": "containers", "mode": mode} for mode in ("float32", "8bit_v16")}
PRECISIONS = {
    f"{saved} to {mode}": {"check": "precision", "saved": saved, "mode": mode}
    for saved, mode in (("float32", "8bit_v16"), ("8bit_v16", "float32"), ("8bit, 24bit", "bfloat16, float32"))
}
RANKS = {f"ranks of {mode}": {"check": "ranks", "mode": mode} for mode in ("8bit_v16", "bfloat16, float32")}
ROUNDING = 1e-6  # of weights near 1 after a few steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp2")


# Takes more than 5 s: one launch trains some hundred small models.
@pytest.fixture(scope="module")
def two(folder: Path) -> Results:
    once = {name: {"check": name} for name in ("first step", "without state")}
    cases = TRAINING | OPTIONS | CONTAINERS | PRECISIONS | RANKS | once
    return launch(folder, 2, cases, worker="fsdp2_worker.py")


@pytest.fixture(scope="module")
def four(folder: Path, two: Results) -> Results:
    return launch(folder, 4, RANKS | HSDP, worker="fsdp2_worker.py")


def check_training(results: list[dict[str, Any]], limit: float) -> None:
    for result in results:
        assert result["torch"] < limit
        assert result["differing"] == []


@pytest.mark.parametrize("case", TRAINING)
def test_training_equals_torchs_adamw_and_one_process(two: Results, case: str) -> None:
    # In mixed precision a rounded bfloat16 weight may change a gradient.
    check_training(two[case], 1e-4 if case == "mixed precision" else ROUNDING)


def test_hsdp_equals_torchs_adamw_and_one_process(four: Results) -> None:
    check_training(four["HSDP"], ROUNDING)


@pytest.mark.parametrize("case", OPTIONS)
def test_each_state_dict_option_restores_the_run(two: Results, case: str) -> None:
    for result in two[case]:
        assert len(result) == 16
        assert {name: wrong for name, wrong in result.items() if wrong} == {}


def test_state_dict_before_the_first_step_is_as_with_torchs_adamw(two: Results) -> None:
    for result in two["first step"]:
        assert result["kept"] == [0.0, 0.0]
        assert result["counts"] == [[1], [1]]
        assert result["torch"] < ROUNDING


def test_parameter_without_state_stays_without_state(two: Results) -> None:
    assert two["without state"] == [{"differing": [], "resumed": []}] * 2


@pytest.mark.parametrize("case", CONTAINERS)
def test_torchtitans_containers_resume_and_step_in_backward(two: Results, case: str) -> None:
    for result in two[case]:
        assert {name: wrong for name, wrong in result.items() if wrong} == {}


@pytest.mark.parametrize("case", PRECISIONS)
def test_checkpoint_of_another_precision_raises_and_converts(two: Results, case: str) -> None:
    for result in two[case]:
        assert "Missing key in checkpoint" in result["error"] or "Size mismatch" in result["error"]
        assert result["kept"] == result["converted"] == []
        # torch drops the exponents of a flat state dict that the loading optimizer does not have.
        refused = f"; load it into an optimizer with states={case.split(' to ')[0].split(',')[0]!r}, then load its "
        assert result["flat"] == "[]" if case.startswith("float32") else refused in result["flat"]
        assert result["sharded"] == result["full"] == "[]"


@pytest.mark.parametrize("case", RANKS)
def test_flat_checkpoint_of_two_ranks_loads_on_four(four: Results, case: str) -> None:
    assert [result["differing"] for result in four[case]] == [[]] * 4
