"""Measure an optimizer step under DeepSpeed's ZeRO, fused and unfused.

    python -m adax_triton.bench.zero_passes.passes --out bench/results/NAME.json --table docs/deepspeed-passes.md

One process owns all parameters of a few linear layers. Bytes are counted in the ZeRO optimizer's `step()`, see
`traffic.py`. Times are of `engine.step()`: the engines of a case alternate, each with gradients of a backward pass.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from adax_triton.bench.harness.command import markdown_table, publish
from adax_triton.bench.harness.environment import describe, origin
from torch import nn

from .traffic import Traffic

LAYERS = 3
CLIPPING = 1e-3  # below all gradient norms, so every step clips
OFF, PARTIAL, AUTO = "off", "hooks", "auto"
PRECISIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "bf16": (torch.bfloat16, {"bf16": {"enabled": True}}),
    "fp16": (torch.float16, {"fp16": {"enabled": True, "initial_scale_power": 4}}),
    "fp32": (torch.float32, {}),
}
_CHECKED = {"bf16": {"enabled": True, "check_grad_overflow": True}}
_CPU_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


class Case(NamedTuple):
    """A DeepSpeed configuration and its limits in bytes per parameter."""

    stage: int
    dtype: str  # a key of `PRECISIONS`
    ceiling: float  # of a fused step
    partial_ceiling: float | None = None  # of a partly fused step, if the case has one
    zero: dict[str, Any] = {}  # noqa: RUF012  added to "zero_optimization"
    config: dict[str, Any] = {}  # noqa: RUF012  added to the configuration


CASES = {
    "ZeRO 1, bf16": Case(1, "bf16", 34, 48),
    "ZeRO 2, bf16": Case(2, "bf16", 34, 48),
    "ZeRO 2, bf16, overflow checked": Case(2, "bf16", 34, 48, config=_CHECKED),
    "ZeRO 2, fp16": Case(2, "fp16", 34, 48),
    "ZeRO 2, fp32": Case(2, "fp32", 40, 60),
    "ZeRO 3, bf16": Case(3, "bf16", 34),
    "ZeRO 3, fp16": Case(3, "fp16", 34),
    "BF16_Optimizer": Case(1, "bf16", 40, config={"data_types": {"grad_accum_dtype": "fp32"}}),
    "ZeRO 2, bf16, CPU offload": Case(2, "bf16", 34, 38, _CPU_OFFLOAD),
    "ZeRO 3, bf16, CPU offload": Case(3, "bf16", 34, None, _CPU_OFFLOAD),
}


def start() -> None:
    """Start a one-process group, and register our optimizers with DeepSpeed."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(listener.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    import adax_triton.integrations.deepspeed  # noqa: F401  registers the optimizer types
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.utils.logger.setLevel("ERROR")
    # Disable `see_memory_usage`, which runs the garbage collector about 12 times per engine.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda message, force=False: None
    # DeepSpeed would compile this inference kernel for every new environment.
    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    get_accelerator().is_fp16_supported = lambda: True  # counting works on a CPU too


class Run:
    """An engine of one case.

    `PARTIAL` fuses as under an unverified version of DeepSpeed.
    """

    def __init__(self, case: Case, mode: str, width: int) -> None:
        import deepspeed
        from adax_triton.integrations.deepspeed.fused_step import zero_steps

        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))
        self._dtype, precision = PRECISIONS[case.dtype]
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdaXW", "params": {"lr": 1e-3, "weight_decay": 1e-2}},
            "gradient_clipping": CLIPPING,
            "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0, **case.zero},
            "adax_triton": {"fuse": OFF if mode == OFF else AUTO},
            **precision,
            **case.config,
        }
        known = {} if mode == PARTIAL else zero_steps.VERIFIED_STEPS
        with mock.patch.object(zero_steps, "VERIFIED_STEPS", known):
            self.engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
        self._width, self._generator = width, torch.Generator().manual_seed(1)

    def backward(self) -> None:
        """Run forward and backward on new random inputs."""
        inputs = torch.randn(2, self._width, generator=self._generator).to(self.engine.device, self._dtype)
        self.engine.backward(self.engine(inputs).float().square().mean())

    def traffic(self) -> dict[str, float]:
        """Return the bytes per parameter of the second step, by operation.

        Negligible operations are left out.
        """
        self.backward()
        with Traffic():  # creates the states
            self.engine.step()
        self.backward()
        with Traffic() as traffic:
            self.engine.optimizer.step()
        numel = LAYERS * self._width * (self._width + 1)
        return {name: count / numel for name, count in traffic.bytes.items() if count >= 0.1 * numel}

    def seconds(self) -> float:
        """Return the time of one `engine.step()` after a backward pass."""
        self.backward()
        started = time.perf_counter()
        self.engine.step()
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def measure_bytes(case: Case, width: int) -> dict[str, dict[str, float]]:
    """Return bytes per parameter by mode and operation."""
    found = {}
    for mode in (OFF, AUTO) if case.partial_ceiling is None else (OFF, PARTIAL, AUTO):
        run = Run(case, mode, width)
        found[mode] = run.traffic()
        run.engine.destroy()
    return found


def measure_times(case: Case, width: int, repetitions: int) -> dict[str, float]:
    """Return the median milliseconds of a step by mode."""
    runs = {mode: Run(case, mode, width) for mode in (OFF, AUTO)}
    rounds = [{mode: run.seconds() for mode, run in runs.items()} for _ in range(repetitions + 2)]
    for run in runs.values():
        run.engine.destroy()
    return {mode: 1e3 * statistics.median(times[mode] for times in rounds[2:]) for mode in runs}  # the first compile


def table(result: dict[str, Any]) -> str:
    """Return a result as Markdown."""
    titles = ("path", "bytes, DeepSpeed's passes", "partial", "fused", "ms, DeepSpeed's passes", "fused")
    rows, left = [], []
    for name, modes in result["bytes"].items():
        totals = {mode: f"{sum(operations.values()):.1f}" for mode, operations in modes.items()}
        times = {mode: f"{time:.1f}" for mode, time in result["times_ms"].get(name, {}).items()}
        ms = (times.get(OFF, ""), times.get(AUTO, ""))
        rows.append((name, totals[OFF], totals.get(PARTIAL, ""), totals[AUTO], *ms))
        left.append((name, ", ".join(f"{operation} {size:.1f}" for operation, size in sorted(modes[AUTO].items()))))
    title = f"{LAYERS} layers of width {result['width']}, clipping in every step"
    moved = markdown_table(("path", "bytes of the fused step, by operation"), left)
    return "\n".join([title, "", *markdown_table(titles, rows, right=range(1, 6)), "", *moved])


def main(argv: list[str] | None = None) -> int:
    """Measure, print the tables, and write the requested files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="width of the layers; default: %(default)s")
    parser.add_argument("--repetitions", type=int, default=15, help="timed steps per engine; default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    parser.add_argument("--table", type=Path, help="Markdown file: replace the text below <!-- measured -->")
    arguments = parser.parse_args(argv)
    start()
    width, repetitions = arguments.width, arguments.repetitions
    moved = {name: measure_bytes(case, width) for name, case in CASES.items()}
    times = {name: measure_times(case, width, repetitions) for name, case in CASES.items() if repetitions}
    environment = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    result = {"benchmark": "passes", "environment": environment, "width": width, "bytes": moved, "times_ms": times}
    publish(result, table, arguments.out)
    if arguments.table is not None:
        head, marker, _ = arguments.table.read_text().partition("<!-- measured -->\n")
        arguments.table.write_text(f"{head}{marker}\n{origin(result)}\n\n{table(result)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
