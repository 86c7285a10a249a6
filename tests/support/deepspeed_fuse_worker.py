"""Compare fused and unfused steps of each DeepSpeed case on one rank.

Usage, once per rank: RANK=... LOCAL_RANK=... WORLD_SIZE=2 python deepspeed_fuse_worker.py CASES.json RESULTS.json

CASES.json is a list of dictionaries (see `CASE_DEFAULTS`); RESULTS.json becomes {case name: result}.
"""

import logging
import sys
import tempfile
from typing import Any
from unittest import mock

import adax_triton.integrations.deepspeed as adapter
import deepspeed
import deepspeed_oracle
import torch
import torch.distributed as dist
from adax_triton.integrations.deepspeed.fused_step import zero_steps
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed_cases import run_cases, start
from deepspeed_oracle import averaged_gradients, build_model, trainable
from deepspeed_worker import start_engine, train
from torch import Tensor

CASE_DEFAULTS = {
    **deepspeed_oracle.CASE_DEFAULTS,
    "steps": 3,
    "unknown": False,  # simulate a DeepSpeed with an unknown step()
    "crossing": False,  # also run fused and unfused engines in turn, each from the other's checkpoint
    "linked": False,  # take one step and check the states that DeepSpeed links to the parameters
}
MASTERS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition")
MODEL_WEIGHTS = ("bit16_groups_flat", "bf16_groups_flat")


def engine_of(case: dict[str, Any], fuse: str, seed: int = 0) -> Any:
    known = {} if case["unknown"] else zero_steps.VERIFIED_STEPS
    case = {**case, "config": {**case["config"], "adax_triton": {"fuse": fuse}}}
    with mock.patch.object(zero_steps, "VERIFIED_STEPS", known):
        return start_engine(case, build_model(case, seed))


def snapshot(engine: Any) -> dict[str, Tensor]:
    """Return copies of all tensors that a step changes.

    They are this rank's tensors, or gathered parameters at ZeRO 3.
    """
    if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
        return whole_parameters(engine)
    found = {}
    for names in (MASTERS, MODEL_WEIGHTS):
        name = next(name for name in names if hasattr(engine.optimizer, name))
        for index, tensor in enumerate(getattr(engine.optimizer, name)):
            found[f"{names[0]} {index}"] = tensor.detach().float().clone()
    for index, state in enumerate(engine.basic_optimizer.state.values()):
        assert type(state["step"]) is int
        found |= {f"{key} {index}": torch.as_tensor(value).float().clone() for key, value in state.items()}
    return found


def whole_parameters(engine: Any) -> dict[str, Tensor]:
    found = {}
    for name, param in trainable(engine.module).items():
        found[f"master {name}"] = safe_get_full_fp32_param(param).clone()
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"{key} {name}"] = safe_get_full_optimizer_state(param, key).clone()
        with deepspeed.zero.GatheredParameters([param]):
            found[f"weights {name}"] = param.detach().float().clone()
    for index, state in enumerate(engine.basic_optimizer.state.values()):
        assert type(state["step"]) is int
        found[f"step {index}"] = torch.tensor(float(state["step"]))
    return found


def deviation(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Return the largest relative difference on any rank.

    It is relative to its tensor's largest value, and infinity if names differ.
    """
    worst = float("inf")
    if list(left) == list(right):
        worst = max(
            float((left[key] - right[key]).abs().max() / right[key].abs().max().clamp(min=1e-30)) for key in left
        )
    worst_of_all = torch.tensor(worst if worst == worst else float("inf"))
    dist.all_reduce(worst_of_all, op=dist.ReduceOp.MAX)
    return float(worst_of_all)


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    last, norms, described, skipped = {}, {}, {}, {}
    for fuse in ("auto", "off"):
        engine = engine_of(case, fuse)
        norms[fuse] = []
        for step in range(case["steps"]):
            *_, _ = train(engine, range(step, step + 1), case)
            norms[fuse].append(float(engine.get_global_grad_norm()))
        last[fuse], described[fuse] = snapshot(engine), adapter.describe(engine)
        skipped[fuse] = engine.skipped_steps
        engine.destroy()
    return {
        "deviation": deviation(last["auto"], last["off"]),
        "norms": norms,
        "described": described,
        "skipped": skipped,
        "crossed": crossed(case, last["off"]) if case["crossing"] else None,
    }


def crossed(case: dict[str, Any], uninterrupted: dict[str, Tensor]) -> float:
    """Return the deviation of a run of three steps: fused, unfused, fused.

    Each step starts from the checkpoint of the previous step.
    """
    with tempfile.TemporaryDirectory() as directory:
        folder: list[str] = [directory]
        dist.broadcast_object_list(folder)
        for step, fuse in enumerate(("auto", "off", "auto")):
            engine = engine_of(case, fuse, seed=step)
            if step:
                engine.load_checkpoint(folder[0], tag=f"step-{step}")
            *_, _ = train(engine, range(step, step + 1), case)
            engine.save_checkpoint(folder[0], tag=f"step-{step + 1}")
            found = snapshot(engine)
            engine.destroy()
        dist.barrier()
    return deviation(found, uninterrupted)


def run_linked_case(case: dict[str, Any]) -> dict[str, Any]:
    """Return the linked first moments' distance from their expected values.

    The expected values are (1 - b1) times the mean gradients.
    """
    gradients = averaged_gradients(build_model(case), 0, case)
    worst = {}
    for fuse in ("auto", "off"):
        engine = engine_of(case, fuse)
        *_, _ = train(engine, range(1), case)
        worst[fuse] = max(
            float((safe_get_full_optimizer_state(param, "exp_avg") - 0.1 * gradients[name]).abs().max())
            for name, param in trainable(engine.module).items()
        )
        engine.destroy()
    return {"worst": worst}


class FusedStepLog(logging.Handler):
    """Warnings about fused steps."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "adax_triton: fused step of" in record.getMessage():
            self.messages.append(record.getMessage())


def run(case: dict[str, Any]) -> dict[str, Any]:
    log = FusedStepLog()
    deepspeed.utils.logger.addHandler(log)
    try:
        result = run_linked_case(case) if case["linked"] else run_case(case)
    finally:
        deepspeed.utils.logger.removeHandler(log)
    return {**result, "logged": log.messages}


def main(cases_path: str, results_path: str) -> None:
    start()
    # DeepSpeed asks whether the accelerator supports fp16; its logic is the same on a CPU.
    get_accelerator().is_fp16_supported = lambda: True
    # see_memory_usage collects garbage a dozen times while DeepSpeed builds a BF16_Optimizer.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda message, force=False: None
    run_cases(cases_path, results_path, CASE_DEFAULTS, run)


if __name__ == "__main__":
    main(*sys.argv[1:])
