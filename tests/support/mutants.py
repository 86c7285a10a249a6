"""Mutation testing: apply each fault and check that a test fails.

Usage: python tests/support/mutants.py [NAME ...]

Applies the faults of mutants.toml, or the named ones, in a copy of the tracked files. Prints the first failing test of
each fault. Exits with 1 if no test fails for a fault, or if pytest cannot collect the tests.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from paths import ROOT

TESTS_FAILED = 1  # pytest's exit code


def main() -> int:
    mutants = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="fault in mutants.toml; default: all")
    names = parser.parse_args().names or list(mutants)
    if unknown := sorted(set(names) - set(mutants)):
        parser.error(f"unknown fault: {', '.join(unknown)}; expected a name in mutants.toml")
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder, "tree"))
        survivors = [name for name in names if not is_caught(name, mutants[name], tree)]
    print(f"{len(names) - len(survivors)} of {len(names)} mutants caught")
    for name in survivors:
        print(f"survived: {name}")
    return 1 if survivors else 0


def copy_tree(tree: Path) -> Path:
    """Copy the tracked files; link the folders of package-dir into a package."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in tracked.split("\0")[:-1]:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    folders = tomllib.loads((tree / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    (tree / "importable").mkdir()
    for package, folder in folders.items():
        link = tree / "importable" / package.replace(".", "/")
        link.symlink_to(tree / folder)
    return tree


def is_caught(name: str, mutant: dict[str, Any], tree: Path) -> bool:
    file = tree / mutant["file"]
    original = file.read_text()
    if original.count(mutant["old"]) != 1:
        raise ValueError(
            f"{name}: {mutant['file']} has {mutant['old']!r} {original.count(mutant['old'])} times; expected 1"
        )
    file.write_text(original.replace(mutant["old"], mutant["new"]))
    begun = time.monotonic()
    try:
        code, output = run_tests(tree, [f"tests/{test}" for test in mutant["tests"]])
    finally:
        file.write_text(original)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    caught = code == TESTS_FAILED and failed is not None
    outcome = failed[1] if failed else f"exit code {code}\n{output[-2000:]}" if code else "SURVIVED"
    print(f"{name}: {outcome} ({time.monotonic() - begun:.0f} s)", flush=True)
    return caught


def run_tests(tree: Path, tests: list[str]) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(tree / "importable"), "PYTHONDONTWRITEBYTECODE": "1"}
    pytest = str(Path(sys.executable).with_name("pytest"))
    command = [pytest, "--exitfirst", "--quiet", "--tb=no", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=tree, env=environment, check=False, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
