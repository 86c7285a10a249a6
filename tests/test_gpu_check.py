"""The command for a GPU machine: its dry run, and its parts where something is absent, hangs or is odd."""

import argparse
import csv
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from adax_triton.bench import counted_steps, gpu_check, host, report, scale, step_report, train
from adax_triton.bench.gpu_check import Part

ROOT = Path(__file__).resolve().parent.parent
PROFILED = {
    "dram__bytes_read.sum": "1,600",
    "dram__bytes_write.sum": "1,200",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "91.5",
    "gpu__time_duration.sum": "700",
    "launch__registers_per_thread": "38",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "70.25",
}


def test_dry_run_leaves_its_files(tmp_path: Path) -> None:
    # Tests of the kernel run in this suite already; the dry run shows that staging and every command work.
    checkout, out = tmp_path / "checkout", tmp_path / "out"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "build")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    command = [sys.executable, str(checkout / "bench" / "gpu_check.py"), "--interpret", "--tests", "test_schedule.py"]
    environment = {**os.environ, "OUT": str(out), "COMMIT": "abc123"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert {name: entry["rc"] for name, entry in summary["parts"].items()} == dict.fromkeys(gpu_check.PARTS, 0)
    assert summary["environment"]["commit"] == "abc123"
    log = (out / "log.txt").read_text()
    parts = dict(zip(gpu_check.PARTS, re.split(r"^== .*\n", log, flags=re.MULTILINE)[1:], strict=False))
    assert "agrees with the float64 reference" in parts["doctor"]
    assert all(" passed" in parts[name] for name in ("tests", "sanitizer"))
    modes = [json.loads(line) for line in parts["counters"].splitlines() if line[0] == "{"]
    assert {"mode": "fp32", "numel": 500, "launches": 2, "bytes_loaded": 16.0, "bytes_stored": 12.0} in modes
    results = {path.stem.rpartition("-")[2]: path for path in out.glob("*.json") if path.name != "summary.json"}
    assert results.keys() == {"host", "scale", "train", "step"}
    for kind, path in results.items():
        assert report.read(path)[0] == kind
        assert json.loads(path.read_text())["environment"]["commit"] == "abc123"
        assert report.TABLES[kind](json.loads(path.read_text())) in log
    assert len(list(out.iterdir())) <= 8


def is_running(process: str) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_part_that_hangs_is_stopped_with_all_it_started(tmp_path: Path) -> None:
    child = (
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(__import__('os').getpid())); __import__('time').sleep(60)"
    )
    program = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    log = tmp_path / "log.txt"
    entry, output = gpu_check.run(Part("doctor", ("-c", program)), dict(os.environ), log, 4.0, False)
    assert entry["rc"] is None
    assert "4 s" in entry["stopped"]
    assert entry["seconds"] < 30
    assert output == "begun\n"
    assert log.read_text().startswith("== doctor\nbegun\n== doctor: stopped")
    deadline = time.monotonic() + 30
    while is_running((tmp_path / "child").read_text()):  # a busy machine takes its time to end it
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_exit_code_and_errors_are_kept(tmp_path: Path) -> None:
    program = "import sys; print('out'); sys.stdout.flush(); sys.exit('what was wrong')"
    log = tmp_path / "log.txt"
    entry, output = gpu_check.run(Part("tests", ("-c", program)), dict(os.environ), log, 60.0, False)
    assert entry["rc"] == 1
    assert log.read_text() == f"== tests\n{output}" == "== tests\nout\nwhat was wrong\n"


def test_profiler_that_is_absent_is_left_out(tmp_path: Path) -> None:
    part = Part("counters", ("-c", "print('bare')"), ("no-such-profiler", "--csv"))
    entry, _ = gpu_check.run(part, dict(os.environ), tmp_path / "log.txt", 60.0, interpret=False)
    assert entry == {"left_out": "no-such-profiler is not on the PATH"}
    assert gpu_check.run(part, dict(os.environ), tmp_path / "log.txt", 60.0, interpret=True)[0]["rc"] == 0


def test_profiler_runs_the_command(tmp_path: Path) -> None:
    profiler = tmp_path / "profiler"
    profiler.write_text('#!/bin/sh\necho "profiling with $1"\nshift\nexec "$@"\n')
    profiler.chmod(0o755)
    part = Part("counters", ("-c", "print('bare')"), (str(profiler), "--csv"))
    entry, output = gpu_check.run(part, dict(os.environ), tmp_path / "log.txt", 60.0, interpret=False)
    assert (entry["rc"], output) == (0, "profiling with --csv\nbare\n")


def profile(launches: int) -> str:
    """What ncu and the program it ran print together: 100 elements, and as the first launch one that does not count."""
    table = io.StringIO()
    writer = csv.writer(table, quoting=csv.QUOTE_ALL)
    writer.writerow(["ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value"])
    for number in range(launches):
        for name, value in PROFILED.items():
            writer.writerow([number, "adax_step_kernel", name, "byte", value if number == launches - 1 else "1"])
    mode: dict[str, Any] = {"mode": "fp32", "numel": 100, "launches": 2, "bytes_loaded": 16.0, "bytes_stored": 12.0}
    return f"==PROF== Connected to process 1\n{json.dumps(mode)}\n==PROF== Disconnected\n{table.getvalue()}"


def test_counters_are_those_of_each_modes_last_launch() -> None:
    (found,) = gpu_check.read_counters(profile(launches=2))
    assert (found["read_per_element"], found["written_per_element"]) == (16.0, 12.0)
    assert found["gb_per_s"] == 4.0  # 2800 bytes in 700 ns
    assert (found["dram_percent_of_peak"], found["registers"]) == (91.5, 38)
    row = counted_steps.table({"rows": [found]}).splitlines()[-1]
    assert row == "| fp32 | 16 | 16 | 12 | 12 | 4 | 91.5 | 38 | 70.25 |"
    assert (found["mode"], found["bytes_loaded"]) == ("fp32", 16.0)


@pytest.mark.parametrize("text", [profile(launches=3), profile(launches=1), ""], ids=["more", "less", "nothing"])
def test_launches_that_are_not_accounted_for_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="launches were counted"):
        gpu_check.read_counters(text)


def test_wheels_are_staged_beside_the_packages(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried/__init__.py", "answer = 42\n")
    gpu_check.stage(tmp_path / "staged", wheels)
    command = [
        sys.executable,
        "-P",
        "-c",
        "import carried, adax_triton.bench; print(carried.answer, adax_triton.__file__)",
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "staged")}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["42", str(tmp_path / "staged" / "adax_triton" / "__init__.py")]


def test_step_benchmark_gets_the_time_that_is_left(tmp_path: Path) -> None:
    budgets = {}
    for left in (10_000.0, 200.0, 1.0):
        command = gpu_check.benchmark("step", tmp_path / "step.json", interpret=False, seconds=left).command
        budgets[left] = float(command[command.index("--budget") + 1])
    assert budgets == {10_000.0: 420.0, 200.0: 160.0, 1.0: 1.0}


def test_all_parts_take_less_than_nine_minutes_and_leave_some_for_the_step_benchmark() -> None:
    assert {*gpu_check.LIMITS_S, "step"} == set(gpu_check.PARTS)
    assert gpu_check.ALL_S < 540
    assert gpu_check.ALL_S - sum(gpu_check.LIMITS_S.values()) >= 100


def test_options_of_the_benchmarks_are_theirs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for interpret, name in itertools.product((False, True), ("host", "scale", "train", "step")):
        part = gpu_check.benchmark(name, tmp_path / "result.json", interpret, 100.0)
        parser = argparse.ArgumentParser()
        {"host": host, "scale": scale, "train": train, "step": step_report}[name].add_arguments(parser)
        parsed = parser.parse_args(part.command[len(gpu_check.COMMAND_LINE) + 2 :])
        assert parsed.json == tmp_path / "result.json"


def test_tests_of_the_kernel_come_first_and_those_of_deepspeed_not_at_all() -> None:
    found = gpu_check.gpu_tests()
    assert found[0] == "test_kernel.py"
    assert {"test_optimizer_contract.py", "test_low_memory_limits.py", "test_checkpoint.py"} <= set(found)
    assert not {"test_deepspeed.py", "test_schedule.py", "test_gpu_check.py", "test_doctor.py"} & set(found)
    assert len(found) == len(set(found))
    assert all((ROOT / "tests" / name).exists() for name in found)


def test_sanitized_tests_exist() -> None:
    name, words = gpu_check.SANITIZED
    text = (ROOT / "tests" / name).read_text()
    assert all(word in text for word in words.split(" or "))
