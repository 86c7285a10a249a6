"""Write results as Markdown tables and pictures, and a README's benchmark section.

The section of a README is between two markers:

    <!-- bench:begin -->
    <!-- bench:end -->

The section names its result files. `--readme README.md` without files regenerates the section from them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adax_triton.bench import host, norm
from adax_triton.bench.harness.command import markdown_table, split_at_markers
from adax_triton.bench.harness.environment import origin
from adax_triton.bench.launch_variants import command as launch_variants
from adax_triton.bench.precision import long_run, update_error
from adax_triton.bench.report import plots
from adax_triton.bench.step import counted_steps, cpu, functions, scale
from adax_triton.bench.step import table as step_table
from adax_triton.bench.training import command as train
from adax_triton.bench.zero_passes import passes

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_SOURCE = re.compile(r"^From `([^`]+\.json)`", re.MULTILINE)
# Key -> kind, for results without the key "benchmark".
_KIND_BY_KEY = {"workloads": "step", "cases": "train", "kinds": "precision", "rates": "modes", "final": "long run"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `adax-triton bench report`."""
    files_help = "JSON files of benchmarks; default with --readme: the files that its section names"
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help=files_help)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write report.md and the PNG files here")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the first result's steps as in a README")
    parser.add_argument("--readme", type=Path, metavar="FILE", help=f"rewrite the text between {BEGIN} and {END}")


def main(arguments: argparse.Namespace) -> int:
    """Print tables, or write requested files; return 2 for invalid files."""
    try:
        files = arguments.files or (files_of(arguments.readme) if arguments.readme is not None else [])
        if not files:
            raise ValueError("files: got none; give at least one result")
        text = document(files)
        if arguments.readme is not None:
            rewrite(arguments.readme, files)
        if arguments.picture is not None:
            plots.steps(read_steps(files[0])).savefig(arguments.picture)
        if arguments.out is not None:
            write(arguments.out, files)
    except (ValueError, ImportError, OSError) as error:
        print(f"adax-triton bench report: {error}", file=sys.stderr)
        return 2
    if arguments.out is arguments.readme is arguments.picture is None:
        print(text)
    return 0


def read(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the kind of a result, and the result.

    Raises ValueError if the file is not a result.
    """
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    keys = set(result) if isinstance(result, dict) else set()
    found = result.get("benchmark") if keys else None
    kind = found or next((kind for key, kind in _KIND_BY_KEY.items() if key in keys), None)
    if kind not in TABLES or "environment" not in keys:
        raise ValueError(f"{path}: not a result of a benchmark of this package")
    return kind, result


def read_steps(path: Path) -> dict[str, Any]:
    """Return a result of `bench step`, which a README shows."""
    kind, result = read(path)
    if kind != "step":
        raise ValueError(f"{path}: the README shows results of `bench step`, got one of {kind!r}")
    return result


def modes_table(result: dict[str, Any]) -> str:
    """Return a table of a result of `examples/compare_modes.py`."""
    rows = []
    for rate in result["rates"]:
        for name, row in rate["modes"].items():
            error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.4f}"
            difference = "" if name == "float32" else f"{row['difference']:+.4f}{error}"
            rows.append([f"{rate['lr']:g}", name, f"{row['mean']:.4f}", difference])
    titles = ["lr", "weights and states", "validation loss", "difference from float32"]
    run = f"{result['weights']:,} weights, {result['steps']} steps, {result['seeds']} seeds"
    return "\n".join([run, "", *markdown_table(titles, rows)])


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "step": step_table.table,
    "train": train.table,
    "scale": scale.table,
    "host": host.table,
    "norm": norm.table,
    "counters": counted_steps.table,
    "precision": update_error.table,
    "long run": long_run.table,
    "modes": modes_table,
    "cpu": cpu.table,
    "functions": functions.table,
    "passes": passes.table,
    "variants": launch_variants.table,
}


def document(files: Sequence[Path], pictures: bool = False) -> str:
    """Return all results as Markdown; `pictures` adds links to `write`'s plots."""
    parts = []
    for path in files:
        kind, result = read(path)
        picture = f"\n![{path.stem}]({path.stem}.png)\n" if pictures and kind in plots.DRAWINGS else ""
        parts.append(f"## {path.stem}\n\n{kind}: {origin(result)}\n\n{TABLES[kind](result)}\n{picture}")
    return "\n".join(parts)


def write(folder: Path, files: Sequence[Path]) -> None:
    """Write report.md, and a plot of each result that has one."""
    stems = [path.stem for path in files]
    if len(set(stems)) < len(stems):
        raise ValueError(f"files: two have the same name, in {stems}; pictures are named after them")
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        kind, result = read(path)
        if kind in plots.DRAWINGS:
            plots.DRAWINGS[kind](result).savefig(folder / f"{path.stem}.png")
    (folder / "report.md").write_text(document(files, pictures=True))


def section(files: Sequence[Path], root: Path) -> str:
    """Return a README's text between the markers, from `bench step` results.

    `root` is the folder of the README.
    """
    parts = []
    for path in files:
        if not path.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{path}: not below {root}, so the README cannot name it")
        result = read_steps(path)
        name = path.resolve().relative_to(root.resolve()).as_posix()
        parts.append(f"From `{name}`: {origin(result)}.\n\n{step_table.summary(result)}\n")
    return "\n".join(parts)


def files_of(readme: Path) -> list[Path]:
    """Return the files that the section of a README was made from."""
    return [readme.parent / name for name in _SOURCE.findall(split_at_markers(readme, BEGIN, END)[1])]


def rewrite(readme: Path, files: Sequence[Path]) -> None:
    """Replace the text between the markers."""
    before, _, after = split_at_markers(readme, BEGIN, END)
    readme.write_text(f"{before}{BEGIN}\n{section(files, readme.parent)}{END}{after}")
