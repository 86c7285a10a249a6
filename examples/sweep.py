"""Sweep learning rates and seeds of the demo's GPT.

    python examples/sweep.py --lr AdaX 2e-3 3e-3 4e-3 --lr AdamW 3e-3 4e-3 --json examples/sweep.json

All runs of a seed see the same data and start from the same weights, so differences are paired by seed. Run again to
resume. `demo.py` shows the committed result, `examples/sweep.json`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from adax_triton.bench.harness.environment import describe
from demo import launch
from run_plan import Plan, add_run_arguments, make_plan
from sweep_result import best_rate, shared_settings, table

Runs = dict[str, dict[str, list[tuple[argparse.Namespace, Plan]]]]  # by optimizer and learning rate, one per seed


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Return the parsed command line and the parser, which prints later errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    rates = {"nargs": "+", "action": "append", "required": True, "metavar": ("OPTIMIZER", "RATE")}
    parser.add_argument("--lr", **rates, help="an optimizer and its learning rates; repeat it for each optimizer")
    parser.add_argument("--seeds", type=int, default=5, help="at least 2; default: %(default)s")
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="write the losses here")
    args = parser.parse_args(argv)
    for name, least in (("seeds", 2), ("processes", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    return args, parser


def plan_runs(args: argparse.Namespace) -> Runs:
    """Return all runs; an invalid argument raises ValueError before the first one starts."""
    found: Runs = {}
    for optimizer, *rates in args.lr:
        if not rates:
            raise ValueError(f"--lr {optimizer} has no learning rate")
        for rate in rates:
            for seed in range(args.seeds):
                run = argparse.Namespace(**vars(args) | {"optimizer": optimizer, "lr": float(rate), "seed": seed})
                run.out = args.out / f"{optimizer.lower()}-{rate}-seed{seed}"
                plan = make_plan(run, args.processes)
                by_rate = found.setdefault(plan.config["optimizer"]["type"], {})
                by_rate.setdefault(rate, []).append((run, plan))
    return found


def main(argv: list[str] | None = None) -> None:
    """Run the sweep from the command line."""
    args, parser = parse_arguments(argv)
    try:
        runs = plan_runs(args)
    except ValueError as error:
        parser.error(str(error))
    result: dict[str, Any] = {"environment": describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))}
    for seed in range(args.seeds):
        for by_rate in runs.values():
            for seeds in by_rate.values():
                run, plan = seeds[seed]
                if args.fresh or plan.folder.last_step() < args.steps:
                    launch(run, args.processes)
    result["losses"] = {
        name: {
            rate: [plan.folder.records()[-1]["validation_loss"] for _, plan in seeds] for rate, seeds in by_rate.items()
        }
        for name, by_rate in runs.items()
    }
    best = {name: by_rate[best_rate(result["losses"][name])][0][1] for name, by_rate in runs.items()}
    result["settings"] = shared_settings(next(iter(best.values())))
    result["configs"] = {name: plan.config for name, plan in best.items()}
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
