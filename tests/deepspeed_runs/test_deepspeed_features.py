"""Features of DeepSpeed: pipelines, tensor parallelism, adapters, weights alone.

Oracles: torch's AdamW in the same engine, the uninterrupted run, and an engine that starts from the saved weights. One
launch on two ranks, deepspeed_features_worker.py, runs all cases.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
from packaging.version import Version

deepspeed = pytest.importorskip("deepspeed")
pytestmark = pytest.mark.deepspeed

TOLERANCE = 1e-6  # between two implementations of AdamW, after four steps of 1e-2

Case = dict[str, Any]
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
WITHOUT_FROZEN = {"save": {"exclude_frozen_parameters": True}, "load": {"load_module_strict": False}}
TENSOR_PARALLEL = {"model": "llama", "config": {"tensor_parallel": {"autotp_size": 2}, "gradient_clipping": 0.5}}


def named(cases: dict[str, Case]) -> list[Any]:
    return [pytest.param({"name": name, **case}, id=name) for name, case in cases.items()]


def pipeline(stage: int, dtype: str, **config: Any) -> Case:
    accumulation = {"gradient_accumulation_steps": 2, "gradient_clipping": 0.5}
    return {"model": "pipeline", "stage": stage, "dtype": dtype, "config": {**accumulation, **config}}


# In the order of the launch. Later engines of the process keep the groups of hierarchical partitions. After a pipeline
# DeepSpeed builds no plain engine, after tensor parallelism no other engine.
FEATURES = named(
    {
        **{
            f"node-local-z{stage}": {
                "stage": stage,
                "dtype": "bf16",
                "node_local": True,
                "config": {"checkpoint": {"use_node_local_storage": True}},
            }
            for stage in (2, 3)
        },
        **{
            f"adapters-z{stage}": {"stage": stage, "dtype": "bf16", "model": "adapters", **WITHOUT_FROZEN}
            for stage in (1, 2, 3)
        },
        **{f"own-boundaries-z{stage}": {"stage": stage, "dtype": "bf16", "boundary": True} for stage in (1, 3)},
        **{f"autocast-z{stage}": {"stage": stage, "config": {"torch_autocast": {"enabled": True}}} for stage in (0, 2)},
        "activation-checkpoints": {"stage": 3, "dtype": "bf16", "model": "checkpointed"},
        "hierarchical-partitions": {
            "stage": 3,
            "dtype": "bf16",
            "model": "unfrozen",
            "zero": {"zero_hpz_partition_size": 2},
        },
        "pipeline-z0-fp32": pipeline(0, "fp32"),
        "pipeline-z1-bf16": pipeline(1, "bf16"),
        "pipeline-z1-bf16-fp32-accumulation": pipeline(1, "bf16", **FP32_ACCUMULATION),
        **{f"tensor-parallel-z{stage}": {**TENSOR_PARALLEL, "stage": stage} for stage in (0, 1, 2)},
    }
)
WEIGHTS_ALONE = named(
    {
        f"weights-alone-z{stage}-{dtype}": {"do": "load_weights_alone", "stage": stage, "dtype": dtype}
        for stage, dtype in ((0, "bf16"), (1, "bf16"), (2, "fp16"), (3, "bf16"))
    }
)
TWO_ENGINES = named({f"two-engines-z{stage}": {"do": "train_two", "stage": stage, "dtype": "bf16"} for stage in (0, 3)})
GATHERED = {"stage3_gather_16bit_weights_on_model_save": True}
SAVED_16_BIT = named(
    {f"16-bit-z{stage}": {"do": "save_16bit", "stage": stage, "dtype": "bf16", "zero": GATHERED} for stage in (0, 3)}
)
TWO_TAGS: Case = {"name": "two-tags", "do": "save_under_two_tags", "stage": 2}


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, launch_deepspeed: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    parameters = (*WEIGHTS_ALONE, *TWO_ENGINES, *SAVED_16_BIT, *FEATURES)
    cases = [TWO_TAGS, *(parameter.values[0] for parameter in parameters)]
    cases = [case for case in cases if not why_not_run(case)]
    # One launch of 27 cases takes about 25 s.
    return launch_deepspeed(tmp_path_factory.mktemp("features"), cases, "deepspeed_features_worker.py")


def why_not_run(case: Case) -> str:
    """Return what a case needs that is not here."""
    if case.get("model") == "llama" and importlib.util.find_spec("transformers") is None:
        return "needs transformers"
    if case["name"] == "weights-alone-z3-bf16" and Version(deepspeed.__version__) < Version("0.19.8"):
        return f"DeepSpeed {deepspeed.__version__} now and then loads no weights here, with torch's AdamW too"
    if case.get("model") == "checkpointed" and Version(deepspeed.__version__) < Version("0.19.8"):
        return f"activation checkpointing of DeepSpeed {deepspeed.__version__} needs a GPU"
    return ""


def result_of(results: dict[str, Any], case: Case) -> dict[str, Any]:
    if reason := why_not_run(case):
        pytest.skip(reason)
    assert "failure" not in results[case["name"]], results[case["name"]]["failure"]
    return results[case["name"]]


@pytest.mark.parametrize("case", FEATURES)
def test_feature_trains_as_with_torchs_adamw_and_resumes(results: dict[str, Any], case: Case) -> None:
    result = result_of(results, case)
    assert result["moved"] > 1e-3
    assert result["difference"] <= TOLERANCE
    assert result["resume_difference"] == 0.0


def test_pipelines_of_the_newest_version_are_fused(results: dict[str, Any]) -> None:
    if Version(deepspeed.__version__) < Version("0.19.8"):
        pytest.skip("the step of BF16_Optimizer is verified for 0.19.8")
    result = results["pipeline-z1-bf16-fp32-accumulation"]
    assert (result["wrapper"], result["fused_step"]) == ("BF16_Optimizer", "full")


@pytest.mark.parametrize("case", WEIGHTS_ALONE)
def test_weights_alone_continue_as_an_engine_built_on_them(results: dict[str, Any], case: Case) -> None:
    result = result_of(results, case)
    assert len(result) == 3
    assert result == dict.fromkeys(result, 0.0)


@pytest.mark.parametrize("case", TWO_ENGINES)
def test_two_engines_in_turns_train_as_one_after_the_other(results: dict[str, Any], case: Case) -> None:
    assert result_of(results, case)["difference"] == 0.0


@pytest.mark.parametrize("case", SAVED_16_BIT)
def test_16_bit_file_has_the_rounded_masters(results: dict[str, Any], case: Case) -> None:
    assert result_of(results, case)["difference"] == 0.0


def test_another_tag_on_each_rank_raises_and_leaves_no_files(results: dict[str, Any]) -> None:
    result = result_of(results, TWO_TAGS)
    assert "tag differs between ranks: ['of-rank-0', 'of-rank-1']; pass the same tag on every rank" in result["error"]
    assert result["left"] == []
