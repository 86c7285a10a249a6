"""Carry runs through DeepSpeed checkpoints on one rank and, on rank 0, compare them with a run that never stopped.

Usage, once per rank: RANK=... WORLD_SIZE=... python deepspeed_checkpoint_worker.py CASES.json FOLDER LAUNCH

A case is a list of legs (see `LEG_DEFAULTS`), each an engine that loads what the one before has saved. A launch runs
the legs of its number, so that legs may have other numbers of ranks; FOLDER carries the checkpoints from launch to
launch, and FOLDER/results-LAUNCH.json becomes {case name: [result of each leg]}. The oracle is a loop in one process,
as in deepspeed_oracle.py.
"""

import argparse
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from adax_triton.integrations.deepspeed import switching_optimizer
from adax_triton.integrations.deepspeed.checkpoints.universal import allowing_saved_classes
from async_io import merge_sources
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from deepspeed_cases import run_cases, start
from deepspeed_oracle import CASE_DEFAULTS, DTYPES, OPTIMIZERS, averaged_gradients, batch, build_model, trainable
from deepspeed_worker import deviation, master_weights, start_engine
from torch import Tensor, nn

from adax_triton import AdaX, AdaXW
from adax_triton.cli import main as cli

PARTS = 2  # of a batch, one for each of two ranks; one rank takes both in turn
LEG_DEFAULTS = {
    **CASE_DEFAULTS,
    "steps": 2,
    "launch": 1,
    "universal": False,  # load the checkpoint of the leg before by way of a universal one
    "switch": False,  # load it within switching_optimizer
    "convert": None,  # or options of `adax-triton convert`: load what that makes of it, as any checkpoint
    "configured": {},  # more "optimizer.params", which the checkpoint's have to replace
    "load": {},  # more arguments of load_checkpoint
    "save_latest": True,
    "expect_error": False,
}
OTHERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


# The oracle: one process, no DeepSpeed.


def uninterrupted(case: dict[str, Any]) -> list[list[dict[str, Tensor]]]:
    """Return the weights after every step of every leg."""
    model = build_model(case["legs"][0]).to(DTYPES[case["legs"][0]["dtype"]])
    masters = {name: nn.Parameter(param.detach().float().clone()) for name, param in trainable(model).items()}
    optimizer, done, legs = None, 0, []
    for leg in case["legs"]:
        if leg["expect_error"]:
            break
        model = model.to(DTYPES[leg["dtype"]])
        lp_params = trainable(model)
        optimizer = next_optimizer(leg, optimizer, model, masters)
        weights = []
        with torch.no_grad():
            for name, param in lp_params.items():
                param.copy_(masters[name])
        for step in range(done, done + leg["steps"]):
            for name, grad in averaged_gradients(model, step, leg).items():
                masters[name].grad = grad
            optimizer.step()
            with torch.no_grad():
                for name, param in lp_params.items():
                    param.copy_(masters[name])
            weights.append({name: master.detach().clone() for name, master in masters.items()})
        done += leg["steps"]
        legs.append(weights)
    return legs


def next_optimizer(
    leg: dict[str, Any], before: torch.optim.Optimizer | None, model: nn.Module, masters: dict[str, nn.Parameter]
) -> torch.optim.Optimizer:
    if before is not None and not leg["switch"] and leg["convert"] is None:
        return before
    master_of = {id(param): masters[name] for name, param in trainable(model).items()}
    groups = [{**g, "params": [master_of[id(p)] for p in g["params"] if p.requires_grad]} for g in model.groups()]
    params = {key: value for key, value in leg["params"].items() if key != "torch_adam"}
    optimizer = {**OPTIMIZERS, **OTHERS}[leg["type"].lower()](groups, **params)
    if before is not None:
        to_adax = isinstance(optimizer, (AdaX, AdaXW))
        for group, group_before in zip(optimizer.param_groups, before.param_groups, strict=True):
            beta1, beta2 = (group_before if to_adax else group)["betas"]
            for param in group["params"]:
                state = before.state[param]
                t = int(state["step"])
                factors = [f ** (-1 if to_adax else 1) for f in (1 - beta1**t, 1 - beta2**t)]
                optimizer.state[param] = {
                    "step": t if to_adax else torch.tensor(float(t)),
                    "exp_avg": (state["exp_avg"].double() * factors[0]).float(),
                    "exp_avg_sq": (state["exp_avg_sq"].double() * factors[1]).float(),
                }
    return optimizer


# DeepSpeed.


def train(engine: Any, steps: range) -> list[dict[str, Tensor]]:
    world_size, weights = dist.get_world_size(), []
    for step in steps:
        for part in range(PARTS // world_size):
            engine.backward(engine(*batch(step, 0, dist.get_rank() + part)))
            engine.step()
        weights.append(master_weights(engine))
    return weights


def of_all_ranks(values: set[int]) -> list[int]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, values)
    return sorted(set().union(*gathered))


def to_universal(folder: Path) -> None:
    arguments = argparse.Namespace(
        input_folder=str(folder / "saved"),
        output_folder=str(folder / "universal"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            with allowing_saved_classes():
                ds_to_universal.main(arguments)
        except Exception as error:
            failure = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(failure)
    if failure[0] is not None:
        raise RuntimeError(f"the conversion failed: {failure[0]}")


def convert(source: Path, options: list[str]) -> Path:
    target = source.with_name(f"{source.name}-converted")
    code = [None]
    if dist.get_rank() == 0:
        code = [cli.main(["convert", str(source), str(target), *options])]
    dist.broadcast_object_list(code)
    if code[0] != 0:
        raise RuntimeError(f"adax-triton convert returned {code[0]}")
    return target


def run_leg(case: dict[str, Any], index: int, expected: list[dict[str, Tensor]], folder: Path) -> dict[str, Any]:
    leg = case["legs"][index]
    # A seed of its own, so that nothing but the checkpoint can bring the weights back.
    zero = json.loads(json.dumps(leg["zero"]).replace("$FOLDER", str(folder)))
    config = {"gradient_accumulation_steps": PARTS // dist.get_world_size(), **leg["config"]}
    if leg["universal"]:
        config["checkpoint"] = {"load_universal": True}
        if leg["launch"] == case["legs"][index - 1]["launch"]:
            to_universal(folder / str(index - 1))
    Init.param_id = 0  # as in a process of its own; files of NVMe offload are named by it
    params = {**leg["params"], **leg["configured"]}
    engine = start_engine({**leg, "params": params, "zero": zero, "config": config}, build_model(leg, seed=index))
    if index:
        before = sum(other["steps"] for other in case["legs"][:index])
        source, tag = folder / str(index - 1), "universal" if leg["universal"] else "saved"
        if leg["convert"] is not None:
            source, tag = convert(source, leg["convert"]), None
        with switching_optimizer(engine) if leg["switch"] else nullcontext():
            engine.load_checkpoint(str(source), tag=tag, **leg["load"])
    else:
        before = 0
    weights = train(engine, range(before, before + leg["steps"]))
    result: dict[str, Any] = {
        "deviation": max(deviation(*pair) for pair in zip(weights, expected, strict=True)),
        "steps": of_all_ranks({int(state["step"]) for state in engine.basic_optimizer.state.values()}),
        "weight_decay": [group["weight_decay"] for group in engine.basic_optimizer.param_groups],
        "stage": leg["stage"],
        "wrapper": type(engine.optimizer).__name__,
        "optimizer": type(engine.basic_optimizer).__name__,
        "states": sorted({str(state["exp_avg_sq"].dtype) for state in engine.basic_optimizer.state.values()}),
    }
    if index + 1 < len(case["legs"]):
        target = folder / str(index)
        engine.save_checkpoint(str(target), tag="saved", save_latest=leg["save_latest"])
        if leg["stage"] > 0 and "nvme" not in str(zero) and result["wrapper"] != "BF16_Optimizer":
            with allowing_saved_classes():
                found = get_fp32_state_dict_from_zero_checkpoint(str(target), tag="saved")
            result["zero_to_fp32"] = deviation({name: found[name] for name in weights[-1]}, weights[-1])
        if case["legs"][index + 1]["universal"] and case["legs"][index + 1]["launch"] != leg["launch"]:
            to_universal(target)
    engine.destroy()
    return result


def run_case(case: dict[str, Any], folder: Path, launch: int) -> list[dict[str, Any]]:
    legs = [leg["launch"] for leg in case["legs"]]
    expected = uninterrupted(case) if launch in legs else []
    results = []
    for index, leg in enumerate(case["legs"]):
        if leg["launch"] != launch:
            continue
        try:
            results.append(run_leg(case, index, expected[index] if index < len(expected) else [], folder))
        except Exception as error:
            if not leg["expect_error"]:
                raise
            results.append({"error": type(error).__name__, "message": str(error)})
        dist.barrier()
    return results


def main(cases_path: str, folder: str, launch: str) -> None:
    start()
    get_accelerator().is_fp16_supported = lambda: True
    if '"nvme"' in Path(cases_path).read_text():
        merge_sources()

    def run(case: dict[str, Any]) -> list[dict[str, Any]]:
        legs = [{**LEG_DEFAULTS, **leg} for leg in case["legs"]]
        case_folder = Path(folder) / case["name"]
        try:
            return run_case({**case, "legs": legs}, case_folder, int(launch))
        finally:
            if dist.get_rank() == 0 and all(leg["launch"] <= int(launch) for leg in legs):
                shutil.rmtree(case_folder, ignore_errors=True)

    run_cases(cases_path, str(Path(folder) / f"results-{launch}.json"), {}, run)


if __name__ == "__main__":
    main(*sys.argv[1:])
