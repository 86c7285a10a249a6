"""Fused steps under real DeepSpeed engines on two gloo CPU ranks.

Oracle: the same run with `"fuse": "off"`, which test_deepspeed.py compares with a single process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from packaging.version import Version

deepspeed = pytest.importorskip("deepspeed")
pytestmark = pytest.mark.deepspeed

Case = dict[str, Any]
CPU_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CLIPPING = {"gradient_clipping": 0.1}
BF16_OPTIMIZER = {"data_types": {"grad_accum_dtype": "fp32"}}
BF16_MASTERS = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
FP16_AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
CHECKED_BF16 = {"bf16": {"enabled": True, "check_grad_overflow": True}}
CROSSING = ((1, "bf16"), (2, "fp16"), (3, "fp32"))  # stages and dtypes whose checkpoints are exchanged


def named(cases: dict[str, Case]) -> list[Any]:
    return [pytest.param({"name": name, **case}, id=name) for name, case in cases.items()]


# Every case has three groups, a tied, a frozen and a one-element parameter, which leaves a rank only padding.
EXACT = named(
    {
        f"z{stage}-{dtype}": {"stage": stage, "dtype": dtype, "crossing": (stage, dtype) in CROSSING}
        for stage in (1, 2, 3)
        for dtype in ("bf16", "fp16", "fp32")
    }
    | {
        "z2-bf16-accumulation": {"stage": 2, "dtype": "bf16", "config": {"gradient_accumulation_steps": 3}},
        "z3-bf16-sub-groups-accumulation": {
            "stage": 3,
            "dtype": "bf16",
            "crossing": True,
            "zero": {"sub_group_size": 100},
            "config": {"gradient_accumulation_steps": 3},
        },
        "bf16-optimizer": {"stage": 1, "dtype": "bf16", "config": BF16_OPTIMIZER, "crossing": True},
        "z1-fp16-cpu-offload": {"stage": 1, "dtype": "fp16", "zero": CPU_OFFLOAD},
        "z2-bf16-cpu-offload": {"stage": 2, "dtype": "bf16", "zero": CPU_OFFLOAD, "crossing": True},
        "z3-bf16-cpu-offload": {"stage": 3, "dtype": "bf16", "zero": CPU_OFFLOAD, "crossing": True},
        "z3-fp32-cpu-offload": {"stage": 3, "zero": CPU_OFFLOAD},
        "z2-bf16-8bit_v16-states": {
            "stage": 2,
            "dtype": "bf16",
            "width": 96,
            "params": {"lr": 1e-2, "states": "8bit_v16"},
        },
    }
)
CLIPPED = named(
    {
        f"z{stage}-{dtype}-clipping": {"stage": stage, "dtype": dtype, "config": CLIPPING}
        for stage, dtype in ((1, "fp32"), (2, "bf16"), (3, "bf16"), (3, "fp16"))
    }
    | {
        "bf16-optimizer-clipping": {"stage": 1, "dtype": "bf16", "config": CLIPPING | BF16_OPTIMIZER},
        "z2-fp16-cpu-offload-clipping": {"stage": 2, "dtype": "fp16", "zero": CPU_OFFLOAD, "config": CLIPPING},
        "z3-bf16-cpu-offload-clipping": {"stage": 3, "dtype": "bf16", "zero": CPU_OFFLOAD, "config": CLIPPING},
    }
)
OVERFLOWS = named(
    {f"z{stage}-fp16-overflow": {"stage": stage, "dtype": "fp16", "overflow_at": 1} for stage in (2, 3)}
    | {
        "z1-bf16-overflow": {"stage": 1, "dtype": "bf16", "overflow_at": 1, "config": CHECKED_BF16},
        "bf16-optimizer-overflow": {"stage": 1, "dtype": "bf16", "overflow_at": 1, "config": BF16_OPTIMIZER},
        "z3-fp16-cpu-offload-overflow": {"stage": 3, "dtype": "fp16", "overflow_at": 1, "zero": CPU_OFFLOAD},
    }
)
# (name, case that cannot be fused, part of the logged reason)
UNFUSED = [
    (
        "z2-bf16-masters",
        {"stage": 2, "config": BF16_MASTERS, "params": {"lr": 1e-2, "states": "bfloat16"}},
        "the master weights are torch.bfloat16",
    ),
    ("z1-autocast-fp16", {"stage": 1, "config": FP16_AUTOCAST}, "GradScaler"),
]
UNKNOWN = named(
    {
        "z2-fp16-unknown": {"stage": 2, "dtype": "fp16", "config": CLIPPING, "unknown": True},
        "z1-bf16-cpu-offload-unknown": {"stage": 1, "dtype": "bf16", "zero": CPU_OFFLOAD, "unknown": True},
        "bf16-optimizer-unknown": {"stage": 1, "dtype": "bf16", "config": BF16_OPTIMIZER, "unknown": True},
    }
)
LINKED = named(
    {
        f"z{stage}-{dtype}-linked": {"stage": stage, "dtype": dtype, "type": "AdaXW", "steps": 1, "linked": True}
        for stage, dtype in ((1, "fp32"), (2, "fp32"))
    }
)
# Not in bfloat16: the interpreter truncates float32 to it, and DeepSpeed's copy rounds.
INTERPRETED = named(
    {
        "z2-fp16-interpreted": {"stage": 2, "dtype": "fp16", "width": 4, "config": CLIPPING},
        "z3-fp16-interpreted": {"stage": 3, "dtype": "fp16", "width": 4, "zero": {"sub_group_size": 20}},
        "z1-fp32-interpreted": {"stage": 1, "width": 4, "config": CLIPPING},
    }
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, launch_deepspeed: Callable[..., dict[str, Any]]) -> Any:
    cases = [parameter.values[0] for parameter in (*EXACT, *CLIPPED, *OVERFLOWS, *UNKNOWN, *LINKED)]
    cases += [{"name": name, "dtype": "bf16" if "bf16" in name else "fp32", **case} for name, case, _ in UNFUSED]
    return launch_deepspeed(tmp_path_factory.mktemp("fuse"), cases, "deepspeed_fuse_worker.py")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory, launch_deepspeed: Callable[..., dict[str, Any]]) -> Any:
    cases = [parameter.values[0] for parameter in INTERPRETED]
    return launch_deepspeed(tmp_path_factory.mktemp("fuse"), cases, "deepspeed_fuse_worker.py", interpreted=True)


def result_of(results: dict[str, Any], case: Case) -> dict[str, Any]:
    result = results[case["name"]]
    assert "failure" not in result, result["failure"]
    return result


def assert_fused(result: dict[str, Any]) -> None:
    if Version(deepspeed.__version__) < Version("0.19.8") and result["described"]["auto"]["fused_step"] != "full":
        pytest.skip(f"DeepSpeed {deepspeed.__version__} has another step, which is fused in part or not")
    assert [result["described"][fuse]["fused_step"] for fuse in ("auto", "off")] == ["full", "none"]
    assert not result["logged"]


def assert_close(result: dict[str, Any]) -> None:
    assert result["norms"]["auto"] == pytest.approx(result["norms"]["off"], rel=1e-6)
    assert min(result["norms"]["off"]) > 0.1  # above the clipping threshold
    assert result["deviation"] <= 1e-6


@pytest.mark.parametrize("case", EXACT)
def test_fused_step_is_bit_exact(results: dict[str, Any], case: Case) -> None:
    result = result_of(results, case)
    assert_fused(result)
    assert result["deviation"] == 0.0
    assert result["norms"]["auto"] == pytest.approx(result["norms"]["off"], rel=1e-6)


@pytest.mark.parametrize("case", [parameter for parameter in EXACT if parameter.values[0].get("crossing")])
def test_checkpoints_load_between_fused_and_unfused(results: dict[str, Any], case: Case) -> None:
    assert result_of(results, case)["crossed"] == 0.0


@pytest.mark.parametrize("case", CLIPPED)
def test_clipped_step_differs_in_the_last_bits_of_the_norm(results: dict[str, Any], case: Case) -> None:
    result = result_of(results, case)
    assert_fused(result)
    assert_close(result)


@pytest.mark.parametrize("case", OVERFLOWS)
def test_overflow_on_one_rank_skips_the_step(results: dict[str, Any], case: Case) -> None:
    result = result_of(results, case)
    assert_fused(result)
    assert result["skipped"] == {"auto": 1, "off": 1}
    assert result["deviation"] == 0.0
    assert result["norms"]["auto"] == pytest.approx(result["norms"]["off"], rel=1e-6)


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_step_is_kept_and_logged_once(results: dict[str, Any], case: Case) -> None:
    result = result_of(results, case)
    expected = "none" if "optimizer" in case["name"] else "partial"
    assert result["described"]["auto"]["fused_step"] == expected
    assert "is not a verified version" in result["described"]["auto"]["reason"]
    assert len(result["logged"]) == 1
    assert result["described"]["auto"]["reason"] in result["logged"][0]
    assert_close(result)


@pytest.mark.parametrize(("name", "case", "reason"), UNFUSED, ids=[name for name, *_ in UNFUSED])
def test_unfusable_step_is_kept_and_logged_once(results: dict[str, Any], name: str, case: Case, reason: str) -> None:
    result = result_of(results, {"name": name})
    assert result["described"]["auto"]["fused_step"] == "none"
    assert reason in result["described"]["auto"]["reason"]
    assert len(result["logged"]) == 1
    assert result["deviation"] == 0.0


@pytest.mark.parametrize("case", LINKED)
def test_states_are_linked_to_the_parameters_of_all_groups(results: dict[str, Any], case: Case) -> None:
    worst = result_of(results, case)["worst"]
    assert set(worst) == {"auto", "off"}
    assert max(worst.values()) < 1e-8


@pytest.mark.parametrize("case", INTERPRETED)
def test_kernel_reads_gradient_pieces_in_place(interpreted: dict[str, Any], case: Case) -> None:
    result = result_of(interpreted, case)
    assert_fused(result)
    assert result["norms"]["auto"] == pytest.approx(result["norms"]["off"], rel=1e-6)
    assert result["deviation"] <= (1e-6 if "config" in case else 0.0)


def test_describe_returns_how_an_engine_steps(results: dict[str, Any]) -> None:
    assert_fused(results["z2-bf16"])
    described = results["z2-bf16"]["described"]
    assert described["auto"]["wrapper"] == described["off"]["wrapper"] == "DeepSpeedZeroOptimizer"
    assert described["auto"]["reason"] == ""
    assert described["off"]["reason"] == '"adax_triton": {"fuse": "off"} in the configuration'
    assert described["auto"]["states"] == {"exp_avg": ["float32"], "exp_avg_sq": ["float32"]}
    assert described["auto"]["state_bytes"] == described["off"]["state_bytes"] > 0
    assert results["z2-bf16-8bit_v16-states"]["described"]["auto"]["states"]["exp_avg"] == ["float32", "int8"]
