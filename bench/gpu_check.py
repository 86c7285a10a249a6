"""One command for a machine with a GPU, torch, triton and pytest: no network, no installation, from a bare checkout.

    python3 bench/gpu_check.py [--out FOLDER] [--wheels FOLDER] [--tests FILE ...]

Parts, each with a limit of time, so that one that hangs does not cost the others, all within nine minutes:

    doctor      what the machine can run, and whether the kernel is right on it
    tests       those that use a GPU where there is one
    sanitizer   a few of them under compute-sanitizer, where that is
    counters    bytes and throughput of the memory in a step of every mode, by the hardware counters, where ncu is
    step        the step benchmark, in the time that is left

FOLDER, else the environment variable OUT, else runs/gpu-check, gets the output of each, `step.json`, and
`summary.json`: exit code and seconds of each part, or why it was left out. Wheels in the folder that --wheels or the
variable WHEELS names, such as those of other optimizers, can be imported there. `--interpret` is the dry run without a
GPU: the same commands on the CPU, with Triton's interpreter and small sizes, and without the two profilers.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import zipfile
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# The kernel's own, which come before the others.
FIRST = ("test_kernel.py", "test_rounding.py", "test_compact.py", "test_low_memory.py")
# The doctor is a part by itself, and the benchmark checks every mode before it times it.
ELSEWHERE = ("test_doctor.py", "test_bench_gate.py", "test_bench_step.py", "test_gpu_check.py")
USES_GPU = re.compile(r"\b(device|backend): torch\.device|mark\.gpu")
# Sizes around a block's, and canaries between tensors.
SANITIZED = ("test_kernel.py", "step_of_any_size or memory_between_tensors")
COMMAND_LINE = ("-c", "import sys; from adax_triton.cli import main; sys.exit(main())")
METRICS = {
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent_of_peak",
    "gpu__time_duration.sum": "nanoseconds",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_percent_of_most",
}
ALL_S, DRY_S = 530.0, 1800.0
LIMITS_S = {"doctor": 45.0, "tests": 150.0, "sanitizer": 50.0, "counters": 60.0}
# Of the benchmark's time: its start, and the last things it is in the midst of.
STEP_MARGIN_S = 40.0
LONGEST_STEP_S = 420.0


class Part(NamedTuple):
    """One part of the check.

    Attributes:
        name: its key in the summary.
        file: that gets its output.
        command: the words after the name of Python's program.
        profiler: the words before it; the first is the program that must be there.
    """

    name: str
    file: str
    command: tuple[str, ...]
    profiler: tuple[str, ...] = ()


def gpu_tests() -> list[str]:
    """Return the files of tests that run on a GPU where there is one, by the fixtures of conftest.py that they name."""
    texts = {path.name: path.read_text() for path in sorted((ROOT / "tests").glob("test_*.py"))}
    found = [name for name, text in texts.items() if USES_GPU.search(text) and "mark.deepspeed" not in text]
    return [*FIRST, *(name for name in found if name not in (*FIRST, *ELSEWHERE))]


def stage(target: Path, wheels: Path | None) -> None:
    """Copy the packages into `target` as an installation would lay them out; the checkout itself cannot be imported."""
    if wheels is not None:
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        destination = target.joinpath(*package.split("."))
        shutil.copytree(ROOT / folder, destination, ignore=shutil.ignore_patterns("__pycache__", "results"))


def plan(tests: list[str], interpret: bool) -> list[Part]:
    """Return all parts but the benchmark."""
    pytest = ("-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    counted = ("--device", "cpu", "--numel", "5000") if interpret else ()
    sanitizer = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "77")
    counters: tuple[str, ...] = ("ncu", "--clock-control", "none", "--csv", "--print-units", "base")
    counters += ("--kernel-name", "regex:adax_step", "--metrics", ",".join(METRICS))
    few, names = SANITIZED
    return [
        Part("doctor", "doctor.txt", (*COMMAND_LINE, "doctor")),
        Part("tests", "tests.txt", (*pytest, "--durations=10", *(str(ROOT / "tests" / name) for name in tests))),
        Part("sanitizer", "sanitizer.txt", (*pytest, "-k", names, str(ROOT / "tests" / few)), sanitizer),
        Part("counters", "counters.txt", ("-m", "adax_triton.bench.counted_steps", *counted), counters),
    ]


def step_part(out: Path, interpret: bool, seconds: float) -> Part:
    """Return the benchmark, to end within so many seconds."""
    command = [*COMMAND_LINE, "bench", "step", "--json", str(out / "step.json")]
    if interpret:
        command += ["--device", "cpu", "--sizes", "5000", "--models", "--modes", "fp32"]
        command += ["--rounds", "2", "--only", "AdaXW", "fused"]
    command += ["--budget", str(round(min(max(seconds - STEP_MARGIN_S, 1.0), LONGEST_STEP_S)))]
    return Part("step", "step.md", tuple(command))


def run(part: Part, environment: dict[str, str], out: Path, limit_s: float, interpret: bool) -> dict[str, Any]:
    """Run a part, show its output and keep it in `out`; return its entry of the summary."""
    print(f"== {part.name}", flush=True)
    profiler = () if interpret else part.profiler
    if profiler and shutil.which(profiler[0]) is None:
        print(f"left out: {profiler[0]} is not on the PATH", flush=True)
        return {"left_out": f"{profiler[0]} is not on the PATH"}
    begun = time.monotonic()
    # -P keeps the working folder off sys.path: the checkout would hide the staged packages.
    process = subprocess.Popen(
        [*profiler, sys.executable, "-P", *part.command],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        # The benchmark's table is a file of its own; progress is not part of it.
        stderr=None if part.name == "step" else subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    reader = threading.Thread(target=keep, args=(process.stdout, out / part.file), daemon=True)
    reader.start()
    entry: dict[str, Any] = {"file": part.file, "limit_s": round(limit_s)}
    try:
        entry["rc"] = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        entry |= {"rc": None, "stopped": f"after its limit of {limit_s:.0f} s"}
        print(f"== {part.name}: stopped {entry['stopped']}", flush=True)
    finally:
        stop(process)
        reader.join(5)
    return entry | {"seconds": round(time.monotonic() - begun, 1)}


def keep(output: IO[str], path: Path) -> None:
    """Copy lines to a file and to the terminal."""
    with path.open("w") as log:
        for line in output:
            sys.stdout.write(line)
            sys.stdout.flush()
            log.write(line)
            log.flush()


def stop(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started and that is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_counters(text: str) -> list[dict[str, Any]]:
    """Return, for each mode, what ncu counted in its last launch, per element, beside the formula.

    Args:
        text: the output of ncu, CSV, and of `counted_steps`, JSON, in any order of lines.

    Raises:
        ValueError: there are not as many launches as there should be.
    """
    lines = text.splitlines()
    modes = [json.loads(line) for line in lines if line.startswith("{")]
    launches: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(line for line in lines if line.startswith('"')):
        if row["Metric Name"] in METRICS:
            value = float(row["Metric Value"].replace(",", ""))
            launches.setdefault(row["ID"], {})[METRICS[row["Metric Name"]]] = value
    expected = sum(mode["launches"] for mode in modes)
    if not modes or len(launches) != expected:
        raise ValueError(f"{len(launches)} launches were counted, {expected} were made")
    found = []
    values = iter(launches.values())
    for mode in modes:
        *_, last = (next(values) for _ in range(mode["launches"]))
        moved = last["bytes_read"] + last["bytes_written"]
        rates = {
            "read_per_element": last.pop("bytes_read") / mode["numel"],
            "written_per_element": last.pop("bytes_written") / mode["numel"],
            "gb_per_s": moved / last["nanoseconds"],
        }
        found.append(mode | rates | last)
    return found


def main() -> int:
    """Run the check; return 0 if every part that could be run passed."""
    parser = argparse.ArgumentParser(description="Tests and benchmark for a GPU machine, from a bare checkout.")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "runs" / "gpu-check")))
    parser.add_argument("--wheels", type=Path, default=os.environ.get("WHEELS"), help="a folder of wheels to import")
    parser.add_argument("--interpret", action="store_true", help="dry run on the CPU")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="files of tests/ instead of all that use a GPU")
    parser.add_argument("--seconds", type=float, help=f"for all parts; default: {ALL_S:.0f}, dry {DRY_S:.0f}")
    arguments = parser.parse_args()
    if arguments.wheels is not None and not arguments.wheels.is_dir():
        parser.error(f"--wheels: no folder {arguments.wheels}")
    out, interpret = arguments.out.resolve(), arguments.interpret
    out.mkdir(parents=True, exist_ok=True)
    begun, seconds = time.monotonic(), arguments.seconds or (DRY_S if interpret else ALL_S)
    summary: dict[str, Any] = {"parts": {}}
    with tempfile.TemporaryDirectory() as staged:
        stage(Path(staged), arguments.wheels)
        path = os.pathsep.join(filter(None, (staged, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "CHECKOUT": str(ROOT)}
        if interpret:
            environment["TRITON_INTERPRET"] = "1"
        for part in plan(arguments.tests or gpu_tests(), interpret):
            left = seconds - (time.monotonic() - begun)
            # The sanitizer sees overruns only between allocations of the driver.
            extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if part.name == "sanitizer" else {}
            limit_s = left if interpret else min(LIMITS_S[part.name], left)
            summary["parts"][part.name] = run(part, environment | extra, out, limit_s, interpret)
            write(summary, out)
        left = max(seconds - (time.monotonic() - begun), 1.0)
        summary["parts"]["step"] = run(step_part(out, interpret, left), environment, out, left, interpret)
    if "rc" in summary["parts"]["counters"] and not interpret:
        try:
            summary["counters"] = read_counters((out / "counters.txt").read_text())
        except (ValueError, KeyError) as error:
            summary["parts"]["counters"]["unread"] = f"{type(error).__name__}: {error}"
    write(summary, out)
    failed = [name for name, entry in summary["parts"].items() if "left_out" not in entry and entry["rc"] != 0]
    print(f"== results in {out}; " + (f"FAILED: {', '.join(failed)}" if failed else "all passed"))
    return 1 if failed else 0


def write(summary: dict[str, Any], out: Path) -> None:
    """Leave the summary so far."""
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
