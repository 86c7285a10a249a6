"""Load DeepSpeed checkpoints of other rank counts, stages and optimizers.

Some loads must raise. Oracle: a run in one process that never stops, in deepspeed_checkpoint_worker.py. Three launches,
on one, two and one rank, run all cases of this file; each test reads the results of its case.
"""

from pathlib import Path
from typing import Any

import pytest
from deepspeed_checkpoint_launch import launch
from torch.utils import cpp_extension

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.deepspeed

# One unit in the last place of a value below 1 is 6e-8.
FP32_TOLERANCE = 1e-7

Case = dict[str, Any]
Segment = dict[str, Any]
FP32_ACCUMULATION = {"config": {"data_types": {"grad_accum_dtype": "fp32"}}, "accumulate_in_fp32": True}
# A segment that resumes is configured with a wrong learning rate; the checkpoint's must replace it in every group.
RESUMES = {"params": {"lr": 0.5}}
UNIVERSAL = {"universal": True, **RESUMES}
ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 1e-2, "torch_adam": True}}
TO_ADAX = {"type": "AdaX", "params": {"lr": 5e-3, "betas": [0.85, 1e-3]}}
TO_ADAXW = {"type": "AdaXW", "params": {"lr": 5e-3, "weight_decay": 2e-2}}
SGD = {"type": "SGD", "params": {"lr": 1.0}, "config": {"zero_allow_untested_optimizer": True}}
OTHER_ADAM = {"type": "AdamW", "params": {"lr": 2e-2, "betas": [0.8, 0.99], "torch_adam": True}}


def named(cases: dict[str, list[Segment]]) -> list[Any]:
    return [pytest.param({"name": name, "segments": segments}, id=name) for name, segments in cases.items()]


def bf16(stage: int, **more: Any) -> Segment:
    return {"stage": stage, "dtype": "bf16", **more}


# Every case has three groups with their own lr and weight decay, a tied, a frozen and a one-element parameter. The
# last leaves one of two ranks only padding.
UNIVERSALS = named(
    {
        "z1-1-rank-to-2-to-1": [
            {"stage": 1, "dtype": "fp32", "launch": 0},
            {"stage": 2, "dtype": "fp16", **UNIVERSAL},
            bf16(1, launch=2, **UNIVERSAL),
        ],
        "z3-1-rank-to-2-to-1": [
            bf16(3, launch=0),
            bf16(3, zero={"sub_group_size": 100}, **UNIVERSAL),
            {"stage": 3, "dtype": "fp32", "launch": 2, **UNIVERSAL},
        ],
        "bf16-optimizer-to-z2-offload-to-bf16-optimizer": [
            bf16(1, **FP32_ACCUMULATION),
            bf16(2, zero={"offload_optimizer": {"device": "cpu"}}, **UNIVERSAL),
            bf16(1, **FP32_ACCUMULATION, **UNIVERSAL),
        ],
    }
)
SWITCHES = named(
    {
        "z0-fp32": [{"stage": 0, **ADAMW}, {"stage": 0, "switch": True, **TO_ADAX}],
        **{
            f"z{stage}-and-back": [
                bf16(stage, **ADAMW),
                bf16(stage, switch=True, **TO_ADAXW),
                bf16(stage, switch=True, **OTHER_ADAM),
            ]
            for stage in (2, 3)
        },
        "universal-z1-to-z2": [bf16(1, **ADAMW), bf16(2, switch=True, universal=True, **TO_ADAX)],
    }
)
# Converted on disk: the checkpoint's hyper-parameters replace the configured ones.
ADAMW_GROUPS = {"lr": 1e-2, "weight_decay": 1e-2, "eps": 1e-8}
CONFIGURED = {"lr": 0.5, "weight_decay": 0.5, "eps": 1e-3}
TO_CONVERTED_ADAXW = {"type": "AdaXW", "params": {**ADAMW_GROUPS, "betas": [0.9, 1e-3]}, "configured": CONFIGURED}
CPU_ADAMW = {"type": "AdamW", "params": {**ADAMW_GROUPS, "betas": [0.9, 0.99]}}
TO_CONVERTED_ADAMW = {**CPU_ADAMW, "configured": {**CONFIGURED, "torch_adam": True}}
CONVERSIONS = named(
    {
        f"converted-z{stage}-and-back": [
            bf16(stage, **more, **ADAMW),
            bf16(stage, **more, convert=["--to", "adaxw", "--beta2", "1e-3"], **TO_CONVERTED_ADAXW),
            bf16(stage, **more, convert=["--to", "adamw", "--beta2", "0.99"], **TO_CONVERTED_ADAMW),
        ]
        for stage, more in ((1, FP32_ACCUMULATION), (2, {}), (3, {"zero": {"sub_group_size": 100}}))
    }
)
OFFLOADED = {"stage": 2, "dtype": "fp32", "zero": {"offload_optimizer": {"device": "cpu"}}}
CPU_ADAM: Case = {
    "name": "cpu-adam-and-back",
    "segments": [
        {**OFFLOADED, **CPU_ADAMW},
        {**OFFLOADED, "switch": True, **TO_ADAXW},
        {**OFFLOADED, "switch": True, **CPU_ADAMW},
        {**OFFLOADED, "convert": ["--to", "adaxw", "--beta2", "1e-3"], **TO_CONVERTED_ADAXW},
    ],
}
STATES_8BIT_V16 = {"width": 128, "params": {"lr": 1e-2, "weight_decay": 1e-2, "states": "8bit_v16"}}
TO_LOW = named(
    {
        f"z{stage}-float32-to-8bit_v16": [bf16(stage, width=128), bf16(stage, universal=True, **STATES_8BIT_V16)]
        for stage in (2, 3)
    }
)
STATES_8BIT = {"width": 128, "params": {"lr": 1e-2, "states": "8bit"}}
OWN_MASTERS = {
    "params": {"lr": 1e-2, "states": "bfloat16", "master_weights": "24bit"},
    "config": {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
    "bf16_masters": True,
}
NO_STATES = {"load_optimizer_states": False}
RAISES = {"expect_error": True, "steps": 1}
LOADS_THAT_RAISE = [
    pytest.param({"name": name, "segments": [*before, {**segment, **RAISES}]}, words, id=name)
    for name, before, segment, words in (
        (
            "8bit-universal",
            [bf16(2, steps=1, **STATES_8BIT)],
            bf16(2, universal=True, **STATES_8BIT),
            ["'8bit'", "float32"],
        ),
        (
            "8bit_v16-universal-z3",
            [bf16(3, steps=1, **STATES_8BIT_V16)],
            bf16(3, universal=True, **STATES_8BIT_V16),
            ["'8bit_v16'", "float32"],
        ),
        ("z2-to-z3", [bf16(2, steps=1)], bf16(3, universal=True), ["below ZeRO 3", "zero_to_fp32"]),
        ("z3-to-z2", [bf16(3, steps=1)], bf16(2), ["at ZeRO 3", "zero_to_fp32"]),
        ("z3-to-z2-universal", [bf16(3, steps=1)], bf16(2, universal=True), ["at ZeRO 3", "zero_to_fp32"]),
        (
            "own-masters-universal",
            [bf16(2, steps=1, **OWN_MASTERS)],
            bf16(2, universal=True, **OWN_MASTERS),
            ["master_weights='24bit'", "own number of ranks"],
        ),
        ("weights-of-latest", [bf16(3, save_latest=False)], bf16(3, load=NO_STATES), ["load_optimizer_states=False"]),
        ("adam-unannounced", [bf16(2, steps=1, **ADAMW)], bf16(2, **TO_ADAX), ["second_moment", "adax_triton"]),
        (
            "adam-universal-unannounced",
            [bf16(3, steps=1, **ADAMW)],
            bf16(3, universal=True, **TO_ADAX),
            ["second_moment", "adax_triton"],
        ),
        ("adax-within-switch", [bf16(1, steps=1)], bf16(1, switch=True), ["outside switching_optimizer"]),
        (
            "adax-universal-to-adam",
            [bf16(1, steps=1)],
            bf16(1, switch=True, universal=True, **OTHER_ADAM),
            ["load_universal=true", "AdamW"],
        ),
        ("sgd-within-switch", [bf16(1, steps=1)], bf16(1, switch=True, **SGD), ["optimizer is SGD", "AdamW"]),
    )
]
# DeepSpeed gives every group the hyper-parameters of the first; the adapter prevents it for AdaX only.
OTHER_OPTIMIZER: Case = {
    "name": "z3-adamw-universal",
    "segments": [bf16(3, steps=1, **ADAMW), bf16(3, steps=1, universal=True, **ADAMW)],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = [parameter.values[0] for parameter in (*UNIVERSALS, *SWITCHES, *CONVERSIONS, *TO_LOW, *LOADS_THAT_RAISE)]
    built = Path(cpp_extension._get_build_directory("cpu_adam", verbose=False)) / "cpu_adam.so"
    cases += [OTHER_OPTIMIZER, *([CPU_ADAM] if built.exists() else [])]
    return launch(tmp_path_factory.mktemp("checkpoints"), cases, ["0", "1", "2"])


def assert_exact(case: Case, segments: list[dict[str, Any]]) -> None:
    taken = 0
    for segment, result in zip(case["segments"], segments, strict=True):
        taken += segment.get("steps", 2)
        assert result["deviation"] <= (FP32_TOLERANCE if segment.get("dtype", "fp32") == "fp32" else 0.0)
        assert result["steps"] == [taken]


@pytest.mark.parametrize("case", UNIVERSALS)
def test_universal_checkpoint_continues_exactly(results: dict[str, Any], case: Case) -> None:
    assert_exact(case, results[case["name"]])


def test_other_optimizers_keep_deepspeeds_overwritten_groups(results: dict[str, Any]) -> None:
    # Fails when DeepSpeed fixes it: then simplify universal.load_universal_stage_3.
    first, second = results[OTHER_OPTIMIZER["name"]]
    assert first["weight_decay"] == [1e-2, 0.0, 1e-2]
    assert second["weight_decay"] == [1e-2, 1e-2, 1e-2]


@pytest.mark.parametrize("case", SWITCHES)
def test_switch_continues_with_converted_states(results: dict[str, Any], case: Case) -> None:
    segments = results[case["name"]]
    assert_exact(case, segments)
    assert [segment["optimizer"] for segment in segments] == [segment["type"] for segment in case["segments"]]


@pytest.mark.parametrize("case", CONVERSIONS)
def test_converted_checkpoint_loads(results: dict[str, Any], case: Case) -> None:
    segments = results[case["name"]]
    assert_exact(case, segments)
    assert [segment["weight_decay"] for segment in segments] == [[1e-2, 0.0, 1e-2]] * len(segments)


def test_switch_from_and_to_deepspeeds_cpu_adam(results: dict[str, Any]) -> None:
    if CPU_ADAM["name"] not in results:
        pytest.skip("needs DeepSpeed's cpu_adam, built once by deepspeed.ops.op_builder.CPUAdamBuilder().load()")
    segments = results[CPU_ADAM["name"]]
    assert [segment["optimizer"] for segment in segments] == ["DeepSpeedCPUAdam", "AdaXW"] * 2
    assert [segment["steps"] for segment in segments] == [[2], [4], [6], [8]]
    assert max(segment["deviation"] for segment in segments) < 1e-6  # its sums have another order than torch's


@pytest.mark.parametrize("case", TO_LOW)
def test_universal_checkpoint_is_loaded_into_low_states(results: dict[str, Any], case: Case) -> None:
    first, second = results[case["name"]]
    assert first["states"] == ["torch.float32"]
    assert "torch.uint8" in second["states"]
    assert 0.0 < second["deviation"] < 1e-3  # two steps move a weight by about 1e-2


def test_zero_to_fp32_returns_the_masters(results: dict[str, Any]) -> None:
    found = [segment for segments in results.values() for segment in segments if "zero_to_fp32" in segment]
    assert {segment["stage"] for segment in found if segment["optimizer"] in ("AdaX", "AdaXW")} == {1, 2, 3}
    assert {segment["zero_to_fp32"] for segment in found} == {0.0}


@pytest.mark.parametrize(("case", "words"), LOADS_THAT_RAISE)
def test_checkpoint_that_cannot_be_loaded_raises(results: dict[str, Any], case: Case, words: list[str]) -> None:
    result = results[case["name"]][-1]
    assert result.get("error") == "ValueError", result
    for word in words:
        assert word in result["message"]
