"""Run DeepSpeed cases on one rank and, on rank 0, compare each with a single-process AdaX run.

Usage, once per rank: RANK=... LOCAL_RANK=... WORLD_SIZE=2 python deepspeed_worker.py CASES.json RESULTS.json

CASES.json is a list of dictionaries (see `CASE_DEFAULTS`); RESULTS.json becomes {case name: result}. The oracle is a
plain loop: both ranks' gradients are computed here, averaged, clipped, and given to AdaX on float32 master weights.
"""

import functools
import json
import operator
import sys
import tempfile
import traceback
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import adax_triton.integrations.deepspeed  # noqa: F401  registers the optimizer types
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from adax_triton import AdaX, AdaXW

WORLD_SIZE = 2
MICRO_BATCH = 4
VOCABULARY = 12
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = {"adax": AdaX, "adaxw": AdaXW, "adamax": torch.optim.Adamax}
CASE_DEFAULTS = {
    "type": "AdaX",  # "optimizer.type" of the configuration
    "params": {"lr": 1e-2, "weight_decay": 1e-2},  # "optimizer.params"
    "stage": 0,
    "dtype": "fp32",
    "zero": {},  # more of "zero_optimization"
    "config": {},  # more of the configuration
    "client": None,  # "instance" or "callable": hand deepspeed.initialize an optimizer instead of the section
    "width": 16,
    "steps": 4,
    "resume_at": None,  # save after this many steps, load into a new engine, go on, and compare
    "overflow_at": None,  # the step at which rank 1 alone has an infinite loss
    "reduce_each_micro_batch": False,  # DeepSpeed's order of summation on this path, for the oracle
    "accumulate_in_fp32": False,
    "expect_error": False,
}


class TiedModel(nn.Module):
    """A tied weight, a frozen layer, and a one-element parameter that leaves a rank of its group only padding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.hidden = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.ones(1))
        self.out = nn.Linear(width, VOCABULARY, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.gain * torch.tanh(self.hidden(self.frozen(x)))
        return nn.functional.cross_entropy(self.out(x).float(), targets)

    def groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [self.embed.weight, *self.frozen.parameters(), self.hidden.weight]},
            {"params": [self.hidden.bias], "weight_decay": 0.0},
            {"params": [self.gain], "lr": 3e-3},
        ]


def build_model(case: dict[str, Any], seed: int = 0) -> TiedModel:
    torch.manual_seed(seed)
    return TiedModel(case["width"])


def batch(step: int, micro_step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro_step + rank)
    tokens, targets = torch.randint(VOCABULARY, (2, MICRO_BATCH), generator=generator)
    return tokens, targets


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


# The oracle: one process, no DeepSpeed.


def averaged_gradients(model: TiedModel, step: int, case: dict[str, Any]) -> dict[str, Tensor]:
    micro_steps = case["config"].get("gradient_accumulation_steps", 1)
    names, params = zip(*trainable(model).items(), strict=True)
    # Powers of two: the scale leaves every bit of a normal number alone.
    scale = 2.0**8 if case["dtype"] == "fp16" else 1.0

    def gradients(micro_step: int, rank: int) -> list[Tensor]:
        loss = model(*batch(step, micro_step, rank)) / micro_steps
        found = torch.autograd.grad(loss * scale, params)
        return [g.float() if case["accumulate_in_fp32"] else g for g in found]

    def total(parts: list[list[Tensor]]) -> list[Tensor]:
        return [functools.reduce(operator.add, tensors) for tensors in zip(*parts, strict=True)]

    def mean_over_ranks(parts: list[list[Tensor]]) -> list[Tensor]:
        # DeepSpeed communicates in the type of the model also where it accumulates in float32.
        parts = [[g.to(p.dtype) for g, p in zip(part, params, strict=True)] for part in parts]
        return [g / WORLD_SIZE for g in total(parts)]

    micro, ranks = range(micro_steps), range(WORLD_SIZE)
    if case["reduce_each_micro_batch"]:
        found = total([mean_over_ranks([gradients(i, rank) for rank in ranks]) for i in micro])
    else:
        found = mean_over_ranks([total([gradients(i, rank) for i in micro]) for rank in ranks])
    return {name: g.float() / scale for name, g in zip(names, found, strict=True)}


def single_process_trajectory(case: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    model = build_model(case).to(DTYPES[case["dtype"]])
    lp_params = trainable(model)
    masters = {name: nn.Parameter(param.detach().float().clone()) for name, param in lp_params.items()}
    master_of = {id(param): masters[name] for name, param in lp_params.items()}
    groups = [
        {**group, "params": [master_of[id(p)] for p in group["params"] if p.requires_grad]} for group in model.groups()
    ]
    optimizer = OPTIMIZERS[case["type"].lower()](groups, **case["params"])
    max_norm = case["config"].get("gradient_clipping", 0.0)
    for step in range(case["steps"]):
        if step != case["overflow_at"]:
            for name, grad in averaged_gradients(model, step, case).items():
                masters[name].grad = grad
            if max_norm:
                nn.utils.clip_grad_norm_(masters.values(), max_norm, foreach=False)
            optimizer.step()
            with torch.no_grad():
                for name, param in lp_params.items():
                    param.copy_(masters[name])
        yield {name: master.detach().clone() for name, master in masters.items()}


# DeepSpeed.


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
            if step == case["overflow_at"] and dist.get_rank() == 1:
                loss = loss * float("inf")
            engine.backward(loss)
            engine.step()
        yield master_weights(engine)


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest absolute difference; infinite when any value is not finite."""
    worst = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    return worst if all(bool(value.isfinite().all()) for value in found.values()) else float("inf")


def of_both_ranks(values: set[Any]) -> list[Any]:
    gathered: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(gathered, values)
    return sorted(set().union(*gathered))


def step_counts(engine: Any) -> list[int]:
    """Every distinct step count in the optimizer states of both ranks; -1 for a rank without states."""
    return of_both_ranks({int(state["step"]) for state in engine.basic_optimizer.state.values()} or {-1})


def has_padding_only_rank(engine: Any) -> bool:
    return True in of_both_ranks({not state["exp_avg"].any() for state in engine.basic_optimizer.state.values()})


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    model = build_model(case)
    initial = {name: p.detach().to(DTYPES[case["dtype"]]).float().clone() for name, p in trainable(model).items()}
    engine = start_engine(case, model)
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
            "loss_scale": getattr(engine.optimizer, "loss_scale", None),
        }
        engine.destroy()
        if case["resume_at"] is not None:
            result |= resume(case, folder[0], weights)
        dist.barrier()
    return result


def resume(case: dict[str, Any], folder: str, uninterrupted: dict[str, Tensor]) -> dict[str, Any]:
    # Another seed, so that nothing but the checkpoint can bring the weights back.
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


def run_refused_case(case: dict[str, Any]) -> dict[str, Any]:
    model = build_model(case)
    try:
        start_engine(case, model)
    except Exception as error:
        # Stage 3 partitions the parameters, and the 16-bit types convert them, before the optimizer is built.
        untouched = all(p.dtype == torch.float32 and p.numel() > 0 for p in model.parameters())
        return {"error": type(error).__name__, "message": str(error), "model_untouched": untouched}
    return {"error": None, "message": "", "model_untouched": False}


def main(cases_path: str, results_path: str) -> None:
    # An inference-only kernel that DeepSpeed would compile for every new environment.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=120), verbose=False)
    # DeepSpeed asks the accelerator whether fp16 is offered; on a CPU its logic is the same.
    get_accelerator().is_fp16_supported = lambda: True
    results: dict[str, Any] = {}
    with open(cases_path) as file:
        cases = [{**CASE_DEFAULTS, **case} for case in json.load(file)]
    for case in cases:
        try:
            results[case["name"]] = run_refused_case(case) if case["expect_error"] else run_case(case)
        except Exception:
            results[case["name"]] = {"failure": traceback.format_exc()}
    if dist.get_rank() == 0:
        with open(results_path, "w") as file:
            json.dump(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
