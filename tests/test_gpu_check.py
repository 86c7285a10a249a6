"""The command for a GPU machine: its dry run, and its parts where something is absent, hangs or is odd."""

import csv
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from adax_triton.bench import gpu_check
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
    command = [sys.executable, str(ROOT / "bench" / "gpu_check.py"), "--interpret", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--tests", "test_schedule.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agrees with the float64 reference" in (tmp_path / "doctor.txt").read_text()
    for name in ("tests.txt", "sanitizer.txt"):
        assert " passed" in (tmp_path / name).read_text()
    modes = [json.loads(line) for line in (tmp_path / "counters.txt").read_text().splitlines() if line[0] == "{"]
    assert {"mode": "fp32", "numel": 5000, "launches": 2, "bytes_loaded": 16.0, "bytes_stored": 12.0} in modes
    (workload,) = json.loads((tmp_path / "step.json").read_text())["workloads"]
    assert workload["providers"]["adax_triton.AdaXW"]["median_ms"] > 0
    assert "| adax_triton.AdaXW |" in (tmp_path / "step.md").read_text()
    parts = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert {name: entry["rc"] for name, entry in parts.items()} == dict.fromkeys(
        ("doctor", "tests", "sanitizer", "counters", "step"), 0
    )


def test_part_that_hangs_is_stopped_with_all_it_started(tmp_path: Path) -> None:
    child = (
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(__import__('os').getpid())); __import__('time').sleep(60)"
    )
    program = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    entry = gpu_check.run(Part("doctor", "doctor.txt", ("-c", program)), dict(os.environ), tmp_path, 4.0, False)
    assert entry["rc"] is None
    assert "4 s" in entry["stopped"]
    assert entry["seconds"] < 30
    assert (tmp_path / "doctor.txt").read_text() == "begun\n"
    status = Path(f"/proc/{(tmp_path / 'child').read_text()}/status")
    assert not status.exists() or "zombie" in status.read_text()


def test_exit_code_and_errors_are_kept(tmp_path: Path) -> None:
    program = "import sys; print('out'); sys.stdout.flush(); sys.exit('what was wrong')"
    entry = gpu_check.run(Part("tests", "tests.txt", ("-c", program)), dict(os.environ), tmp_path, 60.0, False)
    assert entry["rc"] == 1
    assert (tmp_path / "tests.txt").read_text() == "out\nwhat was wrong\n"


def test_profiler_that_is_absent_is_left_out(tmp_path: Path) -> None:
    part = Part("counters", "counters.txt", ("-c", "print('bare')"), ("no-such-profiler", "--csv"))
    entry = gpu_check.run(part, dict(os.environ), tmp_path, 60.0, interpret=False)
    assert entry == {"left_out": "no-such-profiler is not on the PATH"}
    assert gpu_check.run(part, dict(os.environ), tmp_path, 60.0, interpret=True)["rc"] == 0


def test_profiler_runs_the_command(tmp_path: Path) -> None:
    profiler = tmp_path / "profiler"
    profiler.write_text('#!/bin/sh\necho "profiling with $1"\nshift\nexec "$@"\n')
    profiler.chmod(0o755)
    part = Part("counters", "counters.txt", ("-c", "print('bare')"), (str(profiler), "--csv"))
    assert gpu_check.run(part, dict(os.environ), tmp_path, 60.0, interpret=False)["rc"] == 0
    assert (tmp_path / "counters.txt").read_text() == "profiling with --csv\nbare\n"


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


def test_benchmark_gets_the_time_that_is_left(tmp_path: Path) -> None:
    budgets = {}
    for left in (10_000.0, 200.0, 1.0):
        command = gpu_check.step_part(tmp_path, interpret=False, seconds=left).command
        budgets[left] = float(command[command.index("--budget") + 1])
    assert budgets == {10_000.0: 420.0, 200.0: 160.0, 1.0: 1.0}


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
