"""Run sections of docs/deepspeed.md on one rank.

A section's configuration runs in a real engine, and its programs run.

Usage, once per rank: RANK=... LOCAL_RANK=... WORLD_SIZE=... python guide_worker.py CASES.json RESULTS.json

CASES.json is a list of {"name": heading of a section, "folder": where it runs}; RESULTS.json becomes {heading: result}.
The configuration is the guide's, with another "nvme_path"; without libaio the device "nvme" becomes "cpu". A section
that loads a checkpoint finds it in the folder: from the section before, or from a run of AdamW that is made here.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from async_io import merge_sources
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed_cases import run_cases, start
from deepspeed_oracle import MICRO_BATCH, VOCABULARY, TiedModel
from deepspeed_worker import deviation, master_weights
from paths import ROOT
from torch import Tensor

GUIDE = ROOT / "docs" / "deepspeed.md"
WIDTH = 128  # wide enough that the flat partitions of both ranks have quantized states
STEPS = 2
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}


def sections() -> dict[str, dict[str, list[str]]]:
    """Return {heading: {language: blocks}} of the guide.

    The key "" is the part above the first heading.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for part in re.split(r"^## ", "## \n" + GUIDE.read_text(), flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        blocks = found.setdefault(heading.strip(), {})
        for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            blocks.setdefault(language, []).append(block)
    return found


def configuration(blocks: dict[str, list[str]]) -> dict[str, Any]:
    (block,) = blocks["json"]
    config = json.loads(block)
    offload = config["zero_optimization"].get("offload_optimizer", {})
    if offload.get("device") == "nvme":
        offload["nvme_path"] = str(Path("swapped").resolve())
        merge_sources()
        offload["device"] = "nvme" if AsyncIOBuilder().is_compatible(verbose=False) else "cpu"
    return config


def build_model(seed: int = 0) -> TiedModel:
    torch.manual_seed(seed)
    return TiedModel(WIDTH)


def batches(steps: range, accumulation: int) -> list[tuple[Tensor, Tensor]]:
    """Return this rank's batches of some steps.

    One rank with two accumulation steps gets the batches of two ranks.
    """
    found = []
    for step in steps:
        for part in range(accumulation):
            place = part + dist.get_rank() * accumulation
            generator = torch.Generator().manual_seed(100 * step + place)
            tokens, targets = torch.randint(VOCABULARY, (2, MICRO_BATCH), generator=generator)
            found.append((tokens, targets))
    return found


def train(engine: Any, steps: range) -> None:
    for inputs, targets in batches(steps, engine.gradient_accumulation_steps()):
        engine.backward(engine(inputs, targets))
        engine.step()


def start_adamw(config: dict[str, Any]) -> None:
    """Train two AdamW steps and save a checkpoint to switch from."""
    model = build_model()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config={**config, "optimizer": ADAMW}
    )
    train(engine, range(STEPS))
    engine.save_checkpoint("checkpoints")
    engine.destroy()


def run_section(name: str) -> dict[str, Any]:
    common, blocks = sections()[""], sections()[name]
    config = configuration(blocks)
    if dist.get_rank() == 0:
        Path("ds_config.json").write_text(json.dumps(config))
    dist.barrier()
    for command in blocks.get("sh", []):
        subprocess.run(command.replace("python ", f"{sys.executable} ", 1), shell=True, check=True)
    if "switching_optimizer" in str(blocks):
        start_adamw(config)
    loads = "load_checkpoint" in str(blocks)
    model = build_model(seed=1 if loads else 0)  # another seed, so only the checkpoint can restore the weights
    namespace: dict[str, Any] = {"model": model}
    namespace["batches"] = batches(range(STEPS), config.get("gradient_accumulation_steps", 1))
    for program in blocks.get("python") or common["python"]:
        exec(program, namespace)
    engine = namespace["engine"]
    after_program = master_weights(engine)
    result = {
        "config": config,
        "optimizer": type(engine.basic_optimizer).__name__,
        "wrapper": type(engine.optimizer).__name__,
        "finite": all(bool(weight.isfinite().all()) for weight in after_program.values()),
    }
    train(engine, range(STEPS, 2 * STEPS))
    weights, trajectory = master_weights(engine), Path("trajectory.pt")
    result["steps"] = sorted({int(state["step"]) for state in engine.basic_optimizer.state.values()})
    result["moved"] = deviation(weights, after_program)
    if blocks.get("sh"):
        loaded, uninterrupted = torch.load(trajectory)
        result["loaded_deviation"] = deviation(after_program, loaded)
        result["resume_deviation"] = deviation(weights, uninterrupted)
    elif dist.get_rank() == 0:
        torch.save((after_program, weights), trajectory)
    result["kept"] = kept_bytes(engine)
    engine.destroy()
    return result


def kept_bytes(engine: Any) -> dict[str, float]:
    """Return bytes per parameter of this rank's tensors in memory.

    The names are those in bench/memory/deepspeed.py.
    """
    zero, parameters = engine.optimizer, [param for param in engine.module.parameters() if param.requires_grad]
    *whole, last = batches(range(1), engine.gradient_accumulation_steps())
    for inputs, targets in whole:
        engine.backward(engine(inputs, targets))
        engine.step()
    engine.backward(engine(*last))
    stage_3 = hasattr(zero, "grad_partitions_flat_buffer")
    masters = zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups
    lists: dict[str, Any] = {
        "weights": [getattr(param, "ds_tensor", param) for param in parameters],
        "float32 weights": masters,
        "exp_avg": [state["exp_avg"] for state in engine.basic_optimizer.state.values()],
        "exp_avg_sq": [state["exp_avg_sq"] for state in engine.basic_optimizer.state.values()],
        "group_exponents": [state.get("group_exponents") for state in engine.basic_optimizer.state.values()],
    }
    if engine.zero_use_cpu_optimizer():
        lists["float32 gradients"] = [master.grad for master in masters]
        if stage_3:
            lists["gradients in the model's dtype"] = [zero.grad_partitions_flat_buffer]
        else:
            lists["weights to copy back"] = zero.param_buffer_of_bit16_for_cpu_offload_groups
            lists["accumulated gradients"] = zero.accumulated_grads_in_cpu.values()
    elif stage_3:
        lists["gradients"] = [zero.grad_partitions_flat_buffer]
    else:
        lists["gradients"] = [grad for grads in zero.averaged_gradients.values() for grad in grads]
    numel = sum(getattr(param, "ds_numel", param.numel()) for param in parameters)
    sizes = {name: sum(t.nbytes for t in tensors if t is not None) for name, tensors in lists.items()}
    return {name: size / numel for name, size in sizes.items() if size}


def run(case: dict[str, Any]) -> dict[str, Any]:
    Path(case["folder"]).mkdir(exist_ok=True)
    os.chdir(case["folder"])
    return run_section(case["name"])


def main(cases_path: str, results_path: str) -> None:
    start()
    run_cases(cases_path, results_path, {}, run)


if __name__ == "__main__":
    main(*sys.argv[1:])
