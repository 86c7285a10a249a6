"""Bytes and time of a step under DeepSpeed's ZeRO, with the passes around it fused and as DeepSpeed takes them.

    python -m adax_triton.bench.zero_passes.passes --out bench/results/NAME.json --table docs/deepspeed-passes.md

One process owns all parameters of a few linear layers. Bytes are those of the ZeRO optimizer's `step()`, counted by
`deepspeed_traffic`; times are those of `engine.step()`, the two engines of a case taking turns, each gradient from a
backward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from adax_triton.bench.harness.environment import describe, origin
from torch import nn

from .traffic import Traffic

LAYERS = 3
CLIPPING = 1e-3  # well below the norms there are: every step clips
OFF, HOOKS, AUTO = "off", "hooks", "auto"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_CPU_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


class Case(NamedTuple):
    """A path of DeepSpeed's, and the most bytes per parameter that it may move: fused, and by hooks alone if it can."""

    stage: int
    dtype: str
    zero: dict[str, Any]
    config: dict[str, Any]
    ceiling: float
    hooks_ceiling: float | None = None


CASES = {
    "ZeRO 1, bf16": Case(1, "bf16", {}, {}, 34, 48),
    "ZeRO 2, bf16": Case(2, "bf16", {}, {}, 34, 48),
    "ZeRO 2, bf16, overflow checked": Case(
        2, "bf16", {}, {"bf16": {"enabled": True, "check_grad_overflow": True}}, 34, 48
    ),
    "ZeRO 2, fp16": Case(2, "fp16", {}, {}, 34, 48),
    "ZeRO 2, fp32": Case(2, "fp32", {}, {}, 40, 60),
    "ZeRO 3, bf16": Case(3, "bf16", {}, {}, 34),
    "ZeRO 3, fp16": Case(3, "fp16", {}, {}, 34),
    "BF16_Optimizer": Case(1, "bf16", {}, {"data_types": {"grad_accum_dtype": "fp32"}}, 40),
    "ZeRO 2, bf16, CPU offload": Case(2, "bf16", _CPU_OFFLOAD, {}, 34, 38),
    "ZeRO 3, bf16, CPU offload": Case(3, "bf16", _CPU_OFFLOAD, {}, 34),
}


def start() -> None:
    """Start a process group of this process alone, unless there is one, and register the optimizer types."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    os.environ.update(alone)
    import adax_triton.integrations.deepspeed  # noqa: F401  registers the optimizer types
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.utils.logger.setLevel("ERROR")
    # It collects garbage a dozen times while one of these is built.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda message, force=False: None
    # An inference-only kernel that DeepSpeed would compile for every new environment.
    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    get_accelerator().is_fp16_supported = lambda: True  # its logic is the same on a CPU


class Run:
    """An engine of one case and mode.

    Args:
        case: the path.
        mode: `OFF`, `AUTO`, or `HOOKS`, as with a DeepSpeed whose `step()` is none of those known.
        width: of the layers.
    """

    def __init__(self, case: Case, mode: str, width: int) -> None:
        from adax_triton.integrations.deepspeed.fused_step import zero_steps as deepspeed_fuse_steps

        known = {} if mode == HOOKS else deepspeed_fuse_steps.VERIFIED_STEPS
        with mock.patch.object(deepspeed_fuse_steps, "VERIFIED_STEPS", known):
            self.engine = self._built(case, OFF if mode == OFF else AUTO, width)
        self._width, self._dtype, self._generator = width, DTYPES[case.dtype], torch.Generator().manual_seed(1)

    @staticmethod
    def _built(case: Case, fuse: str, width: int) -> Any:
        import deepspeed

        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdaXW", "params": {"lr": 1e-3, "weight_decay": 1e-2}},
            "gradient_clipping": CLIPPING,
            "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0, **case.zero},
            "adax_triton": {"fuse": fuse},
        }
        if case.dtype == "bf16":
            config["bf16"] = {"enabled": True}
        elif case.dtype == "fp16":
            config["fp16"] = {"enabled": True, "initial_scale_power": 4}
        return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config | case.config)[0]

    @property
    def numel(self) -> int:
        """The elements of all parameters."""
        return LAYERS * self._width * (self._width + 1)

    def backward(self) -> None:
        """Run the model forward and backward on new numbers."""
        inputs = torch.randn(2, self._width, generator=self._generator).to(self.engine.device, self._dtype)
        self.engine.backward(self.engine(inputs).float().square().mean())

    def traffic(self) -> dict[str, float]:
        """Return the bytes per parameter of the second step, by operation, without those that are negligible."""
        self.backward()
        with Traffic():  # creates the states
            self.engine.step()
        self.backward()
        with Traffic() as traffic:
            self.engine.optimizer.step()
        return {name: count / self.numel for name, count in traffic.bytes.items() if count >= 0.1 * self.numel}

    def seconds(self) -> float:
        """Return how long one `engine.step()` takes, after a backward pass."""
        self.backward()
        started = time.perf_counter()
        self.engine.step()
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def measure_bytes(width: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return bytes per parameter by case, mode and operation."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, case in CASES.items():
        modes = [OFF, AUTO] if case.hooks_ceiling is None else [OFF, HOOKS, AUTO]
        for mode in modes:
            run = Run(case, mode, width)
            found.setdefault(name, {})[mode] = run.traffic()
            run.engine.destroy()
    return found


def measure_times(width: int, repetitions: int) -> dict[str, dict[str, float]]:
    """Return the median milliseconds of a step by case and mode."""
    found = {}
    for name, case in CASES.items():
        runs = {mode: Run(case, mode, width) for mode in (OFF, AUTO)}
        seconds: dict[str, list[float]] = {mode: [] for mode in runs}
        for repetition in range(repetitions + 2):
            for mode, run in runs.items():
                taken = run.seconds()
                if repetition >= 2:  # the first ones compile
                    seconds[mode].append(taken)
        found[name] = {mode: 1e3 * statistics.median(times) for mode, times in seconds.items()}
        for run in runs.values():
            run.engine.destroy()
    return found


def table(result: dict[str, Any]) -> str:
    """Return a result as Markdown."""
    times = result["times_ms"]
    rows = [
        "| path | bytes, DeepSpeed's passes | by hooks alone | fused | ms, DeepSpeed's passes | fused |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, modes in result["bytes"].items():
        totals = {mode: f"{sum(operations.values()):.1f}" for mode, operations in modes.items()}
        measured = [f"{times[name][mode]:.1f}" for mode in (OFF, AUTO)] if name in times else ["", ""]
        rows.append(f"| {name} | {totals[OFF]} | {totals.get(HOOKS, '')} | {totals[AUTO]} | {' | '.join(measured)} |")
    parts = [
        f"| {name} | {', '.join(f'{operation} {count:.1f}' for operation, count in sorted(modes[AUTO].items()))} |"
        for name, modes in result["bytes"].items()
    ]
    what = f"{LAYERS} layers of width {result['width']}, clipping in every step"
    moved = ["| path | bytes that are left, by operation |", "|---|---|", *parts]
    return "\n".join([what, "", *rows, "", *moved])


def main(argv: list[str] | None = None) -> int:
    """Measure, print the tables, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="of the layers")
    parser.add_argument("--repetitions", type=int, default=15, help="timed steps per case and mode; 0 for none")
    parser.add_argument("--out", type=Path, help="write the result into this JSON file")
    parser.add_argument("--table", type=Path, help="rewrite the tables of this Markdown file, below its marker")
    arguments = parser.parse_args(argv)
    start()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {
        "benchmark": "passes",
        "environment": describe(device),
        "width": arguments.width,
        "bytes": measure_bytes(arguments.width),
        "times_ms": measure_times(arguments.width, arguments.repetitions) if arguments.repetitions else {},
    }
    text = f"{origin(result)}\n\n{table(result)}"
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.table is not None:
        head, marker, _ = arguments.table.read_text().partition("<!-- measured -->\n")
        arguments.table.write_text(f"{head}{marker}\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
