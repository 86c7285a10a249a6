"""Compare rules for w_t in training, with tuned learning rates.

Each run appends one line of JSON to a file. A stopped study continues where it was: run the same command again.

    adax-triton bench study                                       # the whole study, hours
    adax-triton bench study --problems gpt --rules adax-1e-4 --steps 600 --out runs/cell.jsonl   # one cell
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from adax_triton.bench.harness.command import count, device
from adax_triton.bench.harness.environment import describe
from adax_triton.bench.harness.progress import progress

from adax_triton.state.precision import STATES

from . import analysis, report, text
from .problems import PROBLEMS, STUDIED
from .records import writer
from .rules import PARTIAL, RULES
from .run import POINTS
from .scheduler import Scheduler, seconds
from .search import Cell

OUT, QUICK_OUT = Path("runs/study.jsonl"), Path("runs/study-quick.jsonl")
QUICK = {"problems": ["images", "drift"], "rules": ["adax-1e-4", "adam-0.999"], "steps": [100]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `adax-triton bench study`."""
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), help="default: all but gpt-large")
    parser.add_argument("--rules", nargs="+", choices=list(RULES), help="default: all")
    parser.add_argument("--steps", nargs="+", type=count, help="default: the three horizons of each problem")
    parser.add_argument("--states", nargs="+", choices=STATES, default=["float32"], help="default: float32")
    parser.add_argument("--seeds", type=count, default=5, help="at least 2; default: %(default)s")
    parser.add_argument("--workers", type=count, help="processes; default: the number of cores, or 1 on a GPU")
    parser.add_argument("--out", type=Path, help=f"file of the runs; default: {OUT}, or {QUICK_OUT} with --quick")
    parser.add_argument("--page", type=Path, metavar="FILE", help="train nothing; rewrite the results in a page")
    parser.add_argument("--quick", action="store_true", help="two rules on two problems, in a minute")
    parser.add_argument("--device", type=device, default="cpu", help="default: %(default)s")


def main(arguments: argparse.Namespace) -> int:
    """Run what is missing and print it; return 2 for invalid arguments."""
    try:
        _check(arguments)
        if arguments.page is None:
            run(arguments)
        else:
            report.rewrite(arguments.page, arguments.out, arguments.seeds)
    except (ValueError, ImportError, OSError) as error:
        print(f"adax-triton bench study: {error}", file=sys.stderr)
        return 2
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Check arguments and set those that depend on others."""
    if arguments.seeds < 2:
        raise ValueError(f"--seeds must be at least 2 for an interval, got {arguments.seeds}")
    if arguments.steps is not None and min(arguments.steps) < POINTS:
        raise ValueError(f"--steps must be at least {POINTS}, got {min(arguments.steps)}")
    if arguments.quick:
        given = [f"--{name}" for name in QUICK if getattr(arguments, name) is not None]
        if given:
            raise ValueError(f"--quick sets {', '.join(given)}; remove --quick")
        vars(arguments).update(QUICK)
    if arguments.out is None:
        arguments.out = QUICK_OUT if arguments.quick else OUT


def run(arguments: argparse.Namespace) -> None:
    """Train all missing runs and print a table of the cells."""
    torch.set_num_threads(1)  # as in the processes, for the environment
    plan = list(cells(arguments))
    workers = arguments.workers or (len(os.sched_getaffinity(0)) if arguments.device.type == "cpu" else 1)
    environment = {**describe(arguments.device), "text": text.digest()}
    with (
        writer(arguments.out, environment) as file,
        progress(round(sum(map(seconds, plan))), "study") as advance,
    ):
        Scheduler(file, seeds=arguments.seeds, device=arguments.device, advance=advance).run(plan, workers)
    print(report.cells_table(plan, analysis.results(file.records.values(), arguments.seeds)))


def cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    """Yield the cells, short horizons first."""
    whole = arguments.rules is None and arguments.steps is None
    for index in range(3 if arguments.steps is None else len(arguments.steps)):
        for name in arguments.problems or STUDIED:
            steps = (arguments.steps or PROBLEMS[name].horizons)[index]
            for rule in arguments.rules or RULES:
                if not whole or index in PARTIAL.get(rule, (0, 1, 2)):
                    for states in arguments.states:
                        yield Cell(name, rule, steps, states)
