"""Kill ranks of a 2-rank ZeRO 2 run and restart it.

The run restarts from its checkpoints and is compared with an uninterrupted run.

Usage: python deepspeed_kill_server.py FOLDER KILLS SEED

This process imports torch and DeepSpeed once and forks the ranks of every attempt, so that they start in a fraction of
a second. FOLDER/results.json becomes {"kills": [...], "failures": [sentences], ...}. No process outlives the script. At
the end, the uninterrupted run is started again from a damaged checkpoint.

A kill is a SIGKILL to one rank, in one of three ways in turn. SEED determines the rank and the moment:

- "step": the parent sends it when the rank reports a certain step;
- "bytes": in a file of a checkpoint, after part of its bytes are written;
- "operation": before an operation on files or folders (open, mkdir, rename, remove, ...) of a checkpoint.

The other rank is killed a little later, at any point of its code.
"""

import hashlib
import io
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # also imports torch._inductor, once for all ranks
import torch
from deepspeed_worker import CASE_DEFAULTS, batch, build_model, start_engine

STEPS = 10
SAVE_EVERY = 2
ATTEMPT_TIMEOUT_S = 120
SCHEDULER = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 6, "warmup_type": "linear"}}
CASE = {**CASE_DEFAULTS, "stage": 2, "dtype": "bf16", "config": {"scheduler": SCHEDULER}}
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"}


class KillPlan(NamedTuple):
    """The rank to kill, and when.

    If `way` is None or "damaged", no rank is killed. "damaged" resumes from a damaged checkpoint.
    """

    way: str | None = None
    rank: int = 0
    count: int = 0  # which step, file or operation to kill at, counted from 1
    part: float = 0.0  # share of the file's bytes that are written


class Attempt(NamedTuple):
    """The reports of the ranks of an attempt, until they ended."""

    refused: list[str]
    killed: bool
    losses: dict[tuple[int, int], str]  # by (rank, step)
    loaded: set[int]  # steps of the loaded checkpoint, as the ranks report them
    saved: int  # steps of the last saved checkpoint
    final: dict[int, str]  # digest of a rank's weights and states at the end
    end: str  # for messages


class Run(NamedTuple):
    """The kills of a run, and its differences from the uninterrupted run."""

    kills: list[dict[str, Any]]
    problems: list[str]


# A rank.


def run_rank(
    rank: int, folder: Path, tag: str | None, plan: KillPlan, attempt: int, report: Callable[[str], object]
) -> None:
    # DeepSpeed requires an address, although the ranks find each other by a file.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    init_method = f"file://{folder}.ranks-{attempt}"
    deepspeed.init_distributed(
        "gloo", timeout=timedelta(seconds=60), init_method=init_method, rank=rank, world_size=2, verbose=False
    )
    # Every attempt has another seed, so only the checkpoint can restore the weights.
    engine = start_engine(CASE, build_model(CASE, seed=attempt if (folder / "latest").exists() else 0))
    if plan.way == "damaged":
        try:
            engine.load_checkpoint(str(folder), tag=f"global_step{STEPS}")
        except ValueError as error:
            report(f"refused {error}")
    engine.load_checkpoint(str(folder))
    report(f"loaded {engine.global_steps}")
    dying = arm(plan if plan.rank == rank else KillPlan(), folder)
    while engine.global_steps < STEPS:
        loss = engine(*batch(engine.global_steps, 0, rank))
        engine.backward(loss)
        engine.step()
        report(f"step {engine.global_steps} {loss.item().hex()}")
        if engine.global_steps % SAVE_EVERY == 0:
            dying["saving"] = True
            engine.save_checkpoint(str(folder), tag=tag)
            dying["saving"] = False
            report(f"saved {engine.global_steps}")
    report(f"final {digest(engine)}")


def digest(engine: Any) -> str:
    """Return a hash of this rank's weights, master weights, states and schedule.

    The hash covers every bit.
    """
    found = hashlib.sha256(repr((engine.get_lr(), engine.lr_scheduler.state_dict())).encode())
    tensors = [*engine.module.state_dict().values(), *engine.optimizer.single_partition_of_fp32_groups]
    for state in engine.basic_optimizer.state_dict()["state"].values():
        found.update(str(state["step"]).encode())
        tensors += [state["exp_avg"], state["exp_avg_sq"]]
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def arm(plan: KillPlan, folder: Path) -> dict[str, bool]:
    """Make this process kill itself while it saves a checkpoint, as planned.

    The caller sets "saving" in the returned dictionary while it saves.
    """
    saving = {"saving": False}
    seen = 0

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if saving["saving"] and event in FILE_EVENTS and (event != "open" or str(folder) in str(arguments[0])):
            seen += 1
            if seen > plan.count:
                os.kill(os.getpid(), signal.SIGKILL)

    torch_save = torch.save

    def save_part(obj: Any, path: str, **options: Any) -> None:
        nonlocal seen
        if seen < plan.count:
            seen += 1
            torch_save(obj, path, **options)
            return
        torch_save(obj, whole := io.BytesIO(), **options)
        with open(path, "wb") as file:
            file.write(whole.getvalue()[: int(plan.part * whole.tell())])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    if plan.way == "operation":
        sys.addaudithook(on_event)
    if plan.way == "bytes":
        torch.save = save_part
    return saving


# The parent.


def start(rank: int, folder: Path, tag: str | None, plan: KillPlan, attempt: int) -> tuple[int, Any]:
    """Fork a rank; return its process id and a file of reports.

    Reads of the file do not block.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        os.set_blocking(reading, False)
        return pid, open(reading)
    try:
        os.close(reading)
        log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        run_rank(rank, folder, tag, plan, attempt, lambda words: os.write(writing, f"{words}\n".encode()))
        os._exit(0)
    except BaseException as error:
        print(f"rank {rank} of attempt {attempt}: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)


def run_attempt(folder: Path, tag: str | None, plan: KillPlan, attempt: int, chance: random.Random) -> Attempt:
    ranks = dict(enumerate(start(rank, folder, tag, plan, attempt) for rank in range(2)))
    reports: dict[int, list[list[str]]] = {0: [], 1: []}
    exits: dict[int, int] = {}

    def listen() -> None:
        for rank, (pid, lines) in ranks.items():
            reports[rank] += [line.split() for line in lines.readlines()]
            if rank not in exits and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                exits[rank] = os.waitstatus_to_exitcode(ended[1])

    deadline = time.monotonic() + ATTEMPT_TIMEOUT_S
    while len(exits) < 2 and not any(exits.values()) and time.monotonic() < deadline:
        listen()
        steps = sum(words[0] == "step" for words in reports[plan.rank])
        if plan.way == "step" and steps >= plan.count and plan.rank not in exits:
            os.kill(ranks[plan.rank][0], signal.SIGKILL)
            exits[plan.rank] = os.waitstatus_to_exitcode(os.waitpid(ranks[plan.rank][0], 0)[1])
        time.sleep(0.002)
    if any(exits.values()):
        time.sleep(chance.uniform(0.0, 0.1))
    listen()
    by_itself = dict(exits)
    for rank, (pid, lines) in ranks.items():
        if rank not in exits:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        reports[rank] += [line.split() for line in lines.readlines()]
        lines.close()
    return summary(reports, by_itself, plan)


def summary(reports: dict[int, list[list[str]]], exits: dict[int, int], plan: KillPlan) -> Attempt:
    words = [(rank, line) for rank in reports for line in reports[rank]]
    return Attempt(
        refused=[" ".join(line[1:]) for _, line in words if line[0] == "refused"],
        killed=exits.get(plan.rank) == -signal.SIGKILL,
        losses={(rank, int(line[1])): line[2] for rank, line in words if line[0] == "step"},
        loaded={int(line[1]) for _, line in words if line[0] == "loaded"},
        saved=max([int(line[1]) for _, line in words if line[0] == "saved"], default=0),
        final={rank: line[1] for rank, line in words if line[0] == "final"},
        end=f"exit codes {exits}, last reports {[reports[rank][-1:] for rank in reports]}",
    )


def next_plan(number: int, chance: random.Random) -> KillPlan:
    way = ("step", "bytes", "operation")[number % 3]
    rank = chance.randrange(2)
    count = {
        "step": chance.randint(1, STEPS - 1),
        "bytes": chance.randrange(4) if rank == 0 else chance.randrange(2),  # rank 1 writes one file of two
        "operation": chance.randrange(60) if rank == 0 else chance.randrange(4),
    }[way]
    return KillPlan(way, rank, count, chance.random())


def problems(attempt: Attempt, reference: Attempt, saved: int) -> list[str]:
    """Return differences from the uninterrupted run and lost saved steps."""
    found = []
    if not attempt.killed and len(attempt.final) < 2:
        found.append("it ended by itself")
    if len(attempt.loaded) != 1 or min(attempt.loaded) < saved:
        found.append(f"it loaded {sorted(attempt.loaded)} steps, {saved} were saved")
    found += [f"loss of (rank, step) {at}" for at in attempt.losses if attempt.losses[at] != reference.losses[at]]
    found += [f"final weights of rank {rank}" for rank in attempt.final if attempt.final[rank] != reference.final[rank]]
    return [f"{problem}: {attempt.end}" for problem in found]


def run_to_end(
    folder: Path, tag: str | None, plans: Iterator[KillPlan], reference: Attempt, chance: random.Random
) -> Run:
    """Restart a run until it finishes, and kill it as planned.

    It is not killed once the plans are used up.
    """
    run = Run([], [])
    saved = 0
    for number in itertools.count():
        attempt = run_attempt(folder, tag, plan := next(plans, KillPlan()), number, chance)
        run.problems.extend(f"attempt {number}, {plan}: {text}" for text in problems(attempt, reference, saved))
        if run.problems or len(attempt.final) == 2:
            return run
        saved = max(saved, attempt.saved, *attempt.loaded)
        run.kills.append({**plan._asdict(), "lost": max(step for _, step in attempt.losses) - saved})
    raise AssertionError("unreachable")


def start_from_damaged(folder: Path, reference: Attempt) -> dict[str, Any]:
    """Damage a finished run's last checkpoint, and resume from the folder.

    One of its files is truncated.
    """
    (file,) = (folder / f"global_step{STEPS}").glob("*zero_pp_rank_1_*_optim_states.pt")
    os.truncate(file, file.stat().st_size - 1)
    attempt = run_attempt(folder, None, KillPlan("damaged"), STEPS, random.Random(0))
    return {
        "loaded": sorted(attempt.loaded),
        "problems": problems(attempt, reference, 0),
        "refused": attempt.refused,
        "warned": f"loading 'global_step{STEPS - SAVE_EVERY}' instead" in Path(f"{folder}.log").read_text(),
    }


def main(folder: str, kills: str, seed: str) -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # set once, before any rank is forked
    chance = random.Random(int(seed))
    began = time.monotonic()
    reference = run_attempt(Path(folder) / "reference", None, KillPlan(), 0, chance)
    failures = problems(reference, reference, 0)
    killed: list[dict[str, Any]] = []
    runs = 0
    while len(killed) < int(kills) and not failures:
        plans = (next_plan(number, chance) for number in range(len(killed), int(kills)))
        # With a fixed tag, every save replaces the previous checkpoint.
        run = run_to_end(Path(folder) / f"run-{runs}", ("last", None)[runs % 2], plans, reference, chance)
        killed += run.kills
        failures += [f"run {runs}, {text}" for text in run.problems]
        runs += 1
    results = {"kills": killed, "runs": runs, "failures": failures, "seconds": time.monotonic() - began}
    results["damaged"] = start_from_damaged(Path(folder) / "reference", reference)
    (Path(folder) / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
