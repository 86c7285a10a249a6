"""The benchmark: its gate, its numbers, and the GPU check's dry run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adax_triton.bench import providers, step, step_report, workloads

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def provider(name: str) -> providers.Provider:
    return next(provider for provider in providers.PROVIDERS if provider.name == name)


@pytest.mark.parametrize("name", ["adax_triton.AdaXW", "adax_triton.AdamW", "torch AdamW fused", "torch AdamW foreach"])
def test_gate_passes_what_is_right(name: str) -> None:
    step.check(provider(name), CPU)


def test_gate_rejects_what_is_wrong() -> None:
    wrong = providers.Provider("wrong", "adax", providers.ADAX_RULE, provider("torch AdamW fused").build)
    with pytest.raises(step.WrongResultError, match="AdaX-W"):
        step.check(wrong, CPU)
    *_, (_, rows) = step.measure([wrong], [(1000,)], CPU, rounds=2)
    assert "WrongResultError" in rows["wrong"]["absent"]
    assert "median_ms" not in rows["wrong"]
    assert "median_ms" in rows["copy"]


def test_bandwidth_follows_from_time_and_formula() -> None:
    summary = step._summary([0.5, 1.0, 2.0], 28 * 10**9, copy_bandwidth=56e9)
    assert summary["median_ms"] == 1000.0
    assert summary["gb_per_s"] == 28.0
    assert summary["copy_share"] == 0.5


def test_gpt2_small_has_its_tensors_and_weights() -> None:
    shapes = workloads.gpt2()
    assert len(shapes) == 148
    assert sum(torch.Size(shape).numel() for shape in shapes) == 124_439_808


def test_report_renders_every_row(tmp_path: Path) -> None:
    result = step_report.run({"flat 1,000": workloads.flat(1000)}, CPU, rounds=2, only=["fused", "AdaXW"])
    text = step_report.table(json.loads(json.dumps(result)))
    assert result["environment"]["commit"] in text
    for name in ("adax_triton.AdaXW", "torch AdamW fused", "copy"):
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert row.count("|") == 9
    assert result["workloads"][0]["providers"]["adax_triton.AdaXW"]["ours_over_this"] == 1.0


def test_unknown_provider_is_named() -> None:
    with pytest.raises(ValueError, match="no-such-thing"):
        step_report.run({"flat": workloads.flat(10)}, CPU, rounds=1, only=["no-such-thing"])


def test_gpu_check_dry_run_leaves_its_files(tmp_path: Path) -> None:
    # Tests of the kernel run in this suite already; the dry run shows that staging, doctor and benchmark work.
    command = [sys.executable, str(ROOT / "bench" / "gpu_check.py"), "--interpret", "--out", str(tmp_path), "--tests"]
    command += ["test_kernel.py", "test_optimizer_contract.py", "test_tensor_kinds.py", "test_checkpoint.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agrees with the float64 reference" in (tmp_path / "doctor.txt").read_text()
    assert " passed" in (tmp_path / "tests.txt").read_text()
    (workload,) = json.loads((tmp_path / "step.json").read_text())["workloads"]
    assert workload["providers"]["adax_triton.AdaXW"]["median_ms"] > 0
    assert "| adax_triton.AdaXW |" in (tmp_path / "step.md").read_text()
