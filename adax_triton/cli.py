"""The command `adax-triton`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the words after the command's name. Default: those of the process.

    Returns:
        The exit code: 0 if all is well.
    """
    from adax_triton.bench import host, memory, report, scale, step_report, train

    from . import convert_command, doctor

    benchmarks = {
        "memory": (memory, "bytes per parameter of every mode, beside other optimizers"),
        "step": (step_report, "time of one step beside torch's and DeepSpeed's AdamW"),
        "host": (host, "what a step costs the host, for 1 to 5,000 tensors"),
        "train": (train, "tokens per second and memory of a small GPT, in plain PyTorch and under DeepSpeed"),
        "scale": (scale, "time of a step against its elements and tensors, and a model of it up to 1T parameters"),
        "report": (report, "tables and plots of result files"),
    }
    parser = argparse.ArgumentParser(prog="adax-triton", description="AdaX as one fused Triton kernel.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what this machine can run, and whether the kernel is right on it")
    summary = "checkpoints of one optimizer or precision as checkpoints of another"
    convert_command.add_arguments(commands.add_parser("convert", help=summary, description=convert_command.__doc__))
    bench = commands.add_parser("bench", help="benchmarks").add_subparsers(dest="benchmark", required=True)
    for name, (module, summary) in benchmarks.items():
        module.add_arguments(bench.add_parser(name, help=summary, description=module.__doc__))
    arguments = parser.parse_args(argv)
    if arguments.command == "doctor":
        return doctor.main()
    if arguments.command == "convert":
        return convert_command.main(arguments)
    return benchmarks[arguments.benchmark][0].main(arguments)
