"""`adax-triton bench train`: tokens per second, the optimizer's share of a step and peak memory of a small GPT.

Plain PyTorch and DeepSpeed's ZeRO 0 to 3, with and without CPU offload, each with AdaXW and with the AdamW that users
of the framework would take. Every case is a set of processes of its own, one per rank, from the same weights, on the
same batches, with the same clipping; the loss on held-out batches after the last step stands beside the speed, so that
nothing is fast and wrong. The same optimizer should end at the same loss under every framework.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from adax_triton.bench.harness.environment import describe, origin
from adax_triton.bench.harness.progress import progress
from adax_triton.bench.harness.timing import p20_and_p80
from adax_triton.bench.step.command import NOT_REACHED

from .cases import CLIPPING, DTYPES, Case, cases, choose
from .rank import Job
from .table import table

SHAPES = {
    "cuda": {"layers": 12, "width": 768, "heads": 12, "context": 1024, "batch": 8},
    "cpu": {"layers": 4, "width": 256, "heads": 4, "context": 128, "batch": 4},
}
QUICK = {"layers": 2, "width": 64, "heads": 2, "context": 64, "batch": 4, "steps": 12, "warmup": 3}
QUICK_BUDGET_S = 50.0
POLL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.add_argument("--device", choices=list(SHAPES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, help="processes, one per GPU; default: 1 on a GPU, 2 on a CPU (gloo)")
    parser.add_argument("--threads", type=int, help="CPU threads of a rank; default: the cores divided by the ranks")
    parser.add_argument("--dtype", choices=DTYPES, help="of the forward pass; default: bfloat16 on a GPU, else float32")
    for name in ("layers", "width", "heads", "context", "batch"):
        defaults = ", ".join(f"{shape[name]} on {device}" for device, shape in SHAPES.items())
        what = "sequences per rank" if name == "batch" else "of the GPT"
        parser.add_argument(f"--{name}", type=int, help=f"{what}; default: {defaults}")
    parser.add_argument("--steps", type=int, help="timed steps; default: 40")
    parser.add_argument("--warmup", type=int, help="steps before those; default: 5")
    parser.add_argument("--lr", type=float, default=1e-3, help="of both optimizers; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--text", type=Path, help="a file to train on instead of synthetic tokens; one byte, one token")
    parser.add_argument(
        "--only", nargs="*", metavar="NAME", help="cases of these names, or of names with these parts; see --list"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases, and do nothing else")
    parser.add_argument("--quick", action="store_true", help="a few cases of a tiny model, in less than a minute")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for a case; default: %(default)s")
    parser.add_argument(
        "--budget",
        type=float,
        help=f"seconds for all cases, after which what is left is listed as not reached; default: {QUICK_BUDGET_S:.0f} "
        "with --quick, else any",
    )
    parser.add_argument("--json", type=Path, help="write the result here, anew after each case")


def main(arguments: argparse.Namespace) -> int:
    """Run what the options ask for.

    Returns:
        1 where one of ours has no figures though another optimizer has, under the same framework.
    """
    try:
        job, ranks = plan(arguments)
        chosen = choose(cases(job.dtype), arguments.only, arguments.quick)
    except ValueError as error:
        print(f"adax-triton bench train: {error}", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return 0
    budget_s = arguments.budget or (QUICK_BUDGET_S if arguments.quick else math.inf)
    for result in run(chosen, job, ranks, arguments.timeout, budget_s):
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(f"{origin(result)}\n\n{table(result)}")
    return 1 if ours_failed(chosen, result["cases"]) else 0


def plan(arguments: argparse.Namespace) -> tuple[Job, int]:
    """Return what all cases have in common, and the number of ranks.

    Raises:
        ValueError: an option is out of range.
    """
    device = arguments.device
    defaults: dict[str, int] = {**SHAPES[device], "steps": 40, "warmup": 5, **(QUICK if arguments.quick else {})}
    sizes = {name: getattr(arguments, name) for name in defaults}
    sizes = {name: defaults[name] if size is None else size for name, size in sizes.items()}
    ranks = (1 if device == "cuda" else 2) if arguments.ranks is None else arguments.ranks
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // max(1, ranks)) if arguments.threads is None else arguments.threads
    for name, value in {"ranks": ranks, "threads": threads, **sizes}.items():
        if value < (0 if name == "warmup" else 1):
            raise ValueError(f"{name}: expected a positive number, got {value}")
    if sizes["width"] % sizes["heads"]:
        raise ValueError(f"width: expected a multiple of heads={sizes['heads']}, got {sizes['width']}")
    if device == "cuda" and ranks > torch.cuda.device_count():
        raise ValueError(f"ranks: {ranks} need as many GPUs, found {torch.cuda.device_count()}")
    if arguments.text is not None and not arguments.text.is_file():
        raise ValueError(f"text: no such file: {arguments.text}")
    job = Job(
        **sizes,
        lr=arguments.lr,
        seed=arguments.seed,
        dtype=arguments.dtype or ("bfloat16" if device == "cuda" else "float32"),
        device=device,
        threads=threads,
        text=None if arguments.text is None else str(arguments.text.resolve()),
    )
    return job, ranks


def run(
    chosen: list[Case], job: Job, ranks: int, timeout_s: float, budget_s: float = math.inf
) -> Iterator[dict[str, Any]]:
    """Train every case, and yield the result after each, JSON-friendly; a case may take what is left of the budget."""
    deadline = time.monotonic() + budget_s
    device = torch.device(job.device)
    result: dict[str, Any] = {
        "benchmark": "train",
        "environment": {**describe(device), "threads": job.threads},
        **{name: value for name, value in job._asdict().items() if name not in ("threads", "text")},
        **{"text": job.text is not None, "ranks": ranks, "clipping": CLIPPING, "cases": {}},
    }
    no_deepspeed = importlib.util.find_spec("deepspeed") is None
    steps = job.warmup + job.steps
    with progress(len(chosen) * steps, "bench train") as advance:
        for case in chosen:
            advance(0, case.name)
            if case.stage is not None and no_deepspeed:
                row: dict[str, Any] = {"absent": "deepspeed is not installed"}
                advance(steps, case.name)
            elif time.monotonic() >= deadline:
                row = {"absent": NOT_REACHED}
                advance(steps, case.name)
            else:
                left_s = min(timeout_s, deadline - time.monotonic())
                row = run_case(case, job, ranks, left_s, functools.partial(_advance_in, advance, case.name))
                if row == _no_result(left_s) and left_s < timeout_s:
                    row = {"absent": NOT_REACHED}
            result["cases"][case.name] = row
            _compare(result["cases"])
            yield result


def _advance_in(advance: Callable[[int, str], None], now: str, count: int) -> None:
    advance(count, now)


def run_case(
    case: Case, job: Job, ranks: int, timeout_s: float, advance: Callable[[int], None] = lambda count: None
) -> dict[str, Any]:
    """Train one case in `ranks` processes; return its figures, or why there are none. No process outlives the call."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps({"case": dataclasses.asdict(case), "job": job._asdict()}))
        processes = []
        with (folder / "ranks.log").open("w") as log:
            try:
                for environment in _environments(job, ranks):
                    # -P keeps the working folder off sys.path.
                    command = [sys.executable, "-P", "-m", "adax_triton.bench.training.rank", str(folder)]
                    processes.append(subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log))
                codes = _wait(processes, folder / "progress", job.warmup + job.steps, timeout_s, advance)
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
        return _collect(folder, codes, job, timeout_s)


def _environments(job: Job, ranks: int) -> list[dict[str, str]]:
    # Triton's interpreter is for tests: what it takes is no figure.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    shared["OMP_NUM_THREADS"] = str(job.threads)
    if job.device == "cpu":
        shared |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return [{**inherited, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _wait(
    processes: list[subprocess.Popen[bytes]],
    marks: Path,
    steps: int,
    timeout_s: float,
    advance: Callable[[int], None],
) -> list[int | None]:
    """Wait until all have ended, one has failed, or the time is over; `advance` covers `steps` in the end."""
    deadline, done = time.monotonic() + timeout_s, 0
    codes: list[int | None] = [None] * len(processes)
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        reached = marks.stat().st_size if marks.exists() else 0
        advance(reached - done)
        done = reached
        if None not in codes or any(codes):  # the others would wait for the failed one until their own timeout
            break
        time.sleep(POLL_S)
    advance(steps - done)
    return codes


def _collect(folder: Path, codes: list[int | None], job: Job, timeout_s: float) -> dict[str, Any]:
    ranks = len(codes)
    files = [folder / f"rank{rank}.json" for rank in range(ranks)]
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    absent = [row for row in found if "absent" in row]
    if absent:
        return absent[0]
    if len(found) < ranks:
        failed = [code for code in codes if code]
        last = ((folder / "ranks.log").read_text().strip().splitlines() or [""])[-1]
        return {"absent": f"a rank ended with {failed[0]}: {last}"} if failed else _no_result(timeout_s)
    return summarize(found, job.batch * job.context * ranks)


def _no_result(timeout_s: float) -> dict[str, Any]:
    return {"absent": f"no result after {timeout_s:g} s"}


def summarize(found: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Return the figures of a case from those of its ranks.

    A step takes what its slowest rank takes; memory is the rank's that needs most; the loss is the mean.

    Args:
        found: per rank, what `train_rank.train` returns.
        tokens: per step, of all ranks.
    """
    steps = [max(times) for times in zip(*(rank["steps_s"] for rank in found), strict=True)]
    optimizer = [max(times) for times in zip(*(rank["optimizer_s"] for rank in found), strict=True)]
    median = statistics.median(steps)
    p20, p80 = p20_and_p80(steps)
    most = ("peak_bytes", "host_peak_bytes", "host_before_bytes", "state_bytes")
    return {
        "tokens_per_s": tokens / median,
        "median_ms": median * 1e3,
        "p20_ms": p20 * 1e3,
        "p80_ms": p80 * 1e3,
        "optimizer_ms": statistics.median(optimizer) * 1e3,
        "optimizer_share": statistics.median(optimizer) / median,
        **{name: max(rank[name] for rank in found) for name in most},
        "loss": statistics.fmean(rank["loss"] for rank in found),
        "optimizer_class": found[0]["optimizer_class"],
        "weights": found[0]["weights"],
    }


def _compare(rows: dict[str, dict[str, Any]]) -> None:
    for name, row in rows.items():
        plain = rows.get("plain / AdaXW" if name.endswith("AdaXW") else "plain / torch AdamW", {})
        if name.endswith(("/ AdaXW", "AdamW")) and "loss" in row and "loss" in plain:
            row["loss_over_plain"] = row["loss"] - plain["loss"]


def ours_failed(chosen: list[Case], rows: dict[str, dict[str, Any]]) -> bool:
    """Whether one of ours was reached and has no figures though another case of the same framework has."""
    alive = {case.framework for case in chosen if "absent" not in rows[case.name]} | {"plain"}
    failed = [case for case in chosen if rows[case.name].get("absent", NOT_REACHED) != NOT_REACHED]
    return any(case.is_ours and case.framework in alive for case in failed)
