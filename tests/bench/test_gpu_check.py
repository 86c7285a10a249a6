"""Test the GPU machine check with dry runs and failing parts.

Parts fail, hang or have no profiler.
"""

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
from unittest.mock import ANY

import pytest
from adax_triton.bench import gpu_check, host, norm
from adax_triton.bench.gpu_check import CheckPart, Runner
from adax_triton.bench.harness.modes import MODES
from adax_triton.bench.launch_variants import command as launch_variants
from adax_triton.bench.report import command as report
from adax_triton.bench.step import command as step_report
from adax_triton.bench.step import counted_steps
from adax_triton.bench.training import cases as train_cases
from adax_triton.bench.training import command as train
from paths import ROOT

PROFILED = {
    "dram__bytes_read.sum": "1,600",
    "dram__bytes_write.sum": "1,200",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "91.5",
    "gpu__time_duration.sum": "700",
    "launch__registers_per_thread": "38",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "70.25",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree without git, not installed."""
    folder = tmp_path_factory.mktemp("bare") / "checkout"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "build"))
    return folder


def dry_run(checkout: Path, out: Path, *words: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Run a call in the interpreter; return summary and each part's output."""
    command = [sys.executable, str(checkout / "bench" / "gpu_check.py"), "--interpret", *words]
    environment = {**os.environ, "OUT": str(out), "COMMIT": "abc123"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "failures.txt").read_text() == ""
    assert len(list(out.iterdir())) <= 8
    summary = json.loads((out / "summary.json").read_text())
    assert summary["environment"]["commit"] == "abc123"
    log = (out / "log.txt").read_text()
    assert log == done.stdout
    return summary, dict(zip(summary["parts"], re.split(r"^== .*\n", log, flags=re.MULTILINE)[1:], strict=False))


# This suite already runs the kernel tests. The dry runs test staging and every command.
def test_dry_run_of_the_first_call(checkout: Path, tmp_path: Path) -> None:
    summary, output = dry_run(
        checkout, tmp_path, "--call", "1", "--tests", "step/test_host_work.py", "update/test_coefficients.py"
    )
    assert {name: entry["rc"] for name, entry in summary["parts"].items()} == dict.fromkeys(gpu_check.LIMITS_S[1], 0)
    assert "agrees with the float64 reference" in output["doctor"]
    assert output["compile"].startswith("fp32: ")
    assert " passed" in output["tests"] and "deselected" in output["tests"]
    (result,) = tmp_path.glob("*-variants.json")
    assert json.loads(result.read_text())["environment"]["commit"] == "abc123"


def test_dry_run_of_the_second_call(checkout: Path, tmp_path: Path) -> None:
    # "compile" already runs in the first call. "racecheck" runs the command of "memcheck" under another tool.
    assert gpu_check.tests_part("racecheck", [], True).command == gpu_check.tests_part("memcheck", [], True).command
    run = [name for name in gpu_check.LIMITS_S[2] if name not in ("compile", "racecheck")]
    summary, output = dry_run(checkout, tmp_path, "--call", "2", "--only", *run)
    parts = dict(summary["parts"])
    assert parts.pop("tests") == {"left_out": "no files are named by --tests"}
    assert {name: entry["rc"] for name, entry in parts.items()} == dict.fromkeys(set(run) - {"tests"}, 0)
    assert " passed" in output["memcheck"]
    modes = [json.loads(line) for line in output["counters"].splitlines() if line[0] == "{"]
    assert [mode["mode"] for mode in modes] == list(MODES)
    assert (modes[0]["launches"], modes[0]["bytes_loaded"], modes[0]["bytes_stored"]) == (2, 16.0, 12.0)
    results = {path.stem.rpartition("-")[2]: path for path in tmp_path.glob("*.json") if path.name != "summary.json"}
    assert results.keys() == {"host", "norm", "train", "step"}
    for kind, path in results.items():
        assert report.read(path)[0] == kind
        assert json.loads(path.read_text())["environment"]["commit"] == "abc123"
        assert report.TABLES[kind](json.loads(path.read_text())) in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("broken", gpu_check.REQUIRED_PARTS)
def test_parts_are_skipped_after_a_required_part_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def part(name: str, *_: Any) -> CheckPart:
        return CheckPart(name, ("-c", "import sys; sys.exit(1)" if name == broken else 'print(\'{"device": "none"}\')'))

    monkeypatch.setattr(gpu_check, "part_of", part)
    arguments = argparse.Namespace(call=1, interpret=True, tests=None, only=None)
    entries = gpu_check.check(arguments, tmp_path, tmp_path)["parts"]
    run = list(gpu_check.LIMITS_S[1])[: 1 + gpu_check.REQUIRED_PARTS.index(broken)]
    assert [entries.pop(name)["rc"] for name in run] == [0] * (len(run) - 1) + [1]
    assert entries and all(entry == {"left_out": f"{broken} failed"} for entry in entries.values())
    assert f"== {broken}: exit code 1" in (tmp_path / "failures.txt").read_text()


def pytest_on(folder: Path, text: str, *words: str, **variables: str) -> tuple[list[str], dict[str, Any]]:
    """Write a test file next to conftest.py; return pytest command and options."""
    tests = folder / "tests"
    shutil.copytree(ROOT / "tests" / "support", tests / "support")
    shutil.copy(ROOT / "tests" / "conftest.py", tests)
    (tests / "test_b.py").write_text(text)
    environment = {**os.environ, **variables, "PYTHONPATH": str(tests / "support")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words, str(tests)]
    return command, {"env": environment, "cwd": folder, "capture_output": True, "text": True, "timeout": 60}


def test_failures_are_written_before_the_run_ends(tmp_path: Path) -> None:
    text = (
        "import os\n"
        "def test_a(device): assert 1 == 2\n"
        "def test_b(device):\n"
        "    failures = open(os.environ['FAILURES']).read()\n"
        "    assert 'no_such_module' in failures and 'assert 1 == 2' in failures\n"
        "    os._exit(9)\n"
    )
    failures = tmp_path / "failures.txt"
    failures.touch()
    command, options = pytest_on(tmp_path, text, "--continue-on-collection-errors", FAILURES=str(failures))
    (tmp_path / "tests" / "test_a.py").write_text("import no_such_module\n")
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 9, done.stdout  # the second test found the failures in the file and ended the process
    for text in ("No module named 'no_such_module'", "assert 1 == 2"):
        assert text in failures.read_text()
    for failure in re.split(r"^(?=FAILED )", failures.read_text(), flags=re.MULTILINE):
        assert failure in done.stdout


def test_only_gpu_tests_are_run_on_request(tmp_path: Path) -> None:
    text = (
        "import pytest\n"
        "def test_host(): pass\n"
        "def test_on_device(device): pass\n"
        "def test_both(backend): pass\n"
        "def test_compiled(device, native_cpu): pass\n"
        "@pytest.mark.gpu\n"
        "def test_marked(): pass\n"
    )
    command, options = pytest_on(tmp_path, text, "--collect-only", "-q", ONLY_GPU_TESTS="1")
    done = subprocess.run(command, check=True, **options)
    found = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    assert found == ["test_on_device", "test_both[kernel]", "test_marked"]


def is_running(process: str) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_hanging_part_is_killed_with_its_children(tmp_path: Path) -> None:
    child = (
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(__import__('os').getpid())); __import__('time').sleep(60)"
    )
    program = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    entry, output = Runner(tmp_path, tmp_path, False).run(CheckPart("doctor", ("-c", program)), 4.0)
    assert entry["rc"] is None
    assert "4 s" in entry["stopped"]
    assert entry["seconds"] < 30
    assert output == "begun\n"
    assert (tmp_path / "log.txt").read_text() == "== doctor\nbegun\n== doctor: after its limit of 4 s\n"
    assert (tmp_path / "failures.txt").read_text() == "== doctor: after its limit of 4 s\nbegun\n"
    deadline = time.monotonic() + 30
    while is_running((tmp_path / "child").read_text()):  # killing takes time on a busy machine
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_exit_code_and_errors_are_recorded(tmp_path: Path) -> None:
    program = "import sys; print('out'); sys.stdout.flush(); sys.exit('what was wrong')"
    entry, output = Runner(tmp_path, tmp_path, False).run(CheckPart("tests", ("-c", program)), 60.0)
    assert entry["rc"] == 1
    assert output == "out\nwhat was wrong\n"
    assert (tmp_path / "log.txt").read_text() == f"== tests\n{output}== tests: exit code 1\n"
    assert (tmp_path / "failures.txt").read_text() == f"== tests: exit code 1\n{output}"


def test_scripts_import_their_siblings_and_the_packages(tmp_path: Path) -> None:
    (tmp_path / "sibling.py").write_text("answer = 42\n")
    (tmp_path / "again.py").write_text("import adax_triton.kernels, sibling; print(sibling.answer)\n")
    script = tmp_path / "script.py"
    script.write_text("import subprocess, sys; sys.exit(subprocess.call([sys.executable, sys.argv[1]]))\n")
    gpu_check.stage(tmp_path / "staged", None)
    runner = Runner(tmp_path, tmp_path / "staged", False)
    for words in ((str(tmp_path / "again.py"),), (str(script), str(tmp_path / "again.py"))):
        assert runner.run(CheckPart("tests", words), 60.0) == ({"limit_s": 60, "rc": 0, "seconds": ANY}, "42\n")


def test_part_without_its_profiler_is_skipped(tmp_path: Path) -> None:
    part = CheckPart("counters", ("-c", "print('bare')"), ("no-such-profiler", "--csv"))
    entry, _ = Runner(tmp_path, tmp_path, False).run(part, 60.0)
    assert entry == {"left_out": "no-such-profiler is not on the PATH"}
    assert Runner(tmp_path, tmp_path, True).run(part, 60.0)[0]["rc"] == 0


def test_profiler_runs_the_command(tmp_path: Path) -> None:
    profiler = tmp_path / "profiler"
    profiler.write_text('#!/bin/sh\necho "profiling with $1"\nshift\nexec "$@"\n')
    profiler.chmod(0o755)
    part = CheckPart("counters", ("-c", "print('bare')"), (str(profiler), "--csv"))
    entry, output = Runner(tmp_path, tmp_path, False).run(part, 60.0)
    assert (entry["rc"], output) == (0, "profiling with --csv\nbare\n")


def profile(launches: int) -> str:
    """Return the output of ncu and its program for 100 elements.

    The first launch is warm-up.
    """
    table = io.StringIO()
    writer = csv.writer(table, quoting=csv.QUOTE_ALL)
    writer.writerow(["ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value"])
    for number in range(launches):
        for name, value in PROFILED.items():
            writer.writerow([number, "adax_step_kernel", name, "byte", value if number == launches - 1 else "1"])
    mode: dict[str, Any] = {"mode": "fp32", "numel": 100, "launches": 2, "bytes_loaded": 16.0, "bytes_stored": 12.0}
    mode |= {"state_bytes": 8.0, "allocated_per_element": 8.01}
    return f"==PROF== Connected to process 1\n{json.dumps(mode)}\n==PROF== Disconnected\n{table.getvalue()}"


def test_only_counters_of_the_last_launch_are_read() -> None:
    (found,) = gpu_check.read_counters(profile(launches=2))
    assert (found["read_per_element"], found["written_per_element"]) == (16.0, 12.0)
    assert found["gb_per_s"] == 4.0  # 2800 bytes in 700 ns
    assert (found["dram_percent_of_peak"], found["registers"]) == (91.5, 38)
    row = counted_steps.table({"rows": [found]}).splitlines()[-1]
    assert row == "| fp32 | 16 | 16 | 12 | 12 | 4 | 91.5 | 38 | 70.25 | 8 | 8.01 |"
    assert (found["mode"], found["bytes_loaded"]) == ("fp32", 16.0)


@pytest.mark.parametrize("text", [profile(launches=3), profile(launches=1), ""], ids=["more", "less", "nothing"])
def test_wrong_number_of_launches_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"ncu counted \d launches, expected"):
        gpu_check.read_counters(text)


def test_wheels_are_staged_next_to_the_packages(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried/__init__.py", "answer = 42\n")
    gpu_check.stage(tmp_path / "staged", wheels)
    program = "import carried, adax_triton.bench; print(carried.answer, adax_triton.__file__)"
    entry, output = Runner(tmp_path, tmp_path / "staged", False).run(CheckPart("doctor", ("-c", program)), 60.0)
    assert output.split() == ["42", str(tmp_path / "staged" / "adax_triton" / "__init__.py")]
    assert entry["rc"] == 0


def test_benchmarks_end_before_their_limit(tmp_path: Path) -> None:
    for name, left, expected in (("step", 190.0, 165.0), ("variants", 90.0, 82.0), ("train", 1.0, 1.0)):
        command = gpu_check.benchmark(name, tmp_path / "step.json", interpret=False, seconds=left).command
        assert float(command[command.index("--budget") + 1]) == expected


def test_each_call_has_time_for_its_parts() -> None:
    assert gpu_check.CALL_S == {1: 240.0, 2: 420.0}
    # A limit is the worst-case time of a part. Even in the worst case the first call has time for tests and variants.
    assert sum(gpu_check.LIMITS_S[1].values()) - 60 <= gpu_check.CALL_S[1]
    measured = ("device", "compile", "counters", "host", "norm", "step")  # even in the worst case these have time
    assert sum(gpu_check.LIMITS_S[2][name] for name in measured) <= gpu_check.CALL_S[2]


def test_benchmarks_accept_their_options(tmp_path: Path) -> None:
    modules = {"host": host, "norm": norm, "train": train, "step": step_report, "variants": launch_variants}
    for interpret, (name, module) in itertools.product((False, True), modules.items()):
        part = gpu_check.benchmark(name, tmp_path / "result.json", interpret, 100.0)
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        words = part.command[2:] if name == "variants" else part.command[len(gpu_check.COMMAND_LINE) + 2 :]
        assert parser.parse_args(words).json == tmp_path / "result.json"


def test_trained_cases_are_named_exactly() -> None:
    options = gpu_check.OPTIONS["train"]
    only = options[options.index("--only") + 1 :]
    found = train_cases.cases(train.DEFAULTS["cuda"]["dtype"])
    assert [case.name for case in train_cases.choose(found, list(only))] == list(only)


def test_kernel_tests_run_first_and_deepspeed_tests_are_excluded() -> None:
    found = gpu_check.gpu_tests()
    assert found[0] == "step/test_kernel.py"
    assert {
        "optimizer/test_optimizer_contract.py",
        "state/test_low_memory_limits.py",
        "state/test_checkpoint.py",
    } <= set(found)
    assert not {
        "deepspeed_runs/test_deepspeed.py",
        "update/test_coefficients.py",
        "bench/test_gpu_check.py",
        "project/test_doctor.py",
    } & set(found)
    assert len(found) == len(set(found))
    assert all((ROOT / "tests" / name).exists() for name in found)


def test_sanitized_tests_exist() -> None:
    for name, words in gpu_check.SANITIZED.items():
        text = (ROOT / "tests" / name).read_text()
        assert all(word in text for word in words.split(" or "))
