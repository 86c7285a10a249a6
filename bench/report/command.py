"""`adax-triton bench report`: result files as Markdown tables and pictures, and the benchmark section of a README.

A README's section stands between two marks, which stay:

    <!-- bench:begin -->
    <!-- bench:end -->

It names every file that it was made from: `--readme README.md` without files makes it again from those.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adax_triton.bench import host
from adax_triton.bench.harness.origin import origin
from adax_triton.bench.precision import long_run
from adax_triton.bench.precision import study as precision_study
from adax_triton.bench.report import plots
from adax_triton.bench.step import counted_steps, cpu, launch_variants, scale
from adax_triton.bench.step import functions as step_functions
from adax_triton.bench.step import table as step_table
from adax_triton.bench.step.table import markdown_row
from adax_triton.bench.training import command as train
from adax_triton.bench.zero_passes import passes as deepspeed_step

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_SOURCE = re.compile(r"^From `([^`]+\.json)`", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="JSON files that benchmarks wrote; default, with --readme: those that its section names",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write report.md and a PNG per file here")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help=f"rewrite what stands between its {BEGIN} and {END}"
    )


def main(arguments: argparse.Namespace) -> int:
    """Print the tables, or write what the options ask for; return 2 where that cannot be."""
    try:
        files = arguments.files or (files_of(arguments.readme) if arguments.readme is not None else [])
        if not files:
            raise ValueError("files: expected at least one result")
        text = report(files)
        if arguments.readme is not None:
            rewrite(arguments.readme, files)
        if arguments.out is not None:
            write(arguments.out, files)
    except (ValueError, ImportError, OSError) as error:
        print(f"adax-triton bench report: {error}", file=sys.stderr)
        return 2
    if arguments.out is None and arguments.readme is None:
        print(text)
    return 0


def read(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the kind of a result, and the result.

    Raises:
        ValueError: the file is not JSON, or not of a benchmark of this package.
        OSError: it cannot be read.
    """
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    keys = set(result) if isinstance(result, dict) else set()
    signs = {"workloads": "step", "cases": "train", "kinds": "precision", "rates": "modes", "final": "long run"}
    found = result.get("benchmark") if keys else None
    kind = found or next((kind for sign, kind in signs.items() if sign in keys), None)
    if kind not in TABLES or "environment" not in keys:
        raise ValueError(f"{path}: not a result of a benchmark of this package")
    return kind, result


def modes_table(result: dict[str, Any]) -> str:
    """Return `examples/compare_modes.py`'s result as Markdown."""
    titles = ["lr", "weights and states", "validation loss", "difference from float32"]
    lines = [
        f"{result['weights']:,} weights, {result['steps']} steps, {result['seeds']} seeds",
        "",
        markdown_row(titles),
        "|---" * len(titles) + "|",
    ]
    for rate in result["rates"]:
        for name, row in rate["modes"].items():
            error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.4f}"
            difference = "" if name == "float32" else f"{row['difference']:+.4f}{error}"
            lines.append(markdown_row([f"{rate['lr']:g}", name, f"{row['mean']:.4f}", difference]))
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "step": step_table.table,
    "train": train.table,
    "scale": scale.table,
    "host": host.table,
    "counters": counted_steps.table,
    "precision": precision_study.table,
    "long run": long_run.table,
    "modes": modes_table,
    "cpu": cpu.table,
    "functions": step_functions.table,
    "passes": deepspeed_step.table,
    "variants": launch_variants.table,
}


def report(files: Sequence[Path]) -> str:
    """Return all results as Markdown.

    Raises:
        ValueError: a file is no result.
    """
    parts = []
    for path in files:
        kind, result = read(path)
        parts.append(f"## {path.stem}\n\n{kind}: {origin(result)}\n\n{TABLES[kind](result)}\n")
    return "\n".join(parts)


def document(files: Sequence[Path]) -> str:
    """Return all results as Markdown, with the pictures that `write` draws.

    Raises:
        ValueError: a file is no result.
    """
    parts = []
    for path in files:
        has_picture = read(path)[0] in plots.DRAWINGS
        parts.append(report([path]) + (f"\n![{path.stem}]({path.stem}.png)\n" if has_picture else ""))
    return "\n".join(parts)


def write(folder: Path, files: Sequence[Path]) -> None:
    """Write report.md, and a picture of each file whose kind has one.

    Raises:
        ValueError: a file is no result, or two have one name.
        ImportError: matplotlib is not installed.
    """
    stems = [path.stem for path in files]
    if len(set(stems)) < len(stems):
        raise ValueError(f"files: two have the same name, in {stems}; pictures are named after them")
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        kind, result = read(path)
        if kind in plots.DRAWINGS:
            plots.draw(result, kind, folder / f"{path.stem}.png")
    (folder / "report.md").write_text(document(files))


def section(files: Sequence[Path], root: Path) -> str:
    """Return what stands between the marks of a README.

    Args:
        files: results of the step benchmark, below `root`.
        root: the README's folder, from which files are named.

    Raises:
        ValueError: a file is no result of the step benchmark, or not below `root`.
    """
    parts = []
    for path in files:
        kind, result = read(path)
        if not path.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{path}: not below {root}, so the README cannot name it")
        name = path.resolve().relative_to(root.resolve()).as_posix()
        if kind != "step":
            raise ValueError(f"{path}: the README shows results of `bench step`, this is one of {kind!r}")
        parts.append(f"From `{name}`: {origin(result)}.\n\n{step_table.summary(result)}\n")
    return "\n".join(parts)


def files_of(readme: Path) -> list[Path]:
    """Return the files that a README's section was made from.

    Raises:
        ValueError: the README has no marks.
    """
    return [readme.parent / name for name in _SOURCE.findall(_split(readme)[1])]


def rewrite(readme: Path, files: Sequence[Path]) -> None:
    """Replace what stands between the marks.

    Raises:
        ValueError: the README does not have each mark once, in order, or a file is no result.
    """
    before, _, after = _split(readme)
    readme.write_text(f"{before}{BEGIN}\n{section(files, readme.parent)}{END}{after}")


def between_marks(readme: Path) -> str:
    """Return what stands between the marks.

    Raises:
        ValueError: the README does not have each mark once, in order.
    """
    return _split(readme)[1]


def _split(readme: Path) -> tuple[str, str, str]:
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme}: expected {BEGIN} and then {END}, once each")
    before, _, rest = text.partition(BEGIN)
    between, _, after = rest.partition(END)
    return before, between.removeprefix("\n"), after
