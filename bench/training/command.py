"""Train a small GPT; measure speed, the optimizer's share and peak memory.

`adax-triton bench train` trains in plain PyTorch and under DeepSpeed's ZeRO 0 to 3, with and without CPU offload. Each
framework runs with AdaXW and with the AdamW that is usual in it. Every case runs in new processes, one per rank, with
the same weights, batches and clipping. All cases run in turn, round after round, because processes that do the same
differ in speed where the host is the limit. The table also has the loss on held-out batches: the same optimizer should
reach the same loss under every framework.
"""

from __future__ import annotations

import argparse
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
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from adax_triton.bench.harness.command import add_json, count, markdown_table, publish, seconds, write
from adax_triton.bench.harness.environment import describe
from adax_triton.bench.harness.progress import progress
from adax_triton.bench.harness.timing import quantiles
from adax_triton.bench.step.command import NOT_REACHED

from .cases import CLIPPING, Case, cases, choose
from .worker import Job

DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"ranks": 1, "layers": 12, "width": 768, "heads": 12, "context": 1024, "batch": 16, "dtype": "bfloat16"},
    "cpu": {"ranks": 2, "layers": 4, "width": 256, "heads": 4, "context": 128, "batch": 4, "dtype": "float32"},
}
HELP = {"ranks": "processes, one per GPU, or with gloo on a CPU", "batch": "sequences per rank"}
TIMEOUT_S = 1200.0  # of a case
POLL_S = 0.1
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
    "of each round": lambda row: ", ".join(
        f"{speed:,.0f}"
        for speed in row.get("rounds_tokens_per_s", [row["tokens_per_s"]])  # older files: one round
    ),
    "ms/step": lambda row: f"{row['median_ms']:.1f}",
    "p20 to p80": lambda row: f"{row['p20_ms']:.1f} to {row['p80_ms']:.1f}",
    "GPU busy ms": lambda row: f"{row['gpu_busy_ms']:.1f}" if row.get("gpu_busy_ms") else "",
    "optimizer": lambda row: f"{row['optimizer_share']:.0%}",
    "peak MB": lambda row: f"{row['peak_bytes'] / 1e6:,.0f}",
    "host MB": lambda row: f"{row['host_peak_bytes'] / 1e6:,.0f}, {row['host_before_bytes'] / 1e6:,.0f} at the start",
    "states MB": lambda row: f"{row['state_bytes'] / 1e6:,.1f}",
    "loss": lambda row: f"{row['loss']:.4f}",
    "minus plain": lambda row: f"{row['loss_over_plain']:+.4f}" if "loss_over_plain" in row else "",
    "stepped by": lambda row: row["optimizer_class"].rpartition(".")[2],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.add_argument("--device", choices=list(DEFAULTS), default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("ranks", "layers", "width", "heads", "context", "batch"):
        defaults = ", ".join(f"{values[name]} on {device}" for device, values in DEFAULTS.items())
        parser.add_argument(f"--{name}", type=count, help=f"{HELP.get(name, 'of the GPT')}; default: {defaults}")
    parser.add_argument("--steps", type=count, default=40, help="timed steps; default: %(default)s")
    parser.add_argument("--warmup", type=count, default=5, help="untimed steps before them; default: %(default)s")
    parser.add_argument("--rounds", type=count, default=3, help="processes of each case, in turn; default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of both optimizers; default: %(default)s")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="cases by name, or by a part of their names")
    parser.add_argument("--budget", type=seconds, default=math.inf, help="seconds for all cases; default: no limit")
    add_json(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run the cases; return the exit code.

    The code is 1 if AdaXW failed where another optimizer worked, 2 for invalid arguments.
    """
    try:
        job = job_of(arguments)
        chosen = choose(cases(job.dtype), arguments.only)
    except ValueError as error:
        print(f"adax-triton bench train: {error}", file=sys.stderr)
        return 2
    for result in run(chosen, job, arguments.rounds, arguments.budget):
        write(result, arguments.json)  # after each case, in case a later one is killed
    publish(result, table, arguments.json)
    return 1 if ours_failed(chosen, result["cases"]) else 0


def job_of(arguments: argparse.Namespace) -> Job:
    """Return the settings of all cases.

    Raises ValueError for options that do not fit together.
    """
    given = {name: value for name, value in vars(arguments).items() if name in Job._fields and value is not None}
    settings = DEFAULTS[arguments.device] | given
    if settings["width"] % settings["heads"]:
        raise ValueError(f"--width {settings['width']}: expected a multiple of heads={settings['heads']}")
    if settings["device"] == "cuda" and settings["ranks"] > torch.cuda.device_count():
        raise ValueError(
            f"--ranks {settings['ranks']}: expected at most {torch.cuda.device_count()}, the number of GPUs"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Job(**settings, threads=max(1, cores // settings["ranks"]))


def run(chosen: list[Case], job: Job, rounds: int, budget_s: float) -> Iterator[dict[str, Any]]:
    """Train every case in each round, within the budget; yield the result after each case, JSON-friendly."""
    deadline = time.monotonic() + budget_s
    settings = {name: value for name, value in job._asdict().items() if name != "threads"}
    result: dict[str, Any] = {
        "benchmark": "train",
        "environment": {**describe(torch.device(job.device)), "threads": job.threads},
        **{**settings, "rounds": rounds, "clipping": CLIPPING, "cases": {}},
    }
    rows = result["cases"]
    measured: dict[str, list[list[dict[str, Any]]]] = {case.name: [] for case in chosen}  # ranks of each round
    with progress(len(chosen) * rounds, "bench train") as advance:
        for case in chosen * rounds:
            advance(0, case.name)
            if "absent" not in rows.get(case.name, {}):
                ranks = run_case(case, job, deadline)
                if not isinstance(ranks, str):
                    measured[case.name].append(ranks)
                    rows[case.name] = summarize(measured[case.name], job.batch * job.context * job.ranks)
                elif ranks != NOT_REACHED or not measured[case.name]:
                    rows[case.name] = {"absent": ranks}
            compare_losses(chosen, rows)
            advance(1, case.name)
            yield result


def compare_losses(chosen: list[Case], rows: dict[str, dict[str, Any]]) -> None:
    """Set each row's difference to the loss of plain PyTorch, for cases with float32 weights and states."""
    for case in chosen:
        row = rows.get(case.name, {})
        plain = rows.get("plain / AdaXW" if case.optimizer == "AdaXW" else "plain / torch AdamW", {})
        row.pop("loss_over_plain", None)
        if case.name.endswith(("/ AdaXW", "AdamW")) and "loss" in row and "loss" in plain:
            row["loss_over_plain"] = row["loss"] - plain["loss"]


def run_case(case: Case, job: Job, deadline: float) -> list[dict[str, Any]] | str:
    """Train one case; return the results of `worker.train` of its ranks, or why they are absent.

    No process outlives the call. `deadline` is by `time.monotonic()`.
    """
    end = min(deadline, time.monotonic() + TIMEOUT_S)
    late = NOT_REACHED if end == deadline else f"no result after {TIMEOUT_S:g} s"
    if time.monotonic() >= end:
        return late
    if case.stage is not None and importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    # Never time Triton's interpreter.
    shared = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(job.ranks)}
    shared["OMP_NUM_THREADS"] = str(job.threads)
    if job.device == "cpu":
        shared |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as name, (Path(name) / "ranks.log").open("w+") as log:
        folder, processes = Path(name), []
        (folder / "job.json").write_text(json.dumps([case.name, job._asdict()]))
        # -P keeps the working folder off sys.path.
        command = [sys.executable, "-P", "-m", "adax_triton.bench.training.worker", str(folder)]
        try:
            for rank in map(str, range(job.ranks)):
                environment = {**shared, "RANK": rank, "LOCAL_RANK": rank}
                processes.append(subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log))
            codes: list[int | None] = [None]
            # After a failure the other ranks would wait for their own timeout.
            while None in codes and not any(codes) and time.monotonic() < end:
                time.sleep(POLL_S)
                codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        found = [json.loads(file.read_text()) for file in sorted(folder.glob("rank*.json"))]
        absent = [str(row["absent"]) for row in found if "absent" in row]
        if absent:
            return absent[0]
        if any(codes):
            log.seek(0)
            last = (log.read().strip().splitlines() or ["no output"])[-1]
            return f"a rank ended with {next(filter(None, codes))}: {last}"
        return late if len(found) < job.ranks else found


def summarize(rounds: list[list[dict[str, Any]]], tokens: int) -> dict[str, Any]:
    """Return the row of a case.

    `rounds` holds the results of `worker.train` of all ranks, for each round. `tokens` are the tokens per step of all
    ranks. Times are the maximum over the ranks, and their median is over the steps of all rounds. Memory is the maximum
    over ranks and rounds, the loss is the mean, and the GPU's busy time the median.
    """
    steps_s, optimizer_s = (
        [[max(times) for times in zip(*(rank[name] for rank in ranks), strict=True)] for ranks in rounds]
        for name in ("steps_s", "optimizer_s")
    )
    all_steps_s = list(chain.from_iterable(steps_s))
    median_s, optimizer = statistics.median(all_steps_s), statistics.median(chain.from_iterable(optimizer_s))
    largest = ("peak_bytes", "host_peak_bytes", "host_before_bytes", "state_bytes")
    found = list(chain.from_iterable(rounds))
    busy_s = [rank["gpu_busy_s"] for rank in found if rank["gpu_busy_s"] is not None]
    return {
        **{"tokens_per_s": tokens / median_s, **quantiles(all_steps_s)},
        "rounds_tokens_per_s": [tokens / statistics.median(times) for times in steps_s],
        **({"gpu_busy_ms": 1e3 * statistics.median(busy_s)} if busy_s else {}),
        **{"optimizer_ms": optimizer * 1e3, "optimizer_share": optimizer / median_s},
        **{name: max(rank[name] for rank in found) for name in largest},
        "loss": statistics.fmean(rank["loss"] for rank in found),
        **{name: found[0][name] for name in ("optimizer_class", "weights")},
    }


def ours_failed(chosen: list[Case], rows: dict[str, dict[str, Any]]) -> bool:
    """Return whether AdaXW failed where it should work.

    It should work in plain PyTorch, and where another case of its framework worked.
    """
    alive = {case.framework for case in chosen if "absent" not in rows[case.name]} | {"plain"}
    failed = [case for case in chosen if rows[case.name].get("absent", NOT_REACHED) != NOT_REACHED]
    return any(case.optimizer == "AdaXW" and case.framework in alive for case in failed)


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    shape = f"{result['layers']} layers of width {result['width']}"
    memory = "allocated on the GPU" if result["device"] == "cuda" else "the process's resident set, PyTorch included"
    title = (
        f"{shape}, {result['ranks']} ranks of {result['batch']} x {result['context']} tokens, {result['dtype']}, "
        f"{result['steps']} steps after {result['warmup']} in each of at most {result.get('rounds', 1)} rounds, "
        f"clipping at {result['clipping']:g}; tokens/s: from the median step of all rounds; GPU busy: computing or "
        "copying, of a step; optimizer: its share of the step, clipping to cleared gradients; peak: of one rank, "
        f"{memory}; states: of one rank; loss: held out, after the last step"
    )
    rows = []
    for name, row in result["cases"].items():
        absent = [f"absent: {row['absent']}", *[""] * (len(COLUMNS) - 1)] if "absent" in row else None
        rows.append([name, *(absent or [cell(row) for cell in COLUMNS.values()])])
    return "\n".join([title, "", *markdown_table(["case", *COLUMNS], rows)])
