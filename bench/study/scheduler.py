"""Run the searches of all cells in a pool of processes."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Generator, Mapping, Sequence

import torch

from .problems import PROBLEMS
from .records import Writer
from .run import Run, train
from .search import Cell, search

RUNS_PER_CELL = 17  # typical number; the progress bar uses it


def seconds(cell: Cell) -> float:
    """Return the estimated time of a cell on one core."""
    return RUNS_PER_CELL * cell.steps * PROBLEMS[cell.problem].step_ms / 1e3


class Scheduler:
    """Trains what the searches ask for, and writes each run's record.

    Args:
        writer: of new results; runs that its file has are not repeated.
        seeds: number of seeds.
        device: of the training.
        advance: called with (seconds, name) when a cell is done.
    """

    def __init__(
        self,
        writer: Writer,
        *,
        seeds: int,
        device: torch.device,
        advance: Callable[[int, str], None],
    ) -> None:
        self._writer, self._seeds, self._device, self._advance = writer, seeds, device, advance
        self._best: dict[tuple[str, str], int] = {}  # exponent of the learning rate by problem and rule
        self._searches: dict[Run, list[_Search]] = {}  # searches by the run that they wait for
        self._futures: dict[concurrent.futures.Future, Run] = {}

    def run(self, plan: Sequence[Cell], workers: int) -> None:
        """Run all missing runs of the cells, in order.

        Args:
            plan: the cells; a longer horizon of a problem starts its search at the best rate of the one before.
            workers: number of processes, each on one thread.
        """
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, spawn, start_worker, (self._device,)) as pool:
            try:
                for cell in plan:
                    self._start(cell, pool)
                    while len(self._futures) >= 2 * workers:
                        self._collect(pool)
                while self._futures:
                    self._collect(pool)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _start(self, cell: Cell, pool: concurrent.futures.Executor) -> None:
        problem, start = PROBLEMS[cell.problem], self._best.get((cell.problem, cell.rule), 0)
        runs = search(cell, problem.lr, self._seeds, start, problem.reach)
        self._continue(_Search(cell, runs, next(runs)), pool)

    def _continue(self, found: _Search, pool: concurrent.futures.Executor) -> None:
        """Give a search its losses until it waits for a run or ends."""
        try:
            while not (missing := self._missing(found)):
                found.wanted = found.runs.send({run: self._writer.records[run]["loss"] for run in found.wanted})
        except StopIteration as stop:
            self._best[found.cell.problem, found.cell.rule] = stop.value
            self._advance(round(seconds(found.cell)), " ".join(map(str, found.cell)))
            return
        for run in missing:
            if run not in self._searches:
                self._futures[pool.submit(train, run, self._device)] = run
            self._searches.setdefault(run, []).append(found)

    def _collect(self, pool: concurrent.futures.Executor) -> None:
        """Wait for a run, write its record, and continue the searches that need it."""
        done, _ = concurrent.futures.wait(self._futures, return_when=concurrent.futures.FIRST_COMPLETED)
        # Failed runs last: they raise, and the records of the others are written before.
        for future in sorted(done, key=lambda future: future.exception() is not None):
            run = self._futures.pop(future)
            self._writer.append(future.result())
            for found in self._searches.pop(run):
                if not self._missing(found):
                    self._continue(found, pool)

    def _missing(self, found: _Search) -> list[Run]:
        """Return the runs that a search waits for."""
        return [run for run in found.wanted if run not in self._writer.records]


class _Search:
    """A search and the runs that it asked for."""

    def __init__(
        self, cell: Cell, runs: Generator[list[Run], Mapping[Run, float | None], int], wanted: list[Run]
    ) -> None:
        self.cell, self.runs, self.wanted = cell, runs, wanted


def start_worker(device: torch.device) -> None:
    """Prepare a process of the pool: one thread, the device, and an end with its parent."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
