"""Test AdaX with the Trainer of transformers and with Accelerate.

The model is a small GPT-2 on two gloo CPU ranks. Oracle: a single-process run on the same batches, in
huggingface_oracle.py. One launch runs all cases of this file.
"""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytestmark = pytest.mark.deepspeed

Case = dict[str, Any]
CPU_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# The large eps hides the rounding of gradients that are nearly 0, such as those of the biases of keys.
DECOUPLED = {"type": "AdaXW", "params": {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}}
AUTO = {"lr": "auto", "weight_decay": "auto"}


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **settings}}


TRAINED: dict[str, Case] = {
    "trainer-section": {"section": AUTO, "resume_at": 2},
    "trainer-section-z3-cpu-offload": {"config": zero(3, **CPU_OFFLOAD)},
    "trainer-section-auto-betas": {
        "section": {**AUTO, "betas": "auto", "eps": "auto"},
        "arguments": {"adam_beta2": 1e-4},
        "params": {"lr": 1e-2, "weight_decay": 1e-2, "eps": 1e-8},
    },
    "trainer-class": {"given": "class", **DECOUPLED},
    "trainer-class-cpu-offload-unforced": {"given": "class-unforced", **DECOUPLED, "config": zero(2, **CPU_OFFLOAD)},
    "trainer-override": {"given": "override"},
    "trainer-object-without-deepspeed": {"given": "object", "config": None, "resume_at": 2},
    "trainer-class-without-deepspeed": {"given": "class", **DECOUPLED, "config": None, "resume_at": 2},
    "trainer-class-fsdp2": {"given": "class", **DECOUPLED, "config": None, "fsdp": True, "resume_at": 2},
    "trainer-override-fsdp2": {"given": "override", "config": None, "fsdp": True},
    "accelerate-section": {"through": "accelerate", "section": AUTO, "resume_at": 2},
    "accelerate-object": {"through": "accelerate", "given": "object", "resume_at": 2},
    "accelerate-object-z3": {"through": "accelerate", "given": "object", "config": zero(3)},
    "accelerate-object-without-deepspeed": {"through": "accelerate", "given": "object", "config": None},
}
RAISES: dict[str, tuple[Case, list[str]]] = {
    "trainer-auto-betas": (
        {"section": {"lr": "auto", "betas": "auto", "eps": "auto"}},
        ["beta2=0.999", "AdaX", '"auto"', "remove betas and eps", "adam_beta2=1e-4"],
    ),
    "trainer-own-betas": (  # the Trainer's error; it suggests "auto", which leads to the error above
        {"section": {"lr": "auto", "betas": [0.9, 1e-4]}},
        ["mismatch", "adam_beta1+adam_beta2", "auto"],
    ),
    "trainer-class-cpu-offload": (
        {"given": "class", "config": zero(2, **CPU_OFFLOAD), "only_deepspeed": True},
        ["DeepSpeedCPUAdam", "would step Adam", '"zero_force_ds_cpu_optimizer": false', '"optimizer" section'],
    ),
    "accelerate-object-cpu-offload": (
        {"through": "accelerate", "given": "object", "config": zero(3, **CPU_OFFLOAD), "only_deepspeed": True},
        ["DeepSpeedCPUAdam", "would step Adam", '"zero_force_ds_cpu_optimizer": false', "DummyOptim"],
    ),
    "trainer-object": (
        {"given": "object"},
        ["optimizers=(AdaX", "drops", "optimizer_cls_and_kwargs=(AdaX", '"optimizer" section'],
    ),
}
# The Trainer drops the optimizer before DeepSpeed is called.
DROPPED: Case = {"name": "trainer-object-only-deepspeed", "given": "object", "only_deepspeed": True}
EXAMPLES = [
    {"name": script, "through": script, "arguments": ["--steps", "30", "--width", "16", "--batch", "4"]}
    for script in ("train_huggingface.py", "train_accelerate.py")
]


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, launch_deepspeed: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    trained = [{"name": name, **case} for name, case in TRAINED.items()]
    raising = [{"name": name, "expect_error": True, **case} for name, (case, _) in RAISES.items()]
    folder, cases = tmp_path_factory.mktemp("huggingface"), [*trained, *raising, DROPPED, *EXAMPLES]
    return launch_deepspeed(folder, cases, "huggingface_worker.py")


def result_of(results: dict[str, Any], name: str) -> dict[str, Any]:
    result = results[name]
    assert "failure" not in result, result["failure"]
    return result


@pytest.mark.parametrize("name", TRAINED)
def test_follows_a_single_process(results: dict[str, Any], name: str) -> None:
    result, case = result_of(results, name), TRAINED[name]
    assert result["optimizer"] == f"adax_triton.optimizers.{case.get('type', 'AdaX')}"
    alone = "FSDPGPT2LMHeadModel" if case.get("fsdp") else "DistributedDataParallel"
    assert result["wrapper"] == (alone if case.get("config", {}) is None else "DeepSpeedEngine")
    assert result["deviation"] < 1e-7
    assert result["moved"] > 5e-3
    assert result.get("resume_deviation", 0.0) == 0.0
    assert ("resume_deviation" in result) == ("resume_at" in case)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("trainer-section", ["AdaX: lr 0.01 (default 0.0015), betas (0.9, 0.0001), eps 1e-12,", "states float32"]),
        ("trainer-section-auto-betas", ["betas (0.9, 0.0001), eps 1e-08 (default 1e-12),"]),
        ("trainer-class", ["AdaXW: ", "weight_decay 0.1 and 0.0 (default 0.05)"]),
        ("accelerate-object-z3", ["AdaX: ", "weight_decay 0.01 (default 0.0005)"]),
    ],
)
def test_optimizer_is_logged_once(results: dict[str, Any], name: str, expected: list[str]) -> None:
    first, others = result_of(results, name)["log"]
    engines = 2 if "resume_at" in TRAINED[name] else 1
    assert len(first) == engines and not others
    for words in ["INFO: DeepSpeed steps ", *expected]:
        assert words in first[0]


@pytest.mark.parametrize("name", RAISES)
def test_replaced_optimizer_or_betas_raise(results: dict[str, Any], name: str) -> None:
    result = result_of(results, name)
    assert result.get("error") == "ValueError", result
    for words in RAISES[name][1]:
        assert words in result["message"]


def test_dropped_optimizer_is_logged(results: dict[str, Any]) -> None:
    result = result_of(results, DROPPED["name"])
    assert result["optimizer"] == "torch.optim.adamw.AdamW"
    (line,), others = result["log"]
    assert line.startswith("WARNING: DeepSpeed steps torch.optim.adamw.AdamW, which is not an optimizer of adax_triton")
    assert "optimizer_cls_and_kwargs" in line and not others


@pytest.mark.parametrize("name", [case["name"] for case in EXAMPLES])
def test_example_learns_and_logs_its_optimizer(results: dict[str, Any], name: str) -> None:
    result = result_of(results, name)
    (line,) = [line for line in result["printed"][0].splitlines() if line.startswith("adax_triton.optimizers.AdaXW: ")]
    first = float(line.split("loss ")[1].split(",")[0])
    last = float(line.split()[-1])
    assert last < first - 0.3
    assert "INFO: DeepSpeed steps AdaXW: lr 0.003" in result["log"][0][0]


@pytest.mark.parametrize(
    ("params", "raises"),
    [
        ({"betas": [0.9, 0.999]}, True),
        ({"betas": [0.9, 0.1]}, False),
        ({"betas": "auto"}, False),
        ({"betas": [0.9, 0.999], "second_moment": "adam"}, False),
        ({}, False),
    ],
    ids=str,
)
def test_betas_of_adam_raise(params: dict[str, Any], raises: bool) -> None:
    from adax_triton.integrations.deepspeed.optimizer_in_use import check_betas

    if raises:
        with pytest.raises(ValueError, match=r"beta2=0\.999.*AdaXW.*remove betas from optimizer\.params"):
            check_betas("AdaXW", params)
    else:
        check_betas("AdaXW", params)


def test_unregister_restores_the_trainer(results: dict[str, Any]) -> None:
    assert results["registration"] == {"wrapped": True, "once": True, "restored": True}


def test_deepspeed_adapter_imports_neither_framework() -> None:
    # DeepSpeed 0.19.1 imports transformers itself.
    code = """
import sys, deepspeed
before = set(sys.modules)
import adax_triton.integrations.deepspeed
print({"transformers", "accelerate"} & (set(sys.modules) - before))
"""
    printed = subprocess.check_output([sys.executable, "-c", code], cwd="/", text=True)
    assert printed.splitlines()[-1] == "set()"
