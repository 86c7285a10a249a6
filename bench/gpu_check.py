"""One command for a machine with a GPU, torch, triton and pytest: no network, no installation, from a bare checkout.

    python3 bench/gpu_check.py [--out FOLDER] [--wheels FOLDER] [--only PART ...] [--tests FILE ...]

Parts, each with a limit of time, so that one that hangs does not cost the others, all within nine minutes:

    doctor      what the machine can run, and whether the kernel is right on it
    tests       those that use a GPU where there is one; several at a time where pytest-xdist is
    sanitizer   a few of them under compute-sanitizer, where that is
    counters    bytes and throughput of the memory in a step of every mode, by the hardware counters, where ncu is
    host, scale, train    these benchmarks; of ZeRO one stage, where DeepSpeed is
    step        the step benchmark, in the time that is left

FOLDER, else the environment variable OUT, else runs/gpu-check, gets `log.txt`, the output of all; `summary.json`: the
machine and its software, exit code and seconds of each part, or why it was left out; and the results, named after the
device, as `adax-triton bench report` reads them: copied to bench/results/ they can be committed. Where the checkout has
no .git, the variable COMMIT says which one it is. Wheels in the folder that --wheels or the variable WHEELS names, such
as those of other optimizers, can be imported. `--interpret` is the dry run without a GPU: the same commands on the CPU,
with Triton's interpreter and small sizes, and without the two profilers.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
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
FIRST = ("test_kernel.py", "test_rounding.py", "test_compact.py", "test_low_memory.py")  # the kernel's own
# The doctor is a part by itself, and the benchmark checks every mode before it times it.
ELSEWHERE = ("test_doctor.py", "test_bench_gate.py", "test_bench_step.py", "test_gpu_check.py")
USES_GPU = re.compile(r"\b(device|backend): torch\.device|mark\.gpu")
SANITIZED = ("test_kernel.py", "step_of_any_size or memory_between_tensors")  # sizes around a block's; canaries
COMMAND_LINE = ("-c", "import sys; from adax_triton.cli import main; sys.exit(main())")
PARTS = ("doctor", "tests", "sanitizer", "counters", "host", "scale", "train", "step")
METRICS = {
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent_of_peak",
    "gpu__time_duration.sum": "nanoseconds",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_percent_of_most",
}
ALL_S, DRY_S = 530.0, 1800.0
LIMITS_S = {"doctor": 40.0, "tests": 150.0, "sanitizer": 50.0, "counters": 50.0}
LIMITS_S |= {"host": 25.0, "scale": 40.0, "train": 60.0}
MARGINS_S = {"train": 15.0, "step": 40.0}  # for its start, and what it is in the midst of
LONGEST_STEP_S = 420.0


class Part(NamedTuple):
    """One part of the check.

    Attributes:
        name: its key in the summary.
        command: the words after the name of Python's program.
        profiler: the words before it; the first is the program that must be there.
    """

    name: str
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
    """Return the checks: all parts but the benchmarks."""
    pytest: tuple[str, ...] = ("-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    # What takes long there is compiling.
    parallel = ("-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadfile")
    several = parallel if importlib.util.find_spec("xdist") and not interpret else ()
    counted = ("--device", "cpu", "--numel", "500") if interpret else ()
    sanitizer = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "77")
    counters: tuple[str, ...] = ("ncu", "--clock-control", "none", "--csv", "--print-units", "base")
    counters += ("--kernel-name", "regex:adax_step", "--metrics", ",".join(METRICS))
    few, names = SANITIZED
    names = names.rpartition(" or ")[2] if interpret else names
    return [
        Part("doctor", (*COMMAND_LINE, "doctor")),
        Part("tests", (*pytest, *several, "--durations=10", *(str(ROOT / "tests" / name) for name in tests))),
        Part("sanitizer", (*pytest, "-k", names, str(ROOT / "tests" / few)), sanitizer),
        Part("counters", ("-m", "adax_triton.bench.counted_steps", *counted), counters),
    ]


def benchmark(name: str, result: Path, interpret: bool, seconds: float) -> Part:
    """Return a benchmark that leaves its result in a file, within so many seconds."""
    options: dict[str, tuple[str, ...]] = {"host": (), "scale": (), "step": ()}
    options["train"] = ("--steps", "20", "--only", "plain", "ZeRO-2 / ")
    if interpret:
        few = ("--device", "cpu", "--rounds", "2")
        options["host"] = (*few, "--tensors", "1", "3")
        options["scale"] = (*few, "--sizes", "100", "20000", "--tensors", "1", "3", "--tensor-size", "100")
        options["train"] = ("--device", "cpu", "--quick", "--steps", "2", "--ranks", "1", "--only", "plain / AdaXW")
        options["train"] += ("--layers", "1", "--width", "32")  # too few weights for anything to be compiled
        options["step"] = (*few, "--sizes", "500", "--models", "--modes", "fp32", "--only", "AdaXW", "fused")
    if name in MARGINS_S:
        options[name] += ("--budget", str(round(min(max(seconds - MARGINS_S[name], 1.0), LONGEST_STEP_S))))
    return Part(name, (*COMMAND_LINE, "bench", name, *options[name], "--json", str(result)))


def run(
    part: Part, environment: dict[str, str], log: Path, limit_s: float, interpret: bool
) -> tuple[dict[str, Any], str]:
    """Run a part, show its output and append it to the log; return its entry of the summary, and the output."""
    say(f"== {part.name}", log)
    profiler = () if interpret else part.profiler
    if profiler and shutil.which(profiler[0]) is None:
        why = f"{profiler[0]} is not on the PATH"
        say(f"left out: {why}", log)
        return {"left_out": why}, ""
    begun = time.monotonic()
    # -P keeps the working folder off sys.path: the checkout would hide the staged packages.
    process = subprocess.Popen(
        [*profiler, sys.executable, "-P", *part.command],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    reader = threading.Thread(target=keep, args=(process.stdout, log, lines), daemon=True)
    reader.start()
    entry: dict[str, Any] = {"limit_s": round(limit_s)}
    try:
        entry["rc"] = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        entry |= {"rc": None, "stopped": f"after its limit of {limit_s:.0f} s"}
    finally:
        stop(process)
        reader.join(5)
    if "stopped" in entry:
        say(f"== {part.name}: stopped {entry['stopped']}", log)
    return entry | {"seconds": round(time.monotonic() - begun, 1)}, "".join(lines)


def keep(output: IO[str], log: Path, lines: list[str]) -> None:
    """Copy lines to the log, to the terminal and to a list."""
    for line in output:
        say(line.rstrip("\n"), log)
        lines.append(line)


def say(line: str, log: Path) -> None:
    """Write a line to the terminal and to the log."""
    print(line, flush=True)
    with log.open("a") as file:
        file.write(f"{line}\n")


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


def describe(environment: dict[str, str], interpret: bool) -> dict[str, Any]:
    """Return device, driver, versions and commit, as every result has them."""
    program = "import json, torch; from adax_triton.bench.environment import describe; "
    program += f"print(json.dumps(describe(torch.device({'cpu' if interpret else 'cuda'!r}))))"
    command = [sys.executable, "-P", "-c", program]
    found = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        return {"device": "unknown", "why": (found.stderr.strip().splitlines() or ["no output"])[-1]}
    return json.loads(found.stdout.splitlines()[-1])


def check(arguments: argparse.Namespace, out: Path, staged: Path) -> dict[str, Any]:
    """Run all parts; return the summary, which is also left in the folder after each."""
    interpret, log = arguments.interpret, out / "log.txt"
    begun, seconds = time.monotonic(), arguments.seconds or (DRY_S if interpret else ALL_S)
    path = os.pathsep.join(filter(None, (str(staged), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "CHECKOUT": str(ROOT)}
    environment["PYTHONSAFEPATH"] = "1"  # -P, for the processes that a part starts
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    summary: dict[str, Any] = {"environment": describe(environment, interpret), "parts": {}}
    device = re.sub(r"[^a-z0-9]+", "-", summary["environment"]["device"].lower()).strip("-")
    parts = {part.name: part for part in plan(arguments.tests or gpu_tests(), interpret)}
    for name in arguments.only or PARTS:
        left_s = max(seconds - (time.monotonic() - begun), 1.0)
        limit_s = left_s if interpret else min(LIMITS_S.get(name, left_s), left_s)
        part = parts.get(name) or benchmark(name, out / f"{device}-{name}.json", interpret, limit_s)
        # The sanitizer sees overruns only between allocations of the driver.
        extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name == "sanitizer" else {}
        entry, output = run(part, environment | extra, log, limit_s, interpret)
        summary["parts"][name] = entry
        if name == "counters" and "rc" in entry and not interpret:
            try:
                result = {"benchmark": name, "environment": summary["environment"], "rows": read_counters(output)}
                write(result, out / f"{device}-{name}.json")
            except (ValueError, KeyError) as error:
                entry["unread"] = f"{type(error).__name__}: {error}"
        write(summary, out / "summary.json")
    return summary


def main() -> int:
    """Run the check; return 0 if every part that could be run passed."""
    parser = argparse.ArgumentParser(description="Tests and benchmarks for a GPU machine, from a bare checkout.")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "runs" / "gpu-check")))
    parser.add_argument("--wheels", type=Path, default=os.environ.get("WHEELS"), help="a folder of wheels to import")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts; default: all")
    parser.add_argument("--interpret", action="store_true", help="dry run on the CPU")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="files of tests/ instead of all that use a GPU")
    parser.add_argument("--seconds", type=float, help=f"for all parts; default: {ALL_S:.0f}, dry {DRY_S:.0f}")
    arguments = parser.parse_args()
    if arguments.wheels is not None and not arguments.wheels.is_dir():
        parser.error(f"--wheels: no folder {arguments.wheels}")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as staged:
        stage(Path(staged), arguments.wheels)
        summary = check(arguments, out, Path(staged))
    failed = [name for name, entry in summary["parts"].items() if "left_out" not in entry and entry["rc"] != 0]
    say(f"== results in {out}; " + (f"FAILED: {', '.join(failed)}" if failed else "all passed"), out / "log.txt")
    return 1 if failed else 0


def write(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
