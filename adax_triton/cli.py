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
    from adax_triton.bench import memory, step_report

    from . import doctor

    parser = argparse.ArgumentParser(prog="adax-triton", description="AdaX as one fused Triton kernel.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what this machine can run, and whether the kernel is right on it")
    bench = commands.add_parser("bench", help="benchmarks").add_subparsers(dest="benchmark", required=True)
    memory.add_arguments(bench.add_parser("memory", help="bytes per parameter of every mode, beside other optimizers"))
    step_report.add_arguments(bench.add_parser("step", help="time of one step beside torch's and DeepSpeed's AdamW"))
    arguments = parser.parse_args(argv)
    if arguments.command == "doctor":
        return doctor.main()
    return memory.main(arguments) if arguments.benchmark == "memory" else step_report.main(arguments)
