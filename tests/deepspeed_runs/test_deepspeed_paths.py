"""AdaX with DeepSpeed's schedulers, experts, compiled engines, offload, and settings that raise.

Oracle and worker as in test_deepspeed.py; the schedulers' learning rates and betas are computed here.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.deepspeed

STEPS = 4
# The largest parameters are about 3. One unit in the last place of a value below 1 is 6e-8.
FP32_TOLERANCE = 1e-7

Case = dict[str, Any]
GROUP_LRS = (1e-2, 1e-2, 3e-3)  # of the three groups of the model
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
BF16_MASTERS = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}


def named(cases: dict[str, Case]) -> list[Any]:
    return [pytest.param({"name": name, **case}, id=name) for name, case in cases.items()]


def scheduled(kind: str, settings: dict[str, Any], by_step: list[dict[str, Any]], **case: Any) -> Case:
    hyperparameters = [[values] * len(GROUP_LRS) for values in by_step]
    return {"config": {"scheduler": {"type": kind, "params": settings}}, "hyperparameters": hyperparameters, **case}


WARMUP = {"warmup_min_lr": 2e-3, "warmup_max_lr": 1e-2, "warmup_num_steps": 4, "warmup_type": "linear"}
# DeepSpeed's schedulers give the first two steps the same rate.
WARMUP_LRS = [{"lr": 2e-3 + (1e-2 - 2e-3) * share} for share in (0.0, 0.0, 0.25, 0.5)]
COSINE = {"total_num_steps": 6, "warmup_min_ratio": 0.2, "warmup_num_steps": 2, "cos_min_ratio": 0.1}
COSINE_RATIOS = (0.0, 0.2, 0.2 + 0.5 * 0.8, 0.1 + 0.9 * ((1 + math.cos(math.pi * 0.25)) / 2))
CYCLE = {"cycle_min_lr": 1e-3, "cycle_max_lr": 9e-3, "cycle_first_step_size": 2}
CYCLE_SCALES = (0.0, 0.5, 1.0, 0.5)
# DeepSpeed starts with the lowest betas[0] and sets betas[1] to 0.99; the adapter keeps 1e-3 of the configuration.
CYCLE_BETAS = [0.8, *(0.9 - (0.9 - 0.8) * scale for scale in CYCLE_SCALES[1:])]
SCHEDULES = named(
    {
        "z3-warmup": scheduled("WarmupLR", WARMUP, WARMUP_LRS, stage=3, dtype="bf16"),
        "z2-one-cycle": scheduled(
            "OneCycle",
            CYCLE,
            [
                {"lr": 1e-3 + (9e-3 - 1e-3) * scale, "betas": [beta1, 1e-3]}
                for scale, beta1 in zip(CYCLE_SCALES, CYCLE_BETAS, strict=True)
            ],
            stage=2,
            dtype="bf16",
            params={"lr": 1e-2, "weight_decay": 1e-2, "betas": [0.9, 1e-3]},
        ),
        "z0-warmup-cosine": {
            "dtype": "bf16",
            "config": {"scheduler": {"type": "WarmupCosineLR", "params": {**COSINE, "warmup_type": "linear"}}},
            "hyperparameters": [[{"lr": lr * ratio} for lr in GROUP_LRS] for ratio in COSINE_RATIOS],
        },
        "z2-client-step-lr": {
            "stage": 2,
            "dtype": "bf16",
            "client_scheduler": 0.5,
            "hyperparameters": [[{"lr": lr * 0.5**step} for lr in GROUP_LRS] for step in range(STEPS)],
        },
        # A skipped step does not advance the schedule.
        **{
            f"z{stage}-fp16-overflow-warmup": scheduled(
                "WarmupLR", WARMUP, [WARMUP_LRS[0], *WARMUP_LRS[:3]], stage=stage, dtype="fp16", overflow_at=1
            )
            for stage in (1, 2, 3)
        },
    }
)
OTHER_PATHS = named(
    {
        "subclass-instance": {"stage": 2, "dtype": "bf16", "type": "CautiousAdaX", "client": "instance"},
        "subclass-callable": {"stage": 3, "dtype": "bf16", "type": "CautiousAdaX", "client": "callable"},
        **{
            f"z{stage}-{dtype}-unused": {"stage": stage, "dtype": dtype, "unused": True}
            for stage, dtype in ((0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "bf16"))
        },
        "z1-bf16-fp32-accumulation-unused": {
            "stage": 1,
            "dtype": "bf16",
            "unused": True,
            "config": FP32_ACCUMULATION,
            "accumulate_in_fp32": True,
        },
        **{f"z{stage}-compiled": {"stage": stage, "dtype": "bf16", "compile": True} for stage in (0, 1, 2, 3)},
        **{
            f"z{stage}-offloaded-and-reloaded": {
                "stage": stage,
                "dtype": "bf16",
                "offload_at": 1,
                "resume_at": 3,
                "frozen": stage < 3,
            }
            for stage in (1, 2, 3)
        },
        "z3-offloaded-but-weights": {
            "stage": 3,
            "dtype": "bf16",
            "offload_at": 1,
            "offload": ["hp_params", "optim_states", "lp_grads", "contiguous_grad_buffer"],
        },
        **{
            f"z{stage}-{dtype}-cpu-offload": {
                "stage": stage,
                "dtype": dtype,
                "zero": {"offload_optimizer": {"device": "cpu"}},
            }
            for stage, dtype in ((1, "fp32"), (1, "fp16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "fp16"))
        },
        "z3-bf16-parameters-offloaded": {
            "stage": 3,
            "dtype": "bf16",
            "zero": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
        },
        **{
            f"z{stage}-bf16-masters": {
                "stage": stage,
                "dtype": "bf16",
                "config": BF16_MASTERS,
                "params": {"lr": 1e-2, "weight_decay": 1e-2, "states": "bfloat16", "master_weights": "float32"},
                "bf16_masters": True,
                "resume_at": 2,
            }
            for stage in (1, 2, 3)
        },
    }
)
OVERFLOWS = named(
    {
        f"z{stage}-bf16-overflow": {
            "stage": stage,
            "dtype": "bf16",
            "overflow_at": 1,
            "config": {"bf16": {"enabled": True, "check_grad_overflow": True}},
        }
        for stage in (1, 3)
    }
)
EXPERTS = named({f"z{stage}-experts": {"stage": stage, "moe": True, "width": 8} for stage in (0, 1, 2)})


NVME = {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}
SETTINGS_THAT_RAISE = [
    pytest.param({"name": name, "expect_error": True, **case}, words, id=name)
    for name, case, words in (
        ("step-lr", {"stage": 2, "config": {"scheduler": {"type": "StepLR", "params": {"step_size": 1}}}}, ["StepLR"]),
        ("adam-betas", {"stage": 2, "params": {"betas": [0.9, 0.999]}}, ["beta2=0.999", "default 1e-4"]),
        ("max-grad-norm", {"stage": 2, "params": {"max_grad_norm": 1.0}}, ["max_grad_norm", "gradient_clipping"]),
        ("zenflow", {"stage": 2, "zero": {"zenflow": {"overlap_step": False}}}, ["zenflow", "Adam"]),
        ("zenflow-overlap", {"stage": 3, "zero": {"zenflow": {"overlap_step": True}}}, ["zenflow", "Adam"]),
        (
            "super-offload",
            {"stage": 3, "zero": {"offload_optimizer": {"device": "cpu", "super_offload": True}}},
            ["super_offload", "remove it"],
        ),
        ("ratio", {"stage": 3, "zero": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, ["ratio=0.5", "1.0"]),
        ("nvme-z2", {"stage": 2, "zero": NVME}, ["stage=2", '"cpu"']),
        (
            "nvme-z1-fp32-accumulation",
            {"stage": 1, "dtype": "bf16", "zero": NVME, "config": FP32_ACCUMULATION},
            ["stage=1", '"cpu"'],
        ),
        (
            "nvme-pipelined-4-buffers",
            {"stage": 3, "zero": {"offload_optimizer": {**NVME["offload_optimizer"], "pipeline_read": True}}},
            ["buffer_count=4", "set buffer_count to 8"],
        ),
        (
            "bf16-masters-offloaded",
            {"stage": 2, "dtype": "bf16", "config": BF16_MASTERS, "zero": {"offload_optimizer": {"device": "cpu"}}},
            ["bf16_master_weights_and_grads", "CPU Adam"],
        ),
        (
            "bf16-masters-float32-states",
            {"stage": 2, "dtype": "bf16", "config": BF16_MASTERS},
            ['"bfloat16", "8bit_v16" or "8bit"'],
        ),
        (
            "own-masters-and-deepspeeds",
            {"stage": 3, "dtype": "bf16", "params": {"master_weights": "24bit"}},
            ["'24bit'", "bf16_master_weights_and_grads"],
        ),
        (
            "fp16-autocast-clipping",
            {
                "stage": 1,
                "config": {"torch_autocast": {"enabled": True, "dtype": "float16"}, "gradient_clipping": 1.0},
            },
            ["gradient_clipping to 0", "bfloat16"],
        ),
    )
]
FROZEN_OFFLOAD = {"name": "z3-frozen-offloaded", "stage": 3, "dtype": "bf16", "offload_at": 1}


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, launch_deepspeed: Callable[[Path, list[Case]], dict[str, Any]]
) -> dict[str, Any]:
    parameters = (*SCHEDULES, *OTHER_PATHS, *OVERFLOWS, *EXPERTS, *SETTINGS_THAT_RAISE)
    cases = [parameter.values[0] for parameter in parameters]
    return launch_deepspeed(tmp_path_factory.mktemp("deepspeed"), [*cases, FROZEN_OFFLOAD])


def result_of(results: dict[str, Any], case: Case) -> dict[str, Any]:
    result = results[case["name"]]
    assert "failure" not in result, result["failure"]
    return result


def assert_follows_single_process(result: dict[str, Any], case: Case) -> None:
    assert result["deviation"] <= (FP32_TOLERANCE if case.get("dtype", "fp32") == "fp32" else 0.0)
    assert result["moved"] > 1e-3
    assert result["skipped"] == ("overflow_at" in case)
    assert result["steps"] == [STEPS - result["skipped"]]


@pytest.mark.parametrize("case", SCHEDULES)
def test_step_uses_the_values_of_the_scheduler(results: dict[str, Any], case: Case) -> None:
    assert_follows_single_process(result_of(results, case), case)


@pytest.mark.parametrize("case", OTHER_PATHS)
def test_path_follows_single_process(results: dict[str, Any], case: Case) -> None:
    result = result_of(results, case)
    assert_follows_single_process(result, case)
    assert result.get("resume_deviation", 0.0) == 0.0
    assert result["optimizer"] == case.get("type", "AdaX")


@pytest.mark.parametrize("case", OVERFLOWS)
def test_infinite_gradient_on_one_rank_skips_the_step(results: dict[str, Any], case: Case) -> None:
    assert_follows_single_process(result_of(results, case), case)


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_train_alike_at_every_stage(results: dict[str, Any], case: Case) -> None:
    plain, result = result_of(results, EXPERTS[0].values[0]), result_of(results, case)
    assert result["moe_groups"] == [False, True]
    assert result["steps"] == [STEPS]
    assert result["losses"][2] < result["losses"][0]  # the same batch
    assert result["losses"] == pytest.approx(plain["losses"], abs=1e-6)
    for name, weights in plain["weights"].items():
        assert result["weights"][name] == pytest.approx(weights, abs=1e-6)


@pytest.mark.parametrize(("case", "words"), SETTINGS_THAT_RAISE)
def test_setting_raises(results: dict[str, Any], case: Case, words: list[str]) -> None:
    result = result_of(results, case)
    assert result["error"] == "ValueError"
    for word in words:
        assert word in result["message"]


def test_weights_of_frozen_models_are_not_offloaded_at_stage_3(results: dict[str, Any]) -> None:
    assert "ValueError: offload_states with lp_params" in results[FROZEN_OFFLOAD["name"]]["failure"]
