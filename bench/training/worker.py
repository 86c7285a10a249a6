"""One rank of one case of `adax-triton bench train`, a process of its own: trains, and leaves its figures in a folder.

    python -m adax_triton.bench.training.rank FOLDER

with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. Reads FOLDER/job.json; writes FOLDER/rank<n>.json,
figures or the reason why there are none; rank 0 appends a byte per step to FOLDER/progress.
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
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from adax_triton.bench.harness.gpt import GPT, Batches
from torch import Tensor, nn

from adax_triton import AdaXW

from .cases import CLIPPING, RULES, Case, deepspeed_config

HELD_OUT_BATCHES = 8  # per rank


class Job(NamedTuple):
    """What all cases of a run have in common."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    steps: int
    warmup: int
    lr: float
    seed: int
    dtype: str
    device: str
    threads: int
    text: str | None


class PlainEngine:
    """Plain PyTorch: the model, DistributedDataParallel around it where there are several ranks, one optimizer."""

    def __init__(self, case: Case, job: Job, model: nn.Module, device: torch.device, ranks: int) -> None:
        model.to(device, torch.bfloat16 if case.bfloat16_weights else torch.float32)
        self.autocast = job.dtype == "bfloat16" and not case.bfloat16_weights
        self.device_type = job.device
        self.module: Any = model
        if ranks > 1:
            dist.init_process_group("nccl" if job.device == "cuda" else "gloo")
            self.module = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.params = list(model.parameters())
        rule = {"lr": job.lr, **RULES[case.optimizer]}
        if case.is_ours:
            kept: dict[str, Any] = {"states": case.states, "master_weights": case.master_weights}
            self.optimizer: torch.optim.Optimizer = AdaXW(self.params, **rule, **kept)
        else:
            self.optimizer = torch.optim.AdamW(self.params, fused=True, **rule)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Run the forward pass."""
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.autocast):
            return self.module(inputs, targets)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass, the sum over the ranks included."""
        loss.backward()

    def step(self) -> None:
        """Clip, step and clear the gradients: what DeepSpeed's `engine.step` does."""
        nn.utils.clip_grad_norm_(self.params, CLIPPING)
        self.optimizer.step()
        self.optimizer.zero_grad()


class DeepSpeedEngine:
    """DeepSpeed, from a configuration alone; ours is registered by its integration."""

    def __init__(self, case: Case, job: Job, model: nn.Module) -> None:
        import adax_triton.integrations.deepspeed  # noqa: F401  registers the optimizer types
        import deepspeed

        deepspeed.utils.logger.setLevel("WARNING")
        # On CPU DeepSpeed would compile a C++ extension first, for an all-reduce that only inference calls.
        getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
        config = deepspeed_config(case, job.batch, job.dtype, job.lr, job.device)
        self.module, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        self.optimizer = self.module.basic_optimizer

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Run the forward pass."""
        return self.module(inputs, targets)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass."""
        self.module.backward(loss)

    def step(self) -> None:
        """Clip, step, copy to the model's weights and clear the gradients."""
        self.module.step()


class Times:
    """Seconds of steps, and of the optimizer within them.

    A step is timed on the host until the device has finished. The optimizer is timed on the device's own clock, between
    marks in its queue, so that the host need not wait between the phases.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[float] = []
        self.optimizer: list[float] = []
        self._start = 0.0
        self._mark: Any = None

    def begin(self) -> None:
        """Begin a step."""
        self._synchronize()
        self._start = time.perf_counter()

    def gradients_ready(self) -> None:
        """End the backward pass, and begin the optimizer."""
        self._mark = self._now()

    def end(self) -> None:
        """End the step."""
        end = self._now()
        self._synchronize()
        self.steps.append(time.perf_counter() - self._start)
        cuda = self.device.type == "cuda"
        self.optimizer.append(self._mark.elapsed_time(end) / 1e3 if cuda else end - self._mark)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def host_peak_bytes() -> int:
    """Return the largest resident set of this process so far.

    From /proc where there is one: the peak of getrusage also counts the process this one was started from.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def train(case: Case, job: Job, rank: int, ranks: int, progress: Path) -> dict[str, Any]:
    """Train and return this rank's figures."""
    device = torch.device(job.device, rank) if job.device == "cuda" else torch.device("cpu")
    before = host_peak_bytes()
    batches = Batches(job.context, job.seed, None if job.text is None else Path(job.text))
    torch.manual_seed(job.seed)
    model = GPT(job.layers, job.width, job.heads, job.context)
    weights = sum(param.numel() for param in model.parameters())
    plain = case.stage is None
    engine = PlainEngine(case, job, model, device, ranks) if plain else DeepSpeedEngine(case, job, model)
    times = Times(device)
    for step in range(job.warmup + job.steps):
        if step == job.warmup and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        inputs, targets = (part.to(device) for part in batches.batch(step, rank, ranks, job.batch))
        times.begin()
        engine.backward(engine.loss(inputs, targets))
        times.gradients_ready()
        engine.step()
        times.end()
        if rank == 0:
            with progress.open("a") as file:
                file.write(".")
    host_peak = host_peak_bytes()
    figures = {
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else host_peak,
        "host_peak_bytes": host_peak,
        "host_before_bytes": before,
        "state_bytes": _state_bytes(engine.optimizer),
        "optimizer_class": f"{type(engine.optimizer).__module__}.{type(engine.optimizer).__qualname__}",
    }
    with torch.no_grad():
        engine.module.eval()
        held_out = [batches.batch(i, rank, ranks, job.batch, held_out=True) for i in range(HELD_OUT_BATCHES)]
        losses = [engine.loss(inputs.to(device), targets.to(device)).item() for inputs, targets in held_out]
    return {
        **{"weights": weights, "loss": statistics.fmean(losses), **figures},
        **{"steps_s": times.steps[job.warmup :], "optimizer_s": times.optimizer[job.warmup :]},
    }


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in states if isinstance(value, Tensor))


def main(folder: Path) -> int:
    """Run this rank; return 1 if there are no figures."""
    written = json.loads((folder / "job.json").read_text())
    case, job = Case(**written["case"]), Job(**written["job"])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(job.threads)
    if job.device == "cuda":
        torch.cuda.set_device(rank)
    try:
        result = train(case, job, rank, ranks, folder / "progress")
        if not math.isfinite(result["loss"]):
            result = {"absent": f"the loss is {result['loss']} after {job.warmup + job.steps} steps"}
    except Exception as error:  # a row of the table says why; the traceback stands in the log
        result = {"absent": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
        traceback.print_exc()
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 1 if "absent" in result else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
