"""Test low-memory states with real DeepSpeed engines on two gloo CPU ranks.

Oracle and worker: as in test_deepspeed.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.deepspeed

Case = dict[str, Any]
CPU_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
STEPS = 4
# Wide enough that the flat partitions of both ranks have quantized states.
CASES: list[Case] = [
    {
        "name": f"z{stage}-bf16-{states}{'-cpu-offload' if zero else ''}",
        "stage": stage,
        "dtype": "bf16",
        "params": {"lr": 1e-2, "weight_decay": 1e-2, "states": states},
        "width": 128,
        "resume_at": 2,
        "zero": zero,
    }
    for stage, states, zero in (
        *((0, "8bit_v16", {}), (1, "bfloat16", {}), (1, "8bit_v16", {}), (2, "8bit", {}), (2, "8bit_v16", CPU_OFFLOAD)),
        *((3, "8bit_v16", {}), (3, "8bit", CPU_OFFLOAD)),
    )
]
# Here the optimizer keeps master weights, and DeepSpeed keeps none.
OWN_MASTERS: list[Case] = [
    {
        "name": f"z{stage}-own-masters-{states}",
        "stage": stage,
        "dtype": "bf16",
        "params": {"lr": 1e-2, "weight_decay": 1e-2, "states": states, "master_weights": masters},
        "config": {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
        "bf16_masters": True,
        "width": 128,
        "resume_at": 2,
    }
    for stage, states, masters in ((1, "bfloat16", "float32"), (2, "8bit_v16", "24bit"), (3, "8bit", "24bit"))
]


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, launch_deepspeed: Callable[[Path, list[Case]], dict[str, Any]]
) -> dict[str, Any]:
    return launch_deepspeed(tmp_path_factory.mktemp("deepspeed"), [*CASES, *OWN_MASTERS])


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_low_memory_states_follow_single_process_and_resume(results: dict[str, Any], case: Case) -> None:
    result = results[case["name"]]
    assert "failure" not in result, result["failure"]
    if case["stage"] == 0:
        assert result["deviation"] == 0.0
    else:
        # Random bits depend on the index in the partition, so rounding differs from that in one process.
        assert 0.0 < result["deviation"] < 0.2 * result["moved"]
    assert result["moved"] > 5e-3
    assert result["steps"] == result["resume_steps"] == [STEPS]
    assert result["resume_deviation"] == 0.0


@pytest.mark.parametrize("case", OWN_MASTERS, ids=[case["name"] for case in OWN_MASTERS])
def test_own_masters_and_states_replace_deepspeeds(results: dict[str, Any], case: Case) -> None:
    result = results[case["name"]]
    assert "failure" not in result, result["failure"]
    dtypes = {"bfloat16": "torch.bfloat16", "8bit_v16": "torch.uint8", "8bit": "torch.uint8"}
    assert dtypes[case["params"]["states"]] in result["states"]
    assert result["deviation"] <= 2.0**-6  # one unit in the last place of a bfloat16 weight below 4
    assert result["moved"] >= 2.0**-7
    assert result["steps"] == result["resume_steps"] == [STEPS]
    assert result["resume_deviation"] == 0.0
