"""DDP, ZeroRedundancyOptimizer and FSDP1 on two gloo ranks (data_parallel_worker.py).

Oracles: the same run with torch's AdamW to rounding, and the same gradients in plain PyTorch bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from sharding_launch import Results, launch

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

DDP: dict[str, dict[str, Any]] = {
    "DDP": {"check": "ddp", "options": {}},
    "bucket view": {"check": "ddp", "options": {"gradient_as_bucket_view": True}},
    "static graph": {
        "check": "ddp",
        "options": {"gradient_as_bucket_view": True, "static_graph": True},
        "static": True,
    },
    "unused": {"check": "ddp", "options": {"gradient_as_bucket_view": True, "find_unused_parameters": True}},
}
ZERO: dict[str, dict[str, Any]] = {
    "tensors": {"check": "zero", "bucket_view": False},
    "buckets": {"check": "zero", "bucket_view": True},
}
FSDP1: dict[str, dict[str, Any]] = {
    f"{strategy}, use_orig_params={original}": {"check": "fsdp1", "strategy": strategy, "use_orig_params": original}
    for strategy, original in (("FULL_SHARD", True), ("FULL_SHARD", False), ("SHARD_GRAD_OP", True))
}
ERRORS: dict[str, dict[str, Any]] = {
    f"errors, use_orig_params={original}": {
        "check": "fsdp1 errors",
        "strategy": "FULL_SHARD",
        "use_orig_params": original,
    }
    for original in (True, False)
}
ROUNDING = 1e-6  # of weights near 1 after a few steps


# Takes more than 5 s: one launch trains some hundred small models.
@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    cases = DDP | ZERO | FSDP1 | ERRORS | {"ways": {"check": "ways"}}
    return launch(tmp_path_factory.mktemp("data_parallel"), 2, cases, worker="data_parallel_worker.py")


@pytest.mark.parametrize("case", DDP)
def test_ddp_equals_torchs_adamw_and_plain_training(results: Results, case: str) -> None:
    for result in results[case]:
        assert result["torch"] < ROUNDING
        assert result["differing"] == []


@pytest.mark.parametrize("way", ["hooked", "joined", "local_sgd", "in_backward"])
def test_ddp_extensions_equal_torchs_adamw(results: Results, way: str) -> None:
    # The hook rounds gradients to float16, which enlarges differences of the weights.
    assert max(result[way] for result in results["ways"]) < (1e-5 if way == "hooked" else ROUNDING)


@pytest.mark.parametrize("way", ["fused optimizer", "overlap"])
def test_functional_optimizers_raise(results: Results, way: str) -> None:
    for result in results["ways"]:
        assert result[way].startswith("ValueError: ") and "functional" in result[way]


@pytest.mark.parametrize("case", ZERO)
def test_zero_redundancy_optimizer_equals_one_optimizer(results: Results, case: str) -> None:
    for result in results[case]:
        assert result["torch"] < ROUNDING
        assert {name: wrong for name, wrong in result.items() if name != "torch" and wrong} == {}


@pytest.mark.parametrize("case", FSDP1)
def test_fsdp1_equals_torchs_adamw_and_resumes(results: Results, case: str) -> None:
    for result in results[case]:
        assert result["clipped"] < ROUNDING
        assert result["scaled"] < 1e-4  # forward and backward round to bfloat16
        resumed = {name: wrong for name, wrong in result.items() if name not in ("clipped", "scaled")}
        assert len(resumed) == 4 and not any(resumed.values())


@pytest.mark.parametrize("case", ERRORS)
def test_fsdp1_refuses_states_that_it_cannot_gather(results: Results, case: str) -> None:
    for result in results[case]:
        for name, given in (
            ("8bit", "states='8bit'"),
            ("bfloat16", "states='bfloat16'"),
            ("master", "master_weights="),
        ):
            assert result[name].startswith("ValueError: params[0]: FSDP1 ") and given in result[name]
        for name in ("norm", "norm set later"):
            assert result[name].startswith("ValueError: Invalid max_grad_norm: 0.5; FSDP1 ")
        assert result["norm of a group"] < ROUNDING
