"""Test the optimizers with Accelerate, without DeepSpeed, on two gloo CPU ranks.

Oracles: torch.optim.AdamW in the same run; for AdaXW a loop in plain PyTorch. One launch runs all cases. The first test
takes more than 5 s for this reason.
"""

from typing import Any

import pytest
import torch.distributed as dist
from sharding_launch import launch

pytest.importorskip("accelerate")
pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)

Case = dict[str, Any]
FSDP2 = {"sharding": "fsdp2"}
FLOAT16 = {"precision": "fp16", "scaled": True, "overflow_at": 2}
BITS = 0.0
# FSDP2 casts weights and gradients to 16 bits, autocast casts activations.
OTHER_CASTS = 1e-3
# name -> (case, largest deviation of AdaXW from plain PyTorch)
TRAINED: dict[str, tuple[Case, float]] = {
    "ddp": ({}, BITS),
    "ddp-bfloat16-own-clipping": ({"precision": "bf16", "options": {"max_grad_norm": 0.1}}, BITS),
    "ddp-float16-clipped": ({**FLOAT16, "clip": 0.1}, BITS),
    "ddp-accumulation-clipped": ({"accumulate": 2, "clip": 0.1}, BITS),
    "ddp-split-batches-clipped-values": ({"split_batches": True, "clip_value": 1e-3}, BITS),
    "fsdp2-8bit-frozen": ({**FSDP2, "options": {"states": "8bit"}, "frozen": True}, BITS),
    "fsdp2-keep-float32-full-state-dict": (
        {
            **FSDP2,
            "plugin": {"cpu_ram_efficient_loading": True, "state_dict_type": "FULL_STATE_DICT"},
            "options": {"states": "8bit"},
            "keep_first": True,
        },
        BITS,
    ),
    "fsdp2-accumulation-clipped": ({**FSDP2, "accumulate": 2, "clip": 0.1}, BITS),
    "fsdp2-bfloat16-own-clipping": ({**FSDP2, "precision": "bf16", "options": {"max_grad_norm": 0.1}}, OTHER_CASTS),
    "fsdp2-float16": ({**FSDP2, **FLOAT16}, OTHER_CASTS),
    "fsdp1-clipped": (
        {
            "sharding": "fsdp1",
            "plugin": {  # torch crashes with a full state dict on CPUs
                "cpu_ram_efficient_loading": False,
                "use_orig_params": True,
                "state_dict_type": "SHARDED_STATE_DICT",
            },
            "clip": 0.1,
        },
        BITS,
    ),
}
OTHERS: dict[str, Case] = {
    "fused-overflow": {"run": "fused_overflow", **FLOAT16},
    "two-models": {"run": "two_models", "scaled": True},
    "local-sgd": {"run": "local_sgd"},
    "keeps-states": {"run": "keeps_states"},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    cases = {name: case for name, (case, _) in TRAINED.items()} | OTHERS
    return launch(tmp_path_factory.mktemp("accelerate"), 2, cases, worker="accelerate_worker.py")


@pytest.mark.parametrize("name", TRAINED)
def test_follows_torch_and_plain_pytorch(results: dict[str, list[dict[str, Any]]], name: str) -> None:
    case, tolerance = TRAINED[name]
    for result in results[name]:
        assert result["deviation"] < 2e-6
        assert result["norm_deviation"] < 2e-6
        assert result["same_events"]  # of the learning rate and of skipped steps
        assert result["skipped"] == ([2] if "overflow_at" in case else [])
        assert result["plain_deviation"] <= tolerance
        assert result["plain_norms"] == pytest.approx(result["norms"], rel=1e-6, nan_ok=True)
        assert bool(result["norms"]) == ("clip" in case)
        assert result["moved"] > 3e-3


@pytest.mark.parametrize("name", [name for name in TRAINED if not name.startswith("fsdp1")])
def test_resumes_bit_for_bit(results: dict[str, list[dict[str, Any]]], name: str) -> None:
    case, _ = TRAINED[name]
    for result in results[name]:
        assert result["resume_deviation"] == 0.0
        assert not (case.get("frozen") and result["frozen_state"])
        tensor = "DTensor" if name.startswith("fsdp2") else "Tensor"
        quantized = "states" in case.get("options", {}) and "keep_first" not in case
        assert result["exp_avg"] == f"{tensor} torch.{'uint8' if quantized else 'float32'}"


def test_fsdp1_restores_no_states_with_either_optimizer(results: dict[str, list[dict[str, Any]]]) -> None:
    for result in results["fsdp1-clipped"]:
        assert result["restored"] == [0, 0]


def test_skipped_step_of_a_fused_optimizer_advances_the_schedule(results: dict[str, list[dict[str, Any]]]) -> None:
    for result in results["fused-overflow"]:
        assert result["adax_triton"] == result["torch.optim"]
        assert not result["adax_triton"]["seen"] and result["adax_triton"]["counts"] == [5]
        assert len(set(result["adax_triton"]["rates"])) == 6


def test_two_models_share_a_scaler(results: dict[str, list[dict[str, Any]]]) -> None:
    for result in results["two-models"]:
        assert result["skipped"] == [[1, 1]]
        assert result["deviation"] < 2e-6
        assert result["resume_deviation"] == 0.0


def test_local_sgd_averages_the_weights(results: dict[str, list[dict[str, Any]]]) -> None:
    for result in results["local-sgd"]:
        assert result == {"deviation": pytest.approx(0.0, abs=2e-6), "between_ranks": 0.0}


def test_prepare_and_checkpoints_keep_states_and_free_memory_frees_them(
    results: dict[str, list[dict[str, Any]]],
) -> None:
    for result in results["keeps-states"]:
        assert result == {"kept": True, "restored": True, "freed": True}
