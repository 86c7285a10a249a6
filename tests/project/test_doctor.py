"""Test `adax-triton doctor` in a new process, and its checks in-process."""

import os
import subprocess
import sys

import pytest
import torch

from adax_triton.cli import doctor

PROGRAM = "import sys; from adax_triton.cli.main import main; sys.exit(main())"


def adax_triton(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-c", PROGRAM, *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_doctor_reports_and_passes() -> None:
    done = adax_triton("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    for part in (
        f"torch       {torch.__version__}",
        "cpu",
        "float32",
        "agrees with the float64 reference",
        "DeepSpeed",
    ):
        assert part in done.stdout
    if not torch.cuda.is_available():
        assert "native    the fused kernel, compiled for" in done.stdout
        assert "the native kernel on cpu" in done.stdout
        assert "interpreter agrees" in done.stdout


def test_doctor_reports_the_fallback_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = adax_triton("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CPU tensors use the reference in PyTorch" in done.stdout
    assert done.stdout.count("no-such-compiler") == 1


def test_doctor_reports_a_cache_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    done = adax_triton("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "/proc/none/adax_triton cannot be written (" in done.stdout
    assert "so each process compiles again; set XDG_CACHE_HOME" in done.stdout


def test_doctor_needs_no_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ok, message = doctor.triton_check()
    assert ok and "pip install numpy" in message


@pytest.mark.parametrize("cuda", [False, True])
def test_doctor_needs_triton_only_with_a_gpu(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "has_triton", lambda: False)
    monkeypatch.setattr("adax_triton.step.backend.has_triton", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    ok, message = doctor.triton_check()
    assert ok == (not cuda) and "pip install triton" in message
    backend, reason = doctor.explain_backend(torch.device("cuda", 0), torch.float32)
    assert backend == "triton" and reason.startswith("absent: ") and "run `pip install triton`" in reason
    backend, reason = doctor.explain_backend(torch.device("cpu"), torch.float32)  # with TRITON_INTERPRET=1
    assert backend == "triton" and reason.endswith("or unset TRITON_INTERPRET")


def test_doctor_fails_when_the_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(doctor, "_largest_error", lambda device: 1e-3)
    assert doctor.main() == 1
    assert "DISAGREES" in capsys.readouterr().out


def test_doctor_fails_when_the_kernel_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_error(device: torch.device) -> float:
        raise RuntimeError("no driver")

    monkeypatch.setattr(doctor, "_largest_error", raise_error)
    for check in (doctor.native_check, doctor.triton_check):
        ok, message = check()
        assert not ok
        assert "does not run: RuntimeError: no driver" in message


def test_unknown_command_is_refused() -> None:
    done = adax_triton("operate")
    assert done.returncode == 2
    assert "operate" in done.stderr
