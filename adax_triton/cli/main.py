"""The command `adax-triton`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from adax_triton.version import __version__

COMMANDS = {
    "doctor": "show the kernels that this machine can run and check their results",
    "convert": "convert checkpoints to another optimizer or precision",
}
BENCHMARKS = {
    "memory": "bytes per parameter of every mode, compared with other optimizers",
    "step": "time of one step in every precision, compared with other optimizers",
    "host": "host overhead of one step, for 1 to 1,000 tensors",
    "norm": "time of the gradient norm, compared with torch's",
    "cpu": "time of one step on a CPU, compared with torch's and DeepSpeed's AdamW",
    "functions": "number of Python functions and files that the first step and a later step execute",
    "train": "tokens per second and memory of a small GPT, in plain PyTorch and under DeepSpeed",
    "scale": "time of one step by number of elements and tensors; estimated time with ZeRO up to 1T parameters",
    "study": "loss of AdaX, Adam and AdaFactor's decay with tuned learning rates, on small problems",
    "report": "tables and plots of result files",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: arguments after the name of the command. Default: None, `sys.argv[1:]`.

    Returns:
        The exit code: 0 on success.
    """
    parser = argparse.ArgumentParser(prog="adax-triton", description="AdaX as one fused Triton kernel.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    benchmarks = commands.add_parser("bench", help="benchmarks").add_subparsers(dest="benchmark", required=True)
    for name, summary in BENCHMARKS.items():
        benchmarks.add_parser(name, help=summary, add_help=False)
    chosen, remaining_args = parser.parse_known_args(argv)
    return _run([chosen.command, chosen.benchmark] if chosen.command == "bench" else [chosen.command], remaining_args)


def _run(names: list[str], args: list[str]) -> int:
    # Import here: importing PyTorch takes seconds, and --version, --help and errors do not need it.
    from adax_triton.bench import host, norm
    from adax_triton.bench.memory import per_parameter as memory
    from adax_triton.bench.report import command as report
    from adax_triton.bench.step import command as step
    from adax_triton.bench.step import cpu, scale
    from adax_triton.bench.step import functions as step_functions
    from adax_triton.bench.study import command as study
    from adax_triton.bench.training import command as train
    from adax_triton.cli import convert as convert_command
    from adax_triton.cli import doctor

    modules = {"doctor": doctor, "convert": convert_command, "memory": memory, "step": step, "host": host}
    modules |= {"norm": norm, "cpu": cpu, "functions": step_functions}
    modules |= {"train": train, "scale": scale, "study": study, "report": report}
    module = modules[names[-1]]
    parser = argparse.ArgumentParser(prog=" ".join(["adax-triton", *names]), description=module.__doc__)
    if module is doctor:
        parser.parse_args(args)
        return doctor.main()
    module.add_arguments(parser)
    return module.main(parser.parse_args(args))
