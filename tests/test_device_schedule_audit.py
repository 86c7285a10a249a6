"""What the compilers make of the schedule kernel, for four GPU architectures and without a GPU.

As a script, with TRITON_INTERPRET unset: python test_device_schedule_audit.py TARGET. It prints facts as JSON.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SIZES = (0, 1, 16, 17, 127, 128, 4096)


def audit(target_name: str) -> dict[str, Any]:
    """Return the facts of the one variant that all sizes and values share, compiled for a target."""
    import code_audit
    from adax_triton.kernels import schedule as kernel_module

    target = code_audit.TARGETS[target_name]
    code_audit.driver.set_active(code_audit.AbsentDevice(target))

    def launch() -> None:
        for n, value in zip(SIZES, (0.0, 1.0, 16.0, 1e-3, float("nan"), float("inf"), -1.0), strict=True):
            rows, scalars = torch.full((n, 3), n), torch.full((n, 10), value)
            groups = torch.full((1 + n, 14), value, dtype=torch.float64)
            inputs = torch.full((4,), value, dtype=torch.float64)
            kernel_module.prepare_step(rows, groups, inputs, scalars, torch.full((3,), value))

    launches = code_audit.recorded(launch)
    kernel = code_audit.compile_launch(kernel_module.prepare_step_kernel, launches[0], target)
    facts = {"keys": sorted({launch.key for launch in launches}), "recorded": len(launches)}
    facts["signature"] = launches[0].signature
    if target.backend == "cuda":
        cubin, ptx = kernel.asm["cubin"], kernel.asm["ptx"]
        architecture = re.search(r"\.target (\w+)", ptx)[1].replace("sm_", "SM")
        (operations,) = code_audit.disassemble([code_audit.machine_code(cubin)], architecture)
        facts["registers"], stack = code_audit.resources(cubin)
        facts["spills"] = stack + sum(name.startswith(("LDL", "STL")) for name in operations)
        facts["unresolved"] = re.findall(r"\.extern \.func.*", ptx)
    else:
        code = kernel.asm["amdgcn"]
        spills = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        facts["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1])
        facts["spills"] = sum(int(re.search(rf"\.{name}:\s+(\d+)", code)[1]) for name in spills)
        facts["unresolved"] = re.findall(r"s_swappc_b64.*|__ocml_\w+", code)
    return {**facts, "shared": kernel.metadata.shared}


@pytest.fixture(scope="module", params=TARGETS)
def facts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The facts of a target, compiled afresh in a process where Triton is not interpreting."""
    folder = tmp_path_factory.mktemp("audit")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    run = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), request.param],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def test_one_variant_serves_any_number_of_tensors_and_any_values(facts: dict[str, Any]) -> None:
    assert facts["recorded"] == len(SIZES)
    assert len(facts["keys"]) == 1
    assert facts["signature"]["n"] == "i64"


def test_all_is_kept_in_registers(facts: dict[str, Any]) -> None:
    assert (facts["spills"], facts["shared"]) == (0, 0)


def test_exponential_and_logarithm_are_linked_in(facts: dict[str, Any]) -> None:
    assert facts["unresolved"] == []


if __name__ == "__main__":
    json.dump(audit(sys.argv[1]), sys.stdout)
