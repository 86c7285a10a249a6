"""One command for a machine with a GPU, torch, triton and pytest: no network, no installation, from a bare checkout.

    python3 bench/gpu_check.py [--out FOLDER] [--tests FILE ...]

Runs the doctor, the tests that use a GPU where there is one, then the step benchmark. FOLDER, else the environment
variable OUT, else runs/gpu-check, gets `tests.txt`, `doctor.txt`, `step.json` and `step.md`. `--interpret` is the dry
run without a GPU: the same commands on the CPU, with Triton's interpreter and small sizes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    *("test_kernel.py", "test_rounding.py", "test_compact.py", "test_low_memory.py", "test_low_memory_limits.py"),
    "test_master_state_dict.py",
    *("test_optimizer_contract.py", "test_tensor_kinds.py", "test_checkpoint.py"),
)
COMMAND_LINE = "import sys; from adax_triton.cli import main; sys.exit(main())"


def stage(target: Path) -> None:
    """Copy the packages into `target` as an installation would lay them out; the checkout itself cannot be imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        destination = target.joinpath(*package.split("."))
        shutil.copytree(ROOT / folder, destination, ignore=shutil.ignore_patterns("__pycache__", "results"))


def run(name: str, command: list[str], environment: dict[str, str], out: Path) -> int:
    """Run a command, show its output and keep it in `out`; return its exit code."""
    print(f"== {name}", flush=True)
    # -P keeps the working folder off sys.path: the checkout would hide the staged packages.
    process = subprocess.Popen(
        [sys.executable, "-P", *command],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with (out / name).open("w") as log:
        for line in process.stdout:
            sys.stdout.write(line)
            log.write(line)
    return process.wait()


def commit() -> str:
    """Return the checkout's commit, which the staged copy cannot ask git for; "unknown" where there is no git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> int:
    """Run the check; return 0 if every part passed."""
    parser = argparse.ArgumentParser(description="Tests and benchmark for a GPU machine, from a bare checkout.")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "runs" / "gpu-check")))
    parser.add_argument("--interpret", action="store_true", help="dry run on the CPU")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="FILE", help="files of tests/ instead of all")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    step = ["bench", "step", "--json", str(out / "step.json")]
    if arguments.interpret:
        step += ["--device", "cpu", "--sizes", "50000", "--no-model", "--rounds", "2", "--only", "adax_triton", "fused"]
    with tempfile.TemporaryDirectory() as staged:
        stage(Path(staged))
        environment = {**os.environ, "PYTHONPATH": staged, "PYTHONDONTWRITEBYTECODE": "1"}
        environment.setdefault("COMMIT", commit())
        if arguments.interpret:
            environment["TRITON_INTERPRET"] = "1"
        tests = [str(ROOT / "tests" / name) for name in arguments.tests]
        codes = {
            "doctor.txt": run("doctor.txt", ["-c", COMMAND_LINE, "doctor"], environment, out),
            "tests.txt": run("tests.txt", ["-m", "pytest", "-p", "no:cacheprovider", *tests], environment, out),
            "step.md": run("step.md", ["-c", COMMAND_LINE, *step], environment, out),
        }
    failed = [name for name, code in codes.items() if code]
    print(f"== results in {out}; " + (f"FAILED: {', '.join(failed)}" if failed else "all passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
