"""Run DeepSpeed cases on one rank; compare with a single-process run.

The single-process run is in deepspeed_oracle.py.

Usage, once per rank: RANK=... LOCAL_RANK=... WORLD_SIZE=2 python deepspeed_worker.py CASES.json RESULTS.json

CASES.json is a list of dictionaries (see `CASE_DEFAULTS`); RESULTS.json becomes {case name: result}.
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import adax_triton.integrations.deepspeed  # noqa: F401  registers the optimizer types
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed_cases import run_cases, start
from deepspeed_moe import run_moe_case
from deepspeed_oracle import (
    CASE_DEFAULTS,
    DTYPES,
    MICRO_BATCH,
    OPTIMIZERS,
    WORLD_SIZE,
    TiedModel,
    batch,
    build_model,
    single_process_trajectory,
    trainable,
)
from torch import Tensor


def start_engine(case: dict[str, Any], model: TiedModel) -> Any:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": case["stage"], "stage3_param_persistence_threshold": 0, **case["zero"]},
    }
    if case["dtype"] == "bf16":
        config["bf16"] = {"enabled": True}
    if case["dtype"] == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    arguments: dict[str, Any] = {"model_parameters": model.groups()}
    if case["client"] is None:
        config["optimizer"] = {"type": case["type"], "params": case["params"]}
    else:
        optimizer_class = OPTIMIZERS[case["type"].lower()]
        arguments["optimizer"] = lambda groups: optimizer_class(groups, **case["params"])
        if case["client"] == "instance":
            arguments = {"optimizer": optimizer_class(model.groups(), **case["params"])}
    if case["client_scheduler"] is not None:
        step_lr = torch.optim.lr_scheduler.StepLR
        arguments["lr_scheduler"] = lambda optimizer: step_lr(optimizer, 1, gamma=case["client_scheduler"])
    return deepspeed.initialize(model=model, config={**config, **case["config"]}, **arguments)[0]


def master_weights(engine: Any) -> dict[str, Tensor]:
    params = trainable(engine.module)
    if hasattr(engine.optimizer, "fp16_groups") and hasattr(engine.optimizer, "fp32_groups"):
        lp, hp = (
            [p for group in groups for p in group]
            for groups in (engine.optimizer.fp16_groups, engine.optimizer.fp32_groups)
        )
        master_of = {id(a): b for a, b in zip(lp, hp, strict=True)}
        return {name: master_of[id(param)].detach().clone() for name, param in params.items()}
    full = {name: safe_get_full_fp32_param(param) for name, param in params.items()}
    return {name: (params[name] if value is None else value).detach().clone() for name, value in full.items()}


def train(engine: Any, steps: range, case: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    for step in steps:
        for micro_step in range(engine.gradient_accumulation_steps()):
            loss = engine(*batch(step, micro_step, dist.get_rank()))
            with overflowing(engine) if step == case["overflow_at"] and dist.get_rank() == 1 else nullcontext():
                engine.backward(loss)
            engine.step()
        if step == case["offload_at"]:
            include = case["offload"] and [OffloadStateTypeEnum(kind) for kind in case["offload"]]
            # Older versions pin memory with torch, which needs a GPU.
            engine.offload_states(include=include, pin_memory=hasattr(get_accelerator(), "pin_empty_like"))
            engine.reload_states()
        yield master_weights(engine)


@contextmanager
def overflowing(engine: Any) -> Iterator[None]:
    """Make one gradient infinite in the backward passes of the block."""
    param = next(iter(trainable(engine.module).values()))
    hook = param.register_hook(lambda grad: grad * float("inf"))
    try:
        yield
    finally:
        hook.remove()


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest absolute difference; infinity if a value is not finite."""
    worst = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    return worst if all(bool(value.isfinite().all()) for value in found.values()) else float("inf")


def of_both_ranks(values: set[Any]) -> list[Any]:
    gathered: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(gathered, values)
    return sorted(set().union(*gathered))


def step_counts(engine: Any) -> list[int]:
    """Return the distinct step counts in the states of both ranks.

    The count of a rank without states is -1.
    """
    return of_both_ranks({int(state["step"]) for state in engine.basic_optimizer.state.values()} or {-1})


def state_dtypes(engine: Any) -> list[str]:
    states = engine.basic_optimizer.state.values()
    return sorted({str(state["exp_avg_sq"].dtype) for state in states if "exp_avg_sq" in state})


def has_padding_only_rank(engine: Any) -> bool:
    return True in of_both_ranks({not state["exp_avg"].any() for state in engine.basic_optimizer.state.values()})


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    model = build_model(case)
    initial = {name: p.detach().to(DTYPES[case["dtype"]]).float().clone() for name, p in trainable(model).items()}
    engine = start_engine(case, model)
    if case["compile"]:
        engine.compile(backend="eager")
    expected = single_process_trajectory(case)
    deviations = []
    with tempfile.TemporaryDirectory() as directory:
        folder: list[str] = [directory]
        dist.broadcast_object_list(folder)
        for step, weights in enumerate(train(engine, range(case["steps"]), case), start=1):
            deviations.append(deviation(weights, next(expected)))
            if step == case["resume_at"]:
                engine.save_checkpoint(folder[0], tag="saved")
        result = {
            "deviation": max(deviations),
            "moved": deviation(weights, initial),
            "steps": step_counts(engine),
            "padding_only_rank": has_padding_only_rank(engine),
            "skipped": engine.skipped_steps,
            "optimizer": type(engine.basic_optimizer).__name__,
            "weight_decay": engine.basic_optimizer.defaults["weight_decay"],
            "wrapper": type(engine.optimizer).__name__,
            "states": state_dtypes(engine),
            "loss_scale": getattr(engine.optimizer, "loss_scale", None),
        }
        engine.destroy()
        if case["resume_at"] is not None:
            result |= resume(case, folder[0], weights)
        dist.barrier()
    return result


def resume(case: dict[str, Any], folder: str, uninterrupted: dict[str, Tensor]) -> dict[str, Any]:
    # With another seed, only the checkpoint can restore the weights.
    engine = start_engine(case, build_model(case, seed=1))
    path, _ = engine.load_checkpoint(folder, tag="saved")
    *_, weights = train(engine, range(case["resume_at"], case["steps"]), case)
    result = {
        "loaded": path is not None,
        "resume_deviation": deviation(weights, uninterrupted),
        "resume_steps": step_counts(engine),
    }
    engine.destroy()
    return result


def run_case_that_raises(case: dict[str, Any]) -> dict[str, Any]:
    try:
        start_engine(case, build_model(case))
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": None, "message": ""}


def run(case: dict[str, Any]) -> dict[str, Any]:
    if case["expect_error"]:
        return run_case_that_raises(case)
    return run_moe_case(case) if case["moe"] else run_case(case)


def main(cases_path: str, results_path: str) -> None:
    start()
    # DeepSpeed asks whether the accelerator supports fp16; its logic is the same on a CPU.
    get_accelerator().is_fp16_supported = lambda: True
    run_cases(cases_path, results_path, CASE_DEFAULTS, run)


if __name__ == "__main__":
    main(*sys.argv[1:])
