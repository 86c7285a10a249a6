"""Run cases of test_deepspeed_checkpoints.py on one rank; compare with uninterrupted runs.

Usage, once per rank: RANK=... WORLD_SIZE=... python deepspeed_checkpoint_worker.py CASES.json FOLDER LAUNCH

A case is a list of segments of a run (see `SEGMENT_DEFAULTS`). Each segment is an engine that loads the checkpoint of
the previous one. A launch runs the segments of its number, so segments may differ in the number of ranks. FOLDER keeps
the checkpoints between launches. FOLDER/results-LAUNCH.json becomes {case name: [result of each segment]}. The oracle
is a loop in one process, as in deepspeed_oracle.py.
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

PARTS = 2  # parts of a batch, one per rank; a single rank processes both, one after the other
SEGMENT_DEFAULTS = {
    **CASE_DEFAULTS,
    "steps": 2,
    "launch": 1,
    "universal": False,  # convert the checkpoint to a universal one before loading it
    "switch": False,  # load it within switching_optimizer
    "convert": None,  # options of `adax-triton convert`, which then converts the checkpoint before the load
    "configured": {},  # wrong "optimizer.params", which the checkpoint's must replace
    "load": {},  # more arguments of load_checkpoint
    "save_latest": True,
    "expect_error": False,
}
OTHERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


# The oracle: one process, no DeepSpeed.


def uninterrupted(case: dict[str, Any]) -> list[list[dict[str, Tensor]]]:
    """Return the weights after every step of every segment."""
    model = build_model(case["segments"][0]).to(DTYPES[case["segments"][0]["dtype"]])
    masters = {name: nn.Parameter(param.detach().float().clone()) for name, param in trainable(model).items()}
    optimizer, done, segments = None, 0, []
    for segment in case["segments"]:
        if segment["expect_error"]:
            break
        model = model.to(DTYPES[segment["dtype"]])
        lp_params = trainable(model)
        optimizer = next_optimizer(segment, optimizer, model, masters)
        weights = []
        with torch.no_grad():
            for name, param in lp_params.items():
                param.copy_(masters[name])
        for step in range(done, done + segment["steps"]):
            for name, grad in averaged_gradients(model, step, segment).items():
                masters[name].grad = grad
            optimizer.step()
            with torch.no_grad():
                for name, param in lp_params.items():
                    param.copy_(masters[name])
            weights.append({name: master.detach().clone() for name, master in masters.items()})
        done += segment["steps"]
        segments.append(weights)
    return segments


def next_optimizer(
    segment: dict[str, Any], before: torch.optim.Optimizer | None, model: nn.Module, masters: dict[str, nn.Parameter]
) -> torch.optim.Optimizer:
    if before is not None and not segment["switch"] and segment["convert"] is None:
        return before
    master_of = {id(param): masters[name] for name, param in trainable(model).items()}
    groups = [{**g, "params": [master_of[id(p)] for p in g["params"] if p.requires_grad]} for g in model.groups()]
    params = {key: value for key, value in segment["params"].items() if key != "torch_adam"}
    optimizer = {**OPTIMIZERS, **OTHERS}[segment["type"].lower()](groups, **params)
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


def run_segment(case: dict[str, Any], index: int, expected: list[dict[str, Tensor]], folder: Path) -> dict[str, Any]:
    segment = case["segments"][index]
    # Every segment has another seed, so only the checkpoint can restore the weights.
    zero = json.loads(json.dumps(segment["zero"]).replace("$FOLDER", str(folder)))
    config = {"gradient_accumulation_steps": PARTS // dist.get_world_size(), **segment["config"]}
    if segment["universal"]:
        config["checkpoint"] = {"load_universal": True}
        if segment["launch"] == case["segments"][index - 1]["launch"]:
            to_universal(folder / str(index - 1))
    Init.param_id = 0  # as in a new process, because it names the files of NVMe offload
    params = {**segment["params"], **segment["configured"]}
    engine = start_engine(
        {**segment, "params": params, "zero": zero, "config": config}, build_model(segment, seed=index)
    )
    if index:
        before = sum(other["steps"] for other in case["segments"][:index])
        source, tag = folder / str(index - 1), "universal" if segment["universal"] else "saved"
        if segment["convert"] is not None:
            source, tag = convert(source, segment["convert"]), None
        with switching_optimizer(engine) if segment["switch"] else nullcontext():
            engine.load_checkpoint(str(source), tag=tag, **segment["load"])
    else:
        before = 0
    weights = train(engine, range(before, before + segment["steps"]))
    result: dict[str, Any] = {
        "deviation": max(deviation(*pair) for pair in zip(weights, expected, strict=True)),
        "steps": of_all_ranks({int(state["step"]) for state in engine.basic_optimizer.state.values()}),
        "weight_decay": [group["weight_decay"] for group in engine.basic_optimizer.param_groups],
        "stage": segment["stage"],
        "wrapper": type(engine.optimizer).__name__,
        "optimizer": type(engine.basic_optimizer).__name__,
        "states": sorted({str(state["exp_avg_sq"].dtype) for state in engine.basic_optimizer.state.values()}),
    }
    if index + 1 < len(case["segments"]):
        target = folder / str(index)
        engine.save_checkpoint(str(target), tag="saved", save_latest=segment["save_latest"])
        if segment["stage"] > 0 and "nvme" not in str(zero) and result["wrapper"] != "BF16_Optimizer":
            with allowing_saved_classes():
                found = get_fp32_state_dict_from_zero_checkpoint(str(target), tag="saved")
            result["zero_to_fp32"] = deviation({name: found[name] for name in weights[-1]}, weights[-1])
        if case["segments"][index + 1]["universal"] and case["segments"][index + 1]["launch"] != segment["launch"]:
            to_universal(target)
    engine.destroy()
    return result


def run_case(case: dict[str, Any], folder: Path, launch: int) -> list[dict[str, Any]]:
    segments = [segment["launch"] for segment in case["segments"]]
    expected = uninterrupted(case) if launch in segments else []
    results = []
    for index, segment in enumerate(case["segments"]):
        if segment["launch"] != launch:
            continue
        try:
            results.append(run_segment(case, index, expected[index] if index < len(expected) else [], folder))
        except Exception as error:
            if not segment["expect_error"]:
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
        segments = [{**SEGMENT_DEFAULTS, **segment} for segment in case["segments"]]
        case_folder = Path(folder) / case["name"]
        try:
            return run_case({**case, "segments": segments}, case_folder, int(launch))
        finally:
            if dist.get_rank() == 0 and all(segment["launch"] <= int(launch) for segment in segments):
                shutil.rmtree(case_folder, ignore_errors=True)

    run_cases(cases_path, str(Path(folder) / f"results-{launch}.json"), {}, run)


if __name__ == "__main__":
    main(*sys.argv[1:])
