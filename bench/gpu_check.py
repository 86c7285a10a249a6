"""Check and measure on a GPU machine in two calls: from a bare checkout, no network, no installation.

    COMMIT=<hash> python3 bench/gpu_check.py --call 1 [--out FOLDER] [--wheels FOLDER]
    COMMIT=<hash> python3 bench/gpu_check.py --call 2 [--tests FILE ...]

It needs torch, triton and pytest. Call 1 takes at most 240 s and finds what does not work:

    device      the GPU, its driver and the software; if it or the doctor fails, everything after it is left out
    doctor      whether the kernel is right
    compile     the kernels that many tests share, in parallel
    tests       those that use a GPU; several at a time where pytest-xdist is installed
    variants    launch shapes and rewrites of the kernel, timed next to a copy

Call 2 takes at most 360 s and measures:

    device, compile    as in call 1
    tests              only the files that --tests names
    counters           bytes and throughput of a step of every mode, by hardware counters, where ncu is installed
    host, step         these benchmarks, with every peer that can be imported
    train              two cases, if time is left
    memcheck, racecheck    a few tests under compute-sanitizer, if time is left

FOLDER is the option, else the variable OUT, else runs/gpu-check. It gets `log.txt`, all output; `failures.txt`, each
failure as soon as it happens; `summary.json`, exit code and seconds of each part; and one result per benchmark, which
`adax-triton bench report` reads and bench/results/ can keep. COMMIT names the commit where the checkout has no .git.
Wheels in the folder that --wheels or the variable WHEELS names can be imported, such as those of other optimizers.
`--interpret` is the dry run without a GPU: the same commands in Triton's interpreter, small, without profilers.
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
# Seconds of each part at most, in the order in which they run; and of all together.
LIMITS_S: dict[int, dict[str, float]] = {
    1: {"device": 30, "doctor": 40, "compile": 30, "tests": 110, "variants": 90},
    2: {
        **{"device": 30, "compile": 30, "tests": 40, "counters": 50, "host": 30, "step": 190},
        **{"train": 60, "memcheck": 45, "racecheck": 45},
    },
}
CALL_S = {1: 240.0, 2: 360.0}
DRY_S = 600.0
# A benchmark is told to end this much earlier: what it takes to start, and what it is in the middle of.
MARGINS_S = {"variants": 8.0, "step": 25.0, "train": 15.0}
PARTS = tuple(dict.fromkeys([*LIMITS_S[1], *LIMITS_S[2]]))
NEEDED = ("device", "doctor")  # without a GPU, or with a wrong kernel, the others show nothing

FIRST = (
    "step/test_kernel.py",
    "update/test_rounding.py",
    "update/test_quantization.py",
    "state/test_low_memory.py",
)  # the kernel's own
# The doctor is a part by itself, and the benchmark checks every mode before it times it.
ELSEWHERE = (
    "project/test_doctor.py",
    "bench/test_bench_correctness.py",
    "bench/test_bench_step.py",
    "bench/test_gpu_check.py",
)
USES_GPU = re.compile(r"\b(device|backend): torch\.device|mark\.gpu")
MOST_WORKERS = 12  # each has a CUDA context of its own
SANITIZED = ("step/test_kernel.py", "step_of_any_size or memory_between_tensors")  # sizes around a block's; canaries
STEP_SIZES = ("1e6", "1e8", "1e9")
STEP_LISTS = ("gpt2", "llama3-8b-shard", "many-small")
STEP_MODES = (
    "fp32",
    "bf16 + float32 + 24-bit masters",
    "bf16 + bfloat16",
    "bf16 + bfloat16 + 24-bit masters",
    "bf16 + 8bit_v16 + 24-bit masters",
    "bf16 + 8bit",
    "bf16 + 8bit + 24-bit masters",
)
TRAIN_CASES = ("plain / torch AdamW", "plain / AdaXW 8bit_v16, bfloat16 weights, 24-bit masters")
COMMAND_LINE = ("-c", "import sys; from adax_triton.cli.main import main; sys.exit(main())")
METRICS = {
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent_of_peak",
    "gpu__time_duration.sum": "nanoseconds",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_percent_of_most",
}


class Part(NamedTuple):
    """One part of the check.

    Attributes:
        name: its key in the summary.
        command: the words after the name of Python's program.
        profiler: the words before it; the first is the program that must be there.
        environment: additional variables.
    """

    name: str
    command: tuple[str, ...]
    profiler: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def gpu_tests() -> list[str]:
    """Return the files of tests that run on a GPU where there is one, by the fixtures of conftest.py that they name."""
    tests = ROOT / "tests"
    texts = {path.relative_to(tests).as_posix(): path.read_text() for path in sorted(tests.rglob("test_*.py"))}
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


def part_of(name: str, tests: list[str], result: Path, interpret: bool, seconds: float) -> Part:
    """Return a part of the check.

    Args:
        name: one of `PARTS`.
        tests: files of tests/ that the part "tests" runs.
        result: the file that a benchmark leaves its result in.
        interpret: the dry run.
        seconds: how long it may take.
    """
    if name in ("tests", "memcheck", "racecheck"):
        return tests_part(name, tests, interpret)
    small = ("--device", "cpu", "--numel", "500") if interpret else ()
    if name == "device":
        return Part(name, ("-m", "adax_triton.bench.harness.environment", "cpu" if interpret else "cuda"))
    if name == "doctor":
        return Part(name, (*COMMAND_LINE, "doctor"))
    if name == "compile":
        return Part(name, ("-m", "adax_triton.bench.step.compile_kernels", *(("--modes", "fp32") if interpret else ())))
    if name == "counters":
        counters: tuple[str, ...] = ("ncu", "--clock-control", "none", "--csv", "--print-units", "base")
        counters += ("--kernel-name", "regex:adax_step", "--metrics", ",".join(METRICS))
        return Part(name, ("-m", "adax_triton.bench.step.counted_steps", *small), counters)
    return benchmark(name, result, interpret, seconds)


def tests_part(name: str, tests: list[str], interpret: bool) -> Part:
    """Return the tests on the GPU, or a few of them under a tool of compute-sanitizer."""
    pytest: tuple[str, ...] = ("-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    pytest += ("--rootdir", str(ROOT), "--config-file", str(ROOT / "pyproject.toml"))
    if name == "tests":
        files = tuple(str(ROOT / "tests" / file) for file in tests)
        if importlib.util.find_spec("pytest_timeout"):
            pytest += ("--timeout", "60")
        if importlib.util.find_spec("xdist") and not interpret:
            pytest += ("-n", str(min(MOST_WORKERS, os.cpu_count() or 1)), "--dist", "worksteal")
        return Part(name, (*pytest, "--durations=10", *files), environment=(("ONLY_GPU_TESTS", "1"),))
    file, words = SANITIZED
    words = words.rpartition(" or ")[2] if interpret else words
    sanitizer = ("compute-sanitizer", "--tool", name, "--error-exitcode", "77")
    # It sees overruns only between allocations of the driver.
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return Part(name, (*pytest, "-k", words, str(ROOT / "tests" / file)), sanitizer, uncached)


def benchmark(name: str, result: Path, interpret: bool, seconds: float) -> Part:
    """Return a benchmark that leaves its result in a file, within so many seconds."""
    options: dict[str, tuple[str, ...]] = {"host": (), "variants": ()}
    options["train"] = ("--steps", "20", "--only", *TRAIN_CASES)
    options["step"] = ("--sizes", *STEP_SIZES, "--models", *STEP_LISTS, "--modes", *STEP_MODES)
    if interpret:
        few = ("--device", "cpu", "--rounds", "2")
        options["host"] = (*few, "--tensors", "1", "3")
        options["train"] = ("--device", "cpu", "--quick", "--steps", "2", "--ranks", "1", "--only", "plain / AdaXW")
        # Too few weights for anything to be compiled.
        options["train"] += ("--layers", "1", "--width", "32", "--context", "16", "--warmup", "1")
        options["step"] = (*few, "--sizes", "500", "--models", "--modes", "fp32", "--only", "fused")
        options["variants"] = ("--device", "cpu", "--numel", "500", "--rounds", "1", "--modes", "fp32")
        options["variants"] += ("--variants", "2048x8 r48")
    if name in MARGINS_S:
        options[name] += ("--budget", str(round(max(seconds - MARGINS_S[name], 1.0))))
    words = ("-m", "adax_triton.bench.step.launch_variants") if name == "variants" else (*COMMAND_LINE, "bench", name)
    return Part(name, (*words, *options[name], "--json", str(result)))


class Runner:
    """Runs parts one after another, and keeps what they print.

    Args:
        out: the folder of `log.txt` and `failures.txt`.
        folder: in which the parts run; Python finds the packages there.
        interpret: the dry run, without profilers.
    """

    def __init__(self, out: Path, folder: Path, interpret: bool) -> None:
        self._log, self._failures = out / "log.txt", out / "failures.txt"
        self._folder, self._interpret = folder, interpret
        path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
        self._environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "CHECKOUT": str(ROOT)}
        self._environment["FAILURES"] = str(self._failures)
        if interpret:
            self._environment["TRITON_INTERPRET"] = "1"
        for file in (self._log, self._failures):
            file.write_text("")

    def run(self, part: Part, limit_s: float) -> tuple[dict[str, Any], str]:
        """Run a part; return its entry of the summary, and its output."""
        self.say(f"== {part.name}")
        profiler = () if self._interpret else part.profiler
        if profiler and shutil.which(profiler[0]) is None:
            return self.leave_out(f"{profiler[0]} is not on the PATH"), ""
        begun = time.monotonic()
        process = subprocess.Popen(
            [*profiler, sys.executable, *part.command],
            env=self._environment | dict(part.environment),
            cwd=self._folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert process.stdout is not None
        lines: list[str] = []
        reader = threading.Thread(target=self._keep, args=(process.stdout, lines), daemon=True)
        reader.start()
        entry: dict[str, Any] = {"limit_s": round(limit_s)}
        try:
            entry["rc"] = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            entry |= {"rc": None, "stopped": f"after its limit of {limit_s:.0f} s"}
        finally:
            stop(process)
            reader.join(5)
        entry["seconds"] = round(time.monotonic() - begun, 1)
        if entry["rc"] != 0:
            self.fail(f"== {part.name}: {entry.get('stopped') or 'exit code ' + str(entry['rc'])}", lines[-20:])
        return entry, "".join(lines)

    def leave_out(self, why: str) -> dict[str, Any]:
        """Return the entry of a part that is not run."""
        self.say(f"left out: {why}")
        return {"left_out": why}

    def fail(self, what: str, lines: list[str]) -> None:
        """Say that a part failed; its last lines go to `failures.txt` too."""
        self.say(what)
        with self._failures.open("a") as file:
            file.write("\n".join([what, *(line.rstrip("\n") for line in lines), ""]))

    def say(self, line: str) -> None:
        """Write a line to the terminal and to the log."""
        print(line, flush=True)
        with self._log.open("a") as file:
            file.write(f"{line}\n")

    def _keep(self, output: IO[str], lines: list[str]) -> None:
        for line in output:
            self.say(line.rstrip("\n"))
            lines.append(line)


def stop(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started and that is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_counters(text: str) -> list[dict[str, Any]]:
    """Return, for each mode, what ncu counted in its last launch, per element, next to the formula.

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


def described(entry: dict[str, Any], output: str) -> dict[str, Any]:
    """Return device, driver, versions and commit from the output of the part "device", as every result has them."""
    if entry.get("rc") != 0:
        return {"device": "unknown", "why": (output.strip().splitlines() or ["no output"])[-1]}
    return json.loads(output.splitlines()[-1])


def check(arguments: argparse.Namespace, out: Path, staged: Path) -> dict[str, Any]:
    """Run all parts; return the summary, which is also left in the folder after each."""
    interpret, call = arguments.interpret, arguments.call
    begun, seconds = time.monotonic(), DRY_S if interpret else CALL_S[call]
    runner = Runner(out, staged, interpret)
    tests = arguments.tests or (gpu_tests() if call == 1 else [])
    entries: dict[str, dict[str, Any]] = {}
    summary: dict[str, Any] = {"call": call, "environment": {"device": "unknown"}, "parts": entries}
    for name in [part for part in LIMITS_S[call] if part in (arguments.only or PARTS) or part == "device"]:
        left_s = max(seconds - (time.monotonic() - begun), 1.0)
        limit_s = left_s if interpret else min(LIMITS_S[call][name], left_s)
        why = None
        broken = [part for part in NEEDED if entries.get(part, {}).get("rc", 0) != 0]
        if broken:
            why = f"{broken[0]} failed"
        elif left_s < 1.5 * MARGINS_S.get(name, 4.0):
            why = "no time is left"
        elif name == "tests" and not tests:
            why = "no files are named by --tests"
        if why is not None:
            runner.say(f"== {name}")
            entries[name] = runner.leave_out(why)
            continue
        device = re.sub(r"[^a-z0-9]+", "-", summary["environment"]["device"].lower()).strip("-")
        result = out / f"{device}-{name}.json"
        entry, output = runner.run(part_of(name, tests, result, interpret, limit_s), limit_s)
        entries[name] = entry
        if name == "device":
            summary["environment"] = described(entry, output)
        if name == "counters" and "rc" in entry and not interpret:
            try:
                write({"benchmark": name, "environment": summary["environment"], "rows": read_counters(output)}, result)
            except (ValueError, KeyError) as error:
                entry["unread"] = f"{type(error).__name__}: {error}"
                runner.fail(f"== counters: {entry['unread']}", [])
        write(summary, out / "summary.json")
    write(summary, out / "summary.json")
    failed = [name for name, entry in entries.items() if "left_out" not in entry and entry["rc"] != 0]
    runner.say(f"== results in {out}; " + (f"FAILED: {', '.join(failed)}" if failed else "all passed"))
    return summary


def write(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    """Run the check; return 0 if every part that could be run passed."""
    parser = argparse.ArgumentParser(description="Tests and benchmarks for a GPU machine, from a bare checkout.")
    parser.add_argument("--call", type=int, choices=LIMITS_S, required=True, help="1 checks, 2 measures")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "runs" / "gpu-check")))
    parser.add_argument("--wheels", type=Path, default=os.environ.get("WHEELS"), help="a folder of wheels to import")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help="parts; default: all of the call")
    parser.add_argument("--interpret", action="store_true", help="dry run on the CPU")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="files of tests/; default: call 1 all, call 2 none")
    arguments = parser.parse_args()
    if arguments.wheels is not None and not Path(arguments.wheels).is_dir():
        parser.error(f"--wheels: no folder {arguments.wheels}")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as staged:
        stage(Path(staged), None if arguments.wheels is None else Path(arguments.wheels))
        summary = check(arguments, out, Path(staged))
    return int(any("left_out" not in entry and entry["rc"] != 0 for entry in summary["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
