"""Run one rank of a case of `adax-triton bench train`.

    python -m adax_triton.bench.training.worker FOLDER

with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. Reads FOLDER/job.json. Writes FOLDER/rank<n>.json
with the measurements, or with the error.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from adax_triton.bench.harness.timing import busy_seconds
from torch import Tensor, nn

from adax_triton import AdaXW

from .cases import CLIPPING, RULES, Case, cases, deepspeed_config
from .gpt import GPT, Batches

HELD_OUT_BATCHES = 8  # per rank
BUSY_STEPS = 3  # profiled after all else


class Job(NamedTuple):
    """Settings shared by all cases."""

    ranks: int
    layers: int
    width: int
    heads: int
    context: int
    batch: int
    steps: int
    warmup: int
    lr: float
    dtype: str
    device: str
    threads: int
    seed: int = 0


class Engine(NamedTuple):
    """A model in its framework: forward, backward and optimizer step.

    `step` clips gradients, updates weights and clears gradients.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor], None]
    step: Callable[[], None]


def plain_engine(case: Case, job: Job, model: nn.Module, device: torch.device) -> Engine:
    """Return plain PyTorch, with DistributedDataParallel for several ranks."""
    model.to(device, torch.bfloat16 if case.bfloat16_weights else torch.float32)
    module, params = model, list(model.parameters())
    if job.ranks > 1:
        dist.init_process_group("nccl" if job.device == "cuda" else "gloo")
        module = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    autocast = job.dtype == "bfloat16" and not case.bfloat16_weights
    rule = {"lr": job.lr, **RULES[case.optimizer]}
    clips_itself = case.optimizer == "AdaXW"
    optimizer: torch.optim.Optimizer
    if clips_itself:
        optimizer = AdaXW(
            params, states=case.states, master_weights=case.master_weights, max_grad_norm=CLIPPING, **rule
        )
    else:
        optimizer = torch.optim.AdamW(params, fused=True, **rule)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(job.device, torch.bfloat16, enabled=autocast):
            return module(inputs, targets)

    def step() -> None:
        if not clips_itself:
            nn.utils.clip_grad_norm_(params, CLIPPING)
        optimizer.step()
        optimizer.zero_grad()

    return Engine(module, optimizer, loss, lambda loss: loss.backward(), step)


def deepspeed_engine(case: Case, job: Job, model: nn.Module) -> Engine:
    """Return a DeepSpeed engine, made from a configuration only."""
    import adax_triton.integrations.deepspeed  # noqa: F401  registers the optimizer types
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed would compile this inference kernel for every new environment.
    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    config = deepspeed_config(case, job.batch, job.dtype, job.lr, job.device)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return Engine(engine, engine.basic_optimizer, engine, engine.backward, engine.step)


def timed_step(engine: Engine, inputs: Tensor, targets: Tensor, device: torch.device) -> tuple[float, float]:
    """Train one step; return its seconds and the optimizer's seconds.

    The optimizer's time spans clipping to cleared gradients. On a GPU, events measure it, so the host does not wait for
    the backward pass.
    """
    cuda = device.type == "cuda"

    def mark() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    engine.backward(engine.loss(inputs, targets))
    ready = mark()
    engine.step()
    end = mark()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, ready.elapsed_time(end) / 1e3 if cuda else end - ready


def host_peak_bytes() -> int:
    """Return the largest resident set of this process so far."""
    status = Path("/proc/self/status")  # getrusage would include the parent's peak
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def train(case: Case, job: Job, rank: int) -> dict[str, Any]:
    """Train and return this rank's measurements."""
    device = torch.device(job.device, rank) if job.device == "cuda" else torch.device("cpu")
    before = host_peak_bytes()
    batches = Batches(job.context, job.seed)
    torch.manual_seed(job.seed)
    model = GPT(job.layers, job.width, job.heads, job.context)
    weights = sum(param.numel() for param in model.parameters())
    engine = plain_engine(case, job, model, device) if case.stage is None else deepspeed_engine(case, job, model)
    times = []
    for step in range(job.warmup + job.steps):
        if step == job.warmup and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        inputs, targets = (part.to(device) for part in batches.batch(step, rank, job.ranks, job.batch))
        times.append(timed_step(engine, inputs, targets, device))
    steps_s, optimizer_s = zip(*times[job.warmup :], strict=True)
    host_peak = host_peak_bytes()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else host_peak
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    losses = []
    with torch.no_grad():
        engine.module.eval()
        for index in range(HELD_OUT_BATCHES):
            inputs, targets = batches.batch(index, rank, job.ranks, job.batch, held_out=True)
            losses.append(engine.loss(inputs.to(device), targets.to(device)).item())
    return {
        **{"steps_s": steps_s, "optimizer_s": optimizer_s, "loss": statistics.fmean(losses), "weights": weights},
        **{"peak_bytes": peak, "host_peak_bytes": host_peak, "host_before_bytes": before},
        "state_bytes": sum(value.nbytes for value in states if isinstance(value, Tensor)),
        "optimizer_class": f"{type(engine.optimizer).__module__}.{type(engine.optimizer).__qualname__}",
        "gpu_busy_s": _gpu_busy_s(engine, inputs, targets, device),
    }


def _gpu_busy_s(engine: Engine, inputs: Tensor, targets: Tensor, device: torch.device) -> float | None:
    """Train some more steps; return the seconds of a step in which the GPU works, None on a CPU."""
    if device.type != "cuda":
        return None
    engine.module.train()
    batch = inputs.to(device), targets.to(device)
    return busy_seconds(lambda: [timed_step(engine, *batch, device) for _ in range(BUSY_STEPS)]) / BUSY_STEPS


def main(folder: Path) -> int:
    """Run this rank; return 1 for an error."""
    name, settings = json.loads((folder / "job.json").read_text())
    job, rank = Job(**settings), int(os.environ["RANK"])
    torch.set_num_threads(job.threads)
    if job.device == "cuda":
        torch.cuda.set_device(rank)
    try:
        result = train(cases(job.dtype)[name], job, rank)
        if not math.isfinite(result["loss"]):
            result = {"absent": f"the loss is {result['loss']} after {job.warmup + job.steps} steps"}
    except Exception as error:  # the table shows the error, the log has the traceback
        result = {"absent": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
        traceback.print_exc()
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 1 if "absent" in result else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
