"""The sums of rows behind telemetry: against torch in float64; and what the compilers make of them, without a GPU.

As a script, with TRITON_INTERPRET unset: python test_telemetry_rows.py TARGET. It prints facts as JSON.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
COUNTS = (0, 1, 511, 512, 513, 5000)
LAUNCHES = ((1, 1), (16, 1), (17, 2), (4096, 16), (5000, 128))  # rows and runs


def run_rows(counts: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows, the sums found, and those of torch, for runs of so many rows each."""
    from adax_triton.kernels.telemetry import add_rows

    from adax_triton.device_tables import run_table

    rows = torch.rand(sum(counts), 5, generator=torch.Generator().manual_seed(len(counts))).to(device)
    around = torch.full((len(counts) + 2, 5), -7.0, device=device)
    add_rows(rows, run_table(counts).to(device), around[1:-1])
    assert bool((around[[0, -1]] == -7.0).all())
    parts = rows.double().split(list(counts))
    return (
        rows,
        around[1:-1],
        torch.stack([part.sum(0) for part in parts]) if parts else torch.zeros(0, 5, dtype=torch.float64),
    )


@pytest.mark.parametrize("count", COUNTS)
def test_one_run_of_any_length_is_added_up(count: int, device: torch.device) -> None:
    _, found, expected = run_rows([count], device)
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("counts", [COUNTS, (0, 0), (0, 3, 0, 0, 2, 0), (1,) * 70, ()], ids=str)
def test_runs_are_told_apart(counts: tuple[int, ...], device: torch.device) -> None:
    _, found, expected = run_rows(counts, device)
    assert torch.allclose(found.double(), expected.to(device), rtol=1e-6, atol=0.0)


def test_order_of_the_sum_is_fixed(device: torch.device) -> None:
    assert torch.equal(run_rows([5000, 3], device)[1], run_rows([5000, 3], device)[1])


def test_a_number_that_is_not_finite_stays_in_its_run_and_column(device: torch.device) -> None:
    from adax_triton.kernels.telemetry import add_rows

    rows = torch.ones(600, 5, device=device)
    rows[3, 0], rows[599, 4] = float("nan"), float("inf")
    sums = torch.empty(2, 5, device=device)
    add_rows(rows, torch.tensor([(0, 520), (520, 80)], device=device), sums)
    assert str(sums.tolist()) == str([[float("nan"), *[520.0] * 4], [*[80.0] * 4, float("inf")]])


def audit(target_name: str) -> dict[str, Any]:
    """Return the facts of the one variant that all sizes share, compiled for a target."""
    import code_audit
    from adax_triton.kernels.telemetry import add_rows, add_rows_kernel

    target = code_audit.TARGETS[target_name]
    code_audit.driver.set_active(code_audit.AbsentDevice(target))

    def launch() -> None:
        for rows, runs in LAUNCHES:
            add_rows(torch.zeros(rows, 5), torch.zeros(runs, 2, dtype=torch.int64), torch.zeros(runs, 5))

    launches = code_audit.recorded(launch)
    kernel = code_audit.compile_launch(add_rows_kernel, launches[0], target)
    facts: dict[str, Any] = {"keys": sorted({launch.key for launch in launches}), "recorded": len(launches)}
    if target.backend == "cuda":
        cubin = kernel.asm["cubin"]
        architecture = re.search(r"\.target (\w+)", kernel.asm["ptx"])[1].replace("sm_", "SM")
        (operations,) = code_audit.disassemble([code_audit.machine_code(cubin)], architecture)
        facts["registers"], stack = code_audit.resources(cubin)
        facts["spills"] = stack + sum(name.startswith(("LDL", "STL")) for name in operations)
        return {**facts, "atomics": sum(name.startswith(("ATOM", "RED.")) for name in operations)}
    code = kernel.asm["amdgcn"]
    spills = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    facts["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1])
    facts["spills"] = sum(int(re.search(rf"\.{name}:\s+(\d+)", code)[1]) for name in spills)
    return {**facts, "atomics": len(re.findall(r"^\s+(?:global|buffer|flat)_atomic", code, re.MULTILINE))}


@pytest.mark.parametrize("target", TARGETS)
def test_one_variant_serves_all_sizes_without_spills_and_atomics(target: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    run = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), target],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    facts = json.loads(run.stdout)
    assert facts["recorded"] == len(LAUNCHES) and len(facts["keys"]) == 1
    assert (facts["spills"], facts["atomics"]) == (0, 0)
    assert facts["registers"] <= 64  # of 1024 threads an SM of 65536 then holds all


if __name__ == "__main__":
    json.dump(audit(sys.argv[1]), sys.stdout)
