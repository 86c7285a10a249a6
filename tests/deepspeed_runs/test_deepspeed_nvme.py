"""Test AdaX with states that DeepSpeed swaps to NVMe.

The cases are resumed runs, and checkpoints that raise. Oracle: as in test_deepspeed_checkpoints.py.
"""

from typing import Any

import pytest
from deepspeed_checkpoint_launch import launch
from packaging.version import Version

deepspeed = pytest.importorskip("deepspeed")
pytestmark = pytest.mark.deepspeed

# One unit in the last place of a value below 1 is 6e-8.
FP32_TOLERANCE = 1e-7

Case = dict[str, Any]
RESUMES = {"params": {"lr": 0.5}}  # wrong; the checkpoint's must replace it
RAISES = {"expect_error": True, "steps": 1}


def bf16(**more: Any) -> dict[str, Any]:
    return {"stage": 3, "dtype": "bf16", **more}


SWAPPED = {
    "sub_group_size": 4000,  # only the two largest matrices are swapped
    "stage3_param_persistence_threshold": 100000,
    "offload_optimizer": {"device": "nvme", "nvme_path": "$FOLDER/swapped"},
}
PIPELINED = {"pipeline_read": True, "pipeline_write": True, "buffer_count": 12}
PIPELINED_SWAPPED = {**SWAPPED, "offload_optimizer": {**SWAPPED["offload_optimizer"], **PIPELINED}}
WIDE = {"width": 800, "frozen": False}
RESUMED: dict[str, Case] = {
    name: {"name": name, "segments": segments}
    for name, segments in {
        "plain": [bf16(zero=SWAPPED, **WIDE), bf16(zero=SWAPPED, **WIDE, **RESUMES)],
        "pipelined": [bf16(zero=PIPELINED_SWAPPED, **WIDE), bf16(zero=PIPELINED_SWAPPED, **WIDE, **RESUMES)],
        # One hidden layer stays frozen: if both were trained, fp16 would overflow in the third step.
        "fp16": [
            {"stage": 3, "dtype": "fp16", "zero": SWAPPED, "width": 800},
            {"stage": 3, "dtype": "fp16", "zero": SWAPPED, "width": 800, **RESUMES},
        ],
        "new-process": [
            {"stage": 3, "zero": SWAPPED, **WIDE, "launch": 0},
            {"stage": 3, "zero": SWAPPED, **WIDE, "launch": 2, **RESUMES},
        ],
    }.items()
}
LOADS_THAT_RAISE = [
    pytest.param({"name": name, "segments": [first, {**second, **RAISES}]}, words, id=name)
    for name, first, second, words in (
        ("nvme-to-cpu", bf16(steps=1, zero=SWAPPED), bf16(), ["saved with optimizer offload"]),
        ("cpu-to-nvme", bf16(steps=1), bf16(zero=SWAPPED), ["saved without optimizer offload"]),
        (
            "nvme-other-sub-groups",
            bf16(steps=1, zero=SWAPPED, width=800),
            bf16(zero={**SWAPPED, "sub_group_size": 10**9}, width=800),
            ["no file of partition", "sub_group_size"],
        ),
    )
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("needs libaio, for DeepSpeed's async_io")
    if Version(deepspeed.__version__) < Version("0.19.8"):
        pytest.skip(f"async_io of DeepSpeed {deepspeed.__version__} aborts: _num_pending_ops > 0")
    raising = [parameter.values[0] for parameter in LOADS_THAT_RAISE]
    return launch(tmp_path_factory.mktemp("nvme"), [*RESUMED.values(), *raising], ["0", "1", "2"])


@pytest.mark.parametrize("case", RESUMED.values(), ids=RESUMED)
def test_nvme_resume_continues_exactly(results: dict[str, Any], case: Case) -> None:
    tolerance = FP32_TOLERANCE if case["segments"][0].get("dtype", "fp32") == "fp32" else 0.0
    assert max(segment["deviation"] for segment in results[case["name"]]) <= tolerance
    assert [segment["steps"] for segment in results[case["name"]]] == [[2], [4]]


@pytest.mark.parametrize(("case", "words"), LOADS_THAT_RAISE)
def test_checkpoint_of_other_offload_raises(results: dict[str, Any], case: Case, words: list[str]) -> None:
    result = results[case["name"]][-1]
    assert result.get("error") == "ValueError", result
    for word in words:
        assert word in result["message"]
