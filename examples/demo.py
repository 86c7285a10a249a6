"""Train a small GPT with AdaX and AdamW; plot both loss curves.

    python examples/demo.py                                # the standard library's source, three minutes on two cores
    python examples/demo.py --data notes/ --steps 2000     # any text file or folder
    python examples/demo.py --config my_deepspeed.json --optimizer AdaXW

Both runs use DeepSpeed and the same data and seed, in one process per GPU or two on a CPU. Run again to resume.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch
from loss_plot import Curve, draw_losses
from run_plan import Plan, add_run_arguments, load_config, make_plan
from sweep_result import spread
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

TRAIN_GPT = Path(__file__).resolve().parent / "train_gpt.py"


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Return the parsed command line and the parser, which prints later errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.add_argument("--against", default="AdamW", help="the optimizer to compare with (default: AdamW)")
    parser.add_argument("--processes", type=int, help="default: the number of GPUs, or 2 on a CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the runs and of loss.png")
    args = parser.parse_args(argv)
    if args.processes is None:
        args.processes = torch.cuda.device_count() or 2
    elif args.processes < 1:
        parser.error(f"--processes must be at least 1, got {args.processes}")
    return args, parser


def plan_runs(args: argparse.Namespace) -> list[tuple[argparse.Namespace, Plan]]:
    """Return the runs with their folders; an invalid argument raises ValueError."""
    runs: list[tuple[argparse.Namespace, Plan]] = []
    for optimizer in (args.optimizer, args.against):
        folder = args.out / load_config(args.config, optimizer)["optimizer"]["type"].lower()
        if folder not in (run.out for run, _ in runs):
            run = argparse.Namespace(**vars(args) | {"optimizer": optimizer, "lr": None, "out": folder})
            runs.append((run, make_plan(run, args.processes)))
    return runs


def launch(run: argparse.Namespace, processes: int) -> None:
    """Train in `processes` processes of this interpreter and wait for them."""
    parser, flags = argparse.ArgumentParser(), []
    add_run_arguments(parser)
    for name in (*vars(parser.parse_args([])), "lr", "out"):
        value = getattr(run, name)
        if value is None or value is False:
            continue
        flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    # Without a network the host name may not resolve; use the loopback address.
    local = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(processes)]
    torchrun([*local, str(TRAIN_GPT), *flags])


def conclusion(curves: list[Curve], plans: list[Plan], is_default_text: bool) -> list[str]:
    """Return what the comparison of two runs shows.

    Args:
        curves, plans: of both runs.
        is_default_text: the text is that of the recorded sweep.
    """
    steps, seed = (plans[0].settings[name] for name in ("steps", "seed"))
    better, worse = sorted(curves, key=lambda curve: curve.final_validation_loss)
    gap = worse.final_validation_loss - better.final_validation_loss
    found = spread(plans) if is_default_text else None
    lines = [f"{better.label} is lower by {gap:.4f} nats per byte after {steps} steps with seed {seed}."]
    if found is None:
        lines += ["No spread over seeds is recorded for these settings; measure it with examples/sweep.py."]
    else:
        seeds, difference = found
        labels = " - ".join(curve.label for curve in curves)
        lines += [f"Over {seeds} seeds {labels} is {difference} (95 % interval, examples/sweep.json)."]
    return [*lines, f"{steps} steps of a small model do not predict long runs or large models; see docs/study.md."]


def report(plans: list[Plan], data: Path | None, picture: Path, seconds: float) -> None:
    """Plot the curves and print the results."""
    curves = [Curve(plan.config["optimizer"]["type"], plan.folder.records()) for plan in plans]
    settings = plans[0].settings
    text = f"'{data.name}'" if data else "Python's standard library"
    title = f"{' against '.join(curve.label for curve in curves)}: byte-level GPT on {text}"
    subtitle = (
        f"{settings['layers']} layers of width {settings['width']}, DeepSpeed on {settings['ranks']} processes; "
        "same data, order and initial weights"
    )
    draw_losses(curves, picture, title, subtitle)
    print(f"\n{'':8}{'validation loss':>16}{'bits per byte':>15}{'ms/step':>9}{'tokens/s':>10}")
    for curve, plan in zip(curves, plans, strict=True):
        loss, speed = curve.final_validation_loss, plan.folder.result()
        times = f"{speed['milliseconds_per_step']:9.0f}{speed['tokens_per_second']:10,.0f}" if speed else ""
        print(f"{curve.label:8}{loss:16.4f}{loss / math.log(2):15.4f}{times}")
    if len(curves) == 2:
        print("\n" + "\n".join(conclusion(curves, plans, is_default_text=data is None)))
    print(f"Loss curves: {picture}    ({seconds:.0f} s in total)")


def main(argv: list[str] | None = None) -> None:
    """Run the demonstration."""
    start = time.perf_counter()
    args, parser = parse_arguments(argv)
    try:
        runs = plan_runs(args)
    except ValueError as error:
        parser.error(str(error))
    try:
        for run, _ in runs:
            launch(run, args.processes)
    except (KeyboardInterrupt, SignalException):
        sys.exit("\ndemo.py: stopped; run the same command to resume from the last checkpoint")
    except ChildFailedError:
        sys.exit("demo.py: training failed; see the error above")
    report([plan for _, plan in runs], args.data, args.out / "loss.png", time.perf_counter() - start)


if __name__ == "__main__":
    main()
