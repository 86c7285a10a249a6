"""Test and benchmark a GPU machine in two runs.

    COMMIT=<hash> python3 bench/gpu_check.py --call 1 [--out FOLDER] [--wheels FOLDER]
    COMMIT=<hash> python3 bench/gpu_check.py --call 2 [--tests FILE ...]

It runs from a bare checkout, without network or installation, and needs torch, triton and pytest. Call 1 takes at most
240 s, call 2 at most 420 s:

    device      1, 2  GPU, driver and versions; if it or the doctor fails, the other parts are skipped
    doctor      1     kernel results
    compile     1, 2  kernels that many tests share, in parallel
    tests       1, 2  those that use a GPU, in parallel with pytest-xdist; in call 2 only the files of --tests
    variants    1     launch shapes of the kernel, timed together with a copy
    counters    2     hardware counters of a step in every mode: bytes and throughput, if ncu is installed
    host, norm  2     host time of a step; gradient norm, next to torch's
    step        2     step time, next to all other optimizers that are installed
    train       2     three cases, in turn
    memcheck, racecheck  2  compute-sanitizer on tests of the step, norm and prepare kernels, if time is left

The files are written to --out, $OUT or runs/gpu-check:

    log.txt           all output
    failures.txt      each failure, as soon as it happens
    summary.json      exit code and seconds of each part
    DEVICE-NAME.json  the result of a benchmark, for `adax-triton bench report` and bench/results/

Set COMMIT if the checkout has no .git. --wheels or $WHEELS is a folder of wheels to import, such as other optimizers.
--interpret is a dry run in Triton's interpreter: the same commands with small tensors and without profilers.
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
import time
import tomllib
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Time limit of each part in seconds, in run order. `CALL_S` limits a whole call.
LIMITS_S: dict[int, dict[str, float]] = {
    1: {"device": 30, "doctor": 40, "compile": 30, "tests": 110, "variants": 90},
    2: {
        **{"device": 30, "compile": 30, "tests": 40, "counters": 50, "host": 30, "norm": 30, "step": 190},
        **{"train": 130, "memcheck": 70, "racecheck": 70},
    },
}
CALL_S = {1: 240.0, 2: 420.0}
DRY_S = 600.0
# Subtracted from the limit, for startup and the last measurement.
MARGINS_S = {"variants": 8.0, "host": 15.0, "norm": 15.0, "step": 25.0, "train": 15.0}
PARTS = tuple(dict.fromkeys([*LIMITS_S[1], *LIMITS_S[2]]))
# If one fails, the other parts are skipped: without a GPU or with a wrong kernel their results mean nothing.
REQUIRED_PARTS = ("device", "doctor")

# The kernel's own tests run first.
RUN_FIRST = (
    *("step/test_kernel.py", "update/test_rounding.py", "update/test_quantization.py"),
    "state/test_low_memory.py",
)
# Covered by other parts: the doctor, and the step benchmark, which checks every mode before timing it.
COVERED = ("project/test_doctor.py", *(f"bench/test_{n}.py" for n in ("bench_correctness", "bench_step", "gpu_check")))
USES_GPU = re.compile(r"\b(device|backend): torch\.device|mark\.gpu")
MAX_WORKERS = 12  # each has its own CUDA context
# Tests of the step, norm and prepare kernels: block sizes, guard bytes.
SANITIZED = {
    "step/test_kernel.py": "step_of_any_size or memory_between_tensors",
    "step/test_grad_norm.py": "sum_over_any_size or only_the_partials",
    "step/test_device_coefficients.py": "any_number_of_tensors or each_tensor_has or norm_is_that_of_all",
}
OPTIONS: dict[str, tuple[str, ...]] = {
    "host": (),
    "norm": (),
    "variants": (),
    "train": (
        *("--steps", "20", "--rounds", "2", "--only", "plain / torch AdamW", "plain / torch AdamW, bfloat16 weights"),
        "plain / AdaXW 8bit_v16, bfloat16 weights, 24-bit masters",
    ),
    "step": (
        *("--sizes", "1e6", "1e8", "1e9", "--models", "gpt2", "llama3-8b-shard", "many-small"),
        *("--modes", "fp32", "bf16 + float32 + 24-bit masters", "bf16 + bfloat16", "bf16 + bfloat16 + 24-bit masters"),
        *("bf16 + 8bit_v16 + 24-bit masters", "bf16 + 8bit", "bf16 + 8bit + 24-bit masters"),
    ),
}
DRY_OPTIONS = {
    "host": ("--rounds", "2", "--tensors", "1", "3"),
    "norm": ("--sizes", "500", "--models", "--dtypes", "bfloat16", "--rounds", "1"),
    "variants": ("--numel", "500", "--rounds", "1", "--modes", "fp32", "--variants", "2048x8 r48"),
    "train": (
        *("--rounds", "1", "--steps", "2", "--warmup", "1", "--ranks", "1", "--only", "plain / AdaXW"),
        *("--layers", "1", "--width", "32", "--context", "16"),
    ),
    "step": ("--rounds", "2", "--sizes", "500", "--models", "--modes", "fp32", "--only", "fused"),
}
LAUNCH_VARIANTS = ("-m", "adax_triton.bench.launch_variants.command")
COMMAND_LINE = ("-c", "import sys; from adax_triton.cli.main import main; sys.exit(main())")
METRICS = {
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent_of_peak",
    "gpu__time_duration.sum": "nanoseconds",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_percent_of_most",
}


class CheckPart(NamedTuple):
    """One part of the check."""

    name: str  # key in the summary
    command: tuple[str, ...]  # arguments of the Python executable
    profiler: tuple[str, ...] = ()  # command prefix; the part is skipped if its program is not installed
    environment: tuple[tuple[str, str], ...] = ()  # additional variables


def gpu_tests() -> list[str]:
    """Return the test files that use GPU fixtures."""
    tests = ROOT / "tests"
    texts = {path.relative_to(tests).as_posix(): path.read_text() for path in sorted(tests.rglob("test_*.py"))}
    found = [name for name, text in texts.items() if USES_GPU.search(text) and "mark.deepspeed" not in text]
    return [*RUN_FIRST, *(name for name in found if name not in (*RUN_FIRST, *COVERED))]


def stage(target: Path, wheels: Path | None) -> None:
    """Copy the packages into `target` in the layout of an installation.

    The checkout itself has other folders than the package and cannot be imported.
    """
    for wheel in sorted(wheels.glob("*.whl")) if wheels is not None else ():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        destination = target.joinpath(*package.split("."))
        shutil.copytree(ROOT / folder, destination, ignore=shutil.ignore_patterns("__pycache__", "results"))


def part_of(name: str, tests: list[str], result: Path, interpret: bool, seconds: float) -> CheckPart:
    """Return one of `PARTS`.

    `tests` are files of tests/ for the part "tests". A benchmark writes `result` (JSON) within `seconds`.
    """
    if name in ("tests", "memcheck", "racecheck"):
        return tests_part(name, tests, interpret)
    if name in OPTIONS:
        return benchmark(name, result, interpret, seconds)
    command: tuple[str, ...] = {
        "device": ("-m", "adax_triton.bench.harness.environment", "cpu" if interpret else "cuda"),
        "doctor": (*COMMAND_LINE, "doctor"),
        "compile": ("-m", "adax_triton.bench.launch_variants.compile", *(("--modes", "fp32") if interpret else ())),
        "counters": ("-m", "adax_triton.bench.step.counted_steps"),
    }[name]
    if name != "counters":
        return CheckPart(name, command)
    ncu = ("ncu", "--clock-control", "none", "--csv", "--print-units", "base", "--kernel-name", "regex:adax_step")
    small = ("--device", "cpu", "--numel", "500") if interpret else ()
    return CheckPart(name, (*command, *small), (*ncu, "--metrics", ",".join(METRICS)))


def tests_part(name: str, tests: list[str], interpret: bool) -> CheckPart:
    """Return the GPU tests, or a few of them under compute-sanitizer."""
    pytest: tuple[str, ...] = ("-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    pytest += ("--rootdir", str(ROOT), "--config-file", str(ROOT / "pyproject.toml"))
    if name == "tests":
        files = tuple(str(ROOT / "tests" / file) for file in tests)
        if importlib.util.find_spec("pytest_timeout"):
            pytest += ("--timeout", "60")
        if importlib.util.find_spec("xdist") and not interpret:
            pytest += ("-n", str(min(MAX_WORKERS, os.cpu_count() or 1)), "--dist", "worksteal")
        return CheckPart(name, (*pytest, "--durations=10", *files), environment=(("ONLY_GPU_TESTS", "1"),))
    words = " or ".join(words.rpartition(" or ")[2] if interpret else words for words in SANITIZED.values())
    files = tuple(str(ROOT / "tests" / file) for file in SANITIZED)
    sanitizer = ("compute-sanitizer", "--tool", name, "--error-exitcode", "77")
    # compute-sanitizer detects overruns only between driver allocations, so PyTorch's caching allocator is off.
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return CheckPart(name, (*pytest, "-k", words, *files), sanitizer, uncached)


def benchmark(name: str, result: Path, interpret: bool, seconds: float) -> CheckPart:
    """Return a time-limited benchmark that writes its result to a file."""
    words = LAUNCH_VARIANTS if name == "variants" else (*COMMAND_LINE, "bench", name)
    options = (*DRY_OPTIONS[name], "--device", "cpu") if interpret else OPTIONS[name]
    if name in MARGINS_S:
        options += ("--budget", str(round(max(seconds - MARGINS_S[name], 1.0))))
    return CheckPart(name, (*words, *options, "--json", str(result)))


class Runner:
    """Runs parts and reports their output.

    Output goes to the log at once, and to the terminal when a part ends.
    """

    def __init__(self, out: Path, folder: Path, interpret: bool) -> None:
        """Start the logs in `out`.

        Python works in `folder` and imports from it. A dry run has no profilers.
        """
        self._log, self._failures = out / "log.txt", out / "failures.txt"
        self._folder, self._interpret = folder, interpret
        path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
        self._environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "CHECKOUT": str(ROOT)}
        self._environment |= {"FAILURES": str(self._failures), **({"TRITON_INTERPRET": "1"} if interpret else {})}
        for file in (self._log, self._failures):
            file.write_text("")

    def run(self, part: CheckPart, limit_s: float) -> tuple[dict[str, Any], str]:
        """Run a part; return its entry in the summary, and its output."""
        self.say(f"== {part.name}")
        profiler = () if self._interpret else part.profiler
        if profiler and shutil.which(profiler[0]) is None:
            return self.skip(f"{profiler[0]} is not on the PATH"), ""
        begun, start = time.monotonic(), self._log.stat().st_size
        with self._log.open("a") as log:
            process = subprocess.Popen(
                [*profiler, sys.executable, *part.command],
                env=self._environment | dict(part.environment),
                cwd=self._folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        entry: dict[str, Any] = {"limit_s": round(limit_s)}
        try:
            entry["rc"] = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            entry |= {"rc": None, "stopped": f"after its limit of {limit_s:.0f} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the children too
            process.wait()
        entry["seconds"] = round(time.monotonic() - begun, 1)
        output = self._log.read_bytes()[start:].decode(errors="replace")
        print(output, end="", flush=True)
        if output and not output.endswith("\n"):
            self.say("")
        if entry["rc"] != 0:
            why = entry.get("stopped") or f"exit code {entry['rc']}"
            self.report_failure(f"== {part.name}: {why}", output.splitlines()[-20:])
        return entry, output

    def skip(self, why: str) -> dict[str, Any]:
        """Return the entry of a part that is not run."""
        self.say(f"skipped: {why}")
        return {"left_out": why}

    def report_failure(self, title: str, lines: list[str]) -> None:
        """Report a failed part, with its last lines in `failures.txt`."""
        self.say(title)
        with self._failures.open("a") as file:
            file.write("\n".join([title, *lines, ""]))

    def say(self, line: str) -> None:
        """Write a line to the terminal and to the log."""
        print(line, flush=True)
        with self._log.open("a") as file:
            file.write(f"{line}\n")


def read_counters(text: str) -> list[dict[str, Any]]:
    """Return the counters per element of each mode's last launch.

    The bytes by formula are included. `text` mixes the output of ncu (CSV) and of `counted_steps` (JSON). Raises
    ValueError if launches are missing.
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
        raise ValueError(f"ncu counted {len(launches)} launches, expected {expected}; see log.txt")
    values = iter(launches.values())
    found = []
    for mode in modes:
        *_, last = (next(values) for _ in range(mode["launches"]))
        read, written = last.pop("bytes_read"), last.pop("bytes_written")
        rates = {"read_per_element": read / mode["numel"], "written_per_element": written / mode["numel"]}
        found.append(mode | rates | {"gb_per_s": (read + written) / last["nanoseconds"]} | last)
    return found


def check(arguments: argparse.Namespace, out: Path, staged: Path) -> dict[str, Any]:
    """Run all parts and return the summary.

    The summary is also written to `out` after each part.
    """
    interpret, call = arguments.interpret, arguments.call
    deadline = time.monotonic() + (DRY_S if interpret else CALL_S[call])
    runner = Runner(out, staged, interpret)
    tests = arguments.tests or (gpu_tests() if call == 1 else [])
    entries: dict[str, dict[str, Any]] = {}
    summary: dict[str, Any] = {"call": call, "environment": {"device": "unknown"}, "parts": entries}
    for name in [part for part in LIMITS_S[call] if part in (arguments.only or PARTS) or part == "device"]:
        left_s = max(deadline - time.monotonic(), 1.0)
        limit_s = left_s if interpret else min(LIMITS_S[call][name], left_s)
        broken = [f"{part} failed" for part in REQUIRED_PARTS if entries.get(part, {}).get("rc", 0) != 0]
        late = ["no time is left"] if left_s < 1.5 * MARGINS_S.get(name, 4.0) else []
        unnamed = ["no files are named by --tests"] if name == "tests" and not tests else []
        if why := [*broken, *late, *unnamed]:
            runner.say(f"== {name}")
            entries[name] = runner.skip(why[0])
            continue
        device = re.sub(r"[^a-z0-9]+", "-", summary["environment"]["device"].lower()).strip("-")
        result = out / f"{device}-{name}.json"
        entry, output = runner.run(part_of(name, tests, result, interpret, limit_s), limit_s)
        entries[name] = entry
        if name == "device" and entry["rc"] == 0:
            summary["environment"] = json.loads(output.splitlines()[-1])
        elif name == "device":
            summary["environment"]["why"] = (output.strip().splitlines() or ["no output"])[-1]
        if name == "counters" and "rc" in entry and not interpret:
            try:
                write({"benchmark": name, "environment": summary["environment"], "rows": read_counters(output)}, result)
            except (ValueError, KeyError) as error:
                entry["unread"] = f"{type(error).__name__}: {error}"
                runner.report_failure(f"== counters: {entry['unread']}", [])
        write(summary, out / "summary.json")
    write(summary, out / "summary.json")
    failed = [name for name, entry in entries.items() if entry.get("rc", 0) != 0]
    runner.say(f"== results in {out}; " + (f"FAILED: {', '.join(failed)}" if failed else "all passed"))
    return summary


def write(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    """Run the check; return 0 if every part that ran passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", type=int, choices=LIMITS_S, required=True, help="1 tests, 2 measures")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "runs" / "gpu-check")))
    parser.add_argument("--wheels", type=Path, default=os.environ.get("WHEELS"), help="folder of wheels to import")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, metavar="PART", help=f"parts to run, of {PARTS}; default: all"
    )
    parser.add_argument("--interpret", action="store_true", help="dry run on the CPU")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="files of tests/; default: call 1 all, call 2 none")
    arguments = parser.parse_args()
    wheels = None if arguments.wheels is None else Path(arguments.wheels)
    if wheels is not None and not wheels.is_dir():
        parser.error(f"--wheels: no folder {wheels}")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as staged:
        stage(Path(staged), wheels)
        summary = check(arguments, out, Path(staged))
    return int(any(entry.get("rc", 0) != 0 for entry in summary["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
