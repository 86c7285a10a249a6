"""Test frozen integer weights, as in QLoRA, at supported ZeRO stages."""

import json
from pathlib import Path

import pytest
from paths import SUPPORT
from ranks import run_ranks

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.deepspeed


def test_frozen_integers_train_and_fused_steps_equal_plain_ones(tmp_path: Path) -> None:
    worker, result = SUPPORT / "deepspeed_frozen_worker.py", tmp_path / "result.json"
    run_ranks(worker, [str(result)], 2, tmp_path, {"TRITON_INTERPRET": "0"}, tmp_path / "log")
    found = json.loads(result.read_text())
    assert len(found) == 12
    assert {case: outcome for case, outcome in found.items() if outcome != "equal"} == {}
