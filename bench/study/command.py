"""Compare the rules for w_t with tuned learning rates, over problems, horizons and seeds.

Each run appends one line of JSON to a file. A stopped study continues where it was: run the same command again.

    adax-triton bench study                                       # the whole study, hours
    adax-triton bench study --problems gpt --rules adax-1e-4 --steps 600 --out runs/cell.jsonl   # one cell
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from adax_triton.bench.harness.command import add_device, count
from adax_triton.bench.harness.environment import describe
from adax_triton.bench.harness.progress import progress

from adax_triton.state.precision import STATES

from . import analysis, report, text
from .problems import PROBLEMS, STUDIED
from .rules import PARTIAL, RULES
from .run import Run, train
from .search import Cell, search

DEFAULT_OUT = Path("runs/study.jsonl")
RUNS_PER_CELL = 17  # typical; the progress bar uses it
QUICK = {"problems": ["images", "drift"], "rules": ["adax-1e-4", "adam-0.999"], "steps": [100], "seeds": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `adax-triton bench study`."""
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), help="default: all but gpt-large")
    parser.add_argument("--rules", nargs="+", choices=list(RULES), help="default: all")
    parser.add_argument("--steps", nargs="+", type=count, help="default: the three horizons of each problem")
    parser.add_argument("--states", nargs="+", choices=STATES, default=["float32"], help="default: float32")
    parser.add_argument("--seeds", type=count, default=5, help="default: %(default)s")
    parser.add_argument("--workers", type=count, help="default: the number of cores, or 1 on a GPU")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="default: %(default)s")
    parser.add_argument("--page", type=Path, metavar="FILE", help="train nothing; rewrite the results in a page")
    parser.add_argument("--quick", action="store_true", help="two rules on two problems, in a minute")
    add_device(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run what is missing in the file and print its table; return 2 for an invalid page."""
    if arguments.quick:
        vars(arguments).update(QUICK)
    if arguments.page is None:
        Study(arguments, read(arguments.out)).run()
        wanted = set(cells(arguments))
        found = analysis.results(read(arguments.out), arguments.seeds)
        print(report.cells_table({cell: result for cell, result in found.items() if cell in wanted}))
        return 0
    try:
        report.rewrite(arguments.page, arguments.out, read(arguments.out))
    except (ValueError, ImportError, OSError) as error:
        print(f"adax-triton bench study: {error}", file=sys.stderr)
        return 2
    return 0


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file; a line that a killed process did not finish is removed from the file."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        os.truncate(path, sum(map(len, lines[:-1])))
        lines.pop()
    return [record for line in lines if "problem" in (record := json.loads(line))]


def run_of(record: dict[str, Any]) -> Run:
    """Return the run that a record describes."""
    return Run(**{name: record[name] for name in Run._fields})


def cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    """Yield the cells, short horizons first."""
    for index in range(len(arguments.steps or "123")):
        for name in arguments.problems or STUDIED:
            steps = (arguments.steps or PROBLEMS[name].horizons)[index]
            for rule in arguments.rules or RULES:
                if arguments.rules is None and index not in PARTIAL.get(rule, (0, 1, 2)):
                    continue
                for states in arguments.states:
                    yield Cell(name, rule, steps, states)


def _seconds(cell: Cell) -> float:
    return cell.steps * PROBLEMS[cell.problem].step_ms / 1e3


class Study:
    """Runs the searches of all cells in a pool of processes, and appends each run's record to a file.

    Args:
        arguments: of `add_arguments`.
        records: earlier results; their runs are not repeated.
    """

    def __init__(self, arguments: argparse.Namespace, records: Iterable[dict[str, Any]]) -> None:
        self._arguments = arguments
        self._losses: dict[Run, float | None] = {run_of(record): record["loss"] for record in records}
        self._best: dict[tuple[str, str], int] = {}  # exponent of the learning rate by problem and rule
        self._waiting: dict[Run, list[_Active]] = {}  # searches by the run that they wait for
        self._futures: dict[concurrent.futures.Future, Run] = {}

    def run(self) -> None:
        """Run all missing runs."""
        arguments = self._arguments
        workers = arguments.workers or (len(os.sched_getaffinity(0)) if arguments.device.type == "cpu" else 1)
        plan = list(cells(arguments))
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        self._append({"environment": describe(arguments.device), "text": text.digest()})
        spawn = multiprocessing.get_context("spawn")
        seconds = round(sum(RUNS_PER_CELL * _seconds(cell) for cell in plan))
        with (
            concurrent.futures.ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool,
            progress(seconds, "study") as advance,
        ):
            try:
                for cell in plan:
                    self._start(cell, pool, advance)
                    while len(self._futures) >= 2 * workers:
                        self._collect(pool, advance)
                while self._futures:
                    self._collect(pool, advance)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _start(self, cell: Cell, pool: concurrent.futures.Executor, advance: Callable[[int, str], None]) -> None:
        # A wide search covers the whole grid at each horizon.
        start = self._best.get((cell.problem, cell.rule), 0) if PROBLEMS[cell.problem].reach == 1 else 0
        problem = PROBLEMS[cell.problem]
        active = _Active(cell, search(cell, problem.lr, self._arguments.seeds, start, problem.reach))
        self._continue(active, next(active.search), pool, advance)

    def _continue(
        self, active: _Active, wanted: list[Run], pool: concurrent.futures.Executor, advance: Callable[[int, str], None]
    ) -> None:
        """Give a search its losses until it waits for a run or ends."""
        try:
            while not (missing := [run for run in wanted if run not in self._losses]):
                wanted = active.search.send(self._losses)
        except StopIteration as stop:
            self._best[active.cell.problem, active.cell.rule] = stop.value
            advance(round(RUNS_PER_CELL * _seconds(active.cell)), " ".join(map(str, active.cell)))
            return
        active.wanted, active.missing = wanted, set(missing)
        for run in missing:
            if run not in self._waiting:
                self._futures[pool.submit(train, run, self._arguments.device)] = run
            self._waiting.setdefault(run, []).append(active)

    def _collect(self, pool: concurrent.futures.Executor, advance: Callable[[int, str], None]) -> None:
        """Wait for a run, write its record, and continue the searches that need it."""
        done, _ = concurrent.futures.wait(self._futures, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
            run, record = self._futures.pop(future), future.result()
            self._append(record)
            self._losses[run] = record["loss"]
            for active in self._waiting.pop(run):
                active.missing.discard(run)
                if not active.missing:
                    self._continue(active, active.wanted, pool, advance)

    def _append(self, record: dict[str, Any]) -> None:
        with self._arguments.out.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")


class _Active:
    """A search that waits for runs."""

    def __init__(self, cell: Cell, runs: Generator[list[Run], dict[Run, float | None], int]) -> None:
        self.cell, self.search = cell, runs
        self.wanted: list[Run] = []
        self.missing: set[Run] = set()
