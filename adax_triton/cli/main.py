"""The command `adax-triton`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from adax_triton.version import __version__

COMMANDS = {
    "doctor": "what this machine can run, and whether the kernel is right on it",
    "convert": "checkpoints of one optimizer or precision as checkpoints of another",
}
BENCHMARKS = {
    "memory": "bytes per parameter of every mode, beside other optimizers",
    "step": "time of one step next to other optimizers, in every precision",
    "host": "time of a step on the host, for 1 to 5,000 tensors",
    "cpu": "time of a step on a CPU, next to torch's and DeepSpeed's AdamW",
    "functions": "Python functions and files that a first and a later step execute",
    "train": "tokens per second and memory of a small GPT, in plain PyTorch and under DeepSpeed",
    "scale": "time of a step against elements and tensors; a model of ZeRO up to 1T parameters",
    "report": "tables and plots of result files",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the words after the command's name. Default: those of the process.

    Returns:
        The exit code: 0 if all is well.
    """
    parser = argparse.ArgumentParser(prog="adax-triton", description="AdaX as one fused Triton kernel.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    benchmarks = commands.add_parser("bench", help="benchmarks").add_subparsers(dest="benchmark", required=True)
    for name, summary in BENCHMARKS.items():
        benchmarks.add_parser(name, help=summary, add_help=False)
    chosen, words = parser.parse_known_args(argv)
    return _run([chosen.command, chosen.benchmark] if chosen.command == "bench" else [chosen.command], words)


def _run(names: list[str], words: list[str]) -> int:
    # Not earlier: PyTorch takes seconds, which --version, --help and a misspelt command do not need.
    from adax_triton.bench import host
    from adax_triton.bench.memory import per_parameter as memory
    from adax_triton.bench.report import command as report
    from adax_triton.bench.step import command as step_report
    from adax_triton.bench.step import cpu, scale
    from adax_triton.bench.step import functions as step_functions
    from adax_triton.bench.training import command as train
    from adax_triton.cli import convert as convert_command
    from adax_triton.cli import doctor

    modules = {"doctor": doctor, "convert": convert_command, "memory": memory, "step": step_report, "host": host}
    modules |= {"cpu": cpu, "functions": step_functions}
    modules |= {"train": train, "scale": scale, "report": report}
    module = modules[names[-1]]
    parser = argparse.ArgumentParser(prog=" ".join(["adax-triton", *names]), description=module.__doc__)
    if module is doctor:
        parser.parse_args(words)
        return doctor.main()
    module.add_arguments(parser)
    return module.main(parser.parse_args(words))
