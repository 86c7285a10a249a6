"""Bytes that a step under ZeRO moves, counted in its own process.

Oracles: formulas for DeepSpeed's own passes, the limits in bench/zero_passes/passes.py for fused steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from adax_triton.bench.zero_passes.passes import AUTO, CASES, OFF, PARTIAL
from adax_triton.bench.zero_passes.traffic import STEP, Traffic

from adax_triton import AdaX, ExternalGrads

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.deepspeed

# Bytes per parameter of an unfused step, including the 28 of AdaX. They exceed the limits of fused steps; otherwise the
# limits could not detect a step that is not fused.
UNFUSED = {
    "ZeRO 1, bf16": 74,
    "ZeRO 2, bf16": 74,
    "ZeRO 2, bf16, overflow checked": 74,
    "ZeRO 2, fp16": 74,
    "ZeRO 2, fp32": 72,
    "ZeRO 3, bf16": 70,
    "ZeRO 3, fp16": 78,
    "BF16_Optimizer": 50,
    "ZeRO 2, bf16, CPU offload": 46,
    "ZeRO 3, bf16, CPU offload": 42,
}
WIDTH = "192"  # DeepSpeed steps layers of this size separately, like large layers


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("passes") / "result.json"
    arguments = ["--width", WIDTH, "--repetitions", "0", "--out", str(out)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "adax_triton.bench.zero_passes.passes", *arguments],
        env=environment,
        cwd=out.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    assert "| ZeRO 3, bf16 |" in done.stdout
    return json.loads(out.read_text())["bytes"]


@pytest.mark.parametrize("name", CASES)
def test_fused_step_stays_within_its_byte_limit(measured: dict[str, Any], name: str) -> None:
    case, totals = CASES[name], {mode: sum(operations.values()) for mode, operations in measured[name].items()}
    assert totals[OFF] == pytest.approx(UNFUSED[name], abs=0.5)
    assert totals[AUTO] <= case.ceiling
    if case.partial_ceiling is not None:
        assert totals[AUTO] < totals[PARTIAL] <= case.partial_ceiling
    # The step itself: gradient, weights and two moments read, weights and moments written.
    assert measured[name][OFF][STEP] == pytest.approx(28, abs=0.1)


def test_trace_counts_reads_and_writes() -> None:
    tensor, half = torch.ones(2048), torch.ones(2048, dtype=torch.bfloat16)
    with Traffic() as traffic:
        tensor.mul_(2.0)  # 4 + 4
        half.copy_(tensor)  # 4 + 2
        torch.cat([half, half])  # 2 + 2, twice
        half.float()  # 2 + 4
        tensor.view(2, -1).narrow(0, 0, 1)  # nothing
        tensor.zero_()  # 4
        torch._foreach_norm([half], 2)  # 2
        torch.ones(8).mul_(2.0)  # too small
    counted = {name: count / 2048 for name, count in traffic.bytes.items() if count}
    assert counted == {"mul_": 8, "copy_": 6, "cat": 8, "_to_copy": 6, "zero_": 4, "_foreach_norm": 2}


def test_trace_counts_a_step_by_its_formula() -> None:
    param, low_precision_copy = torch.nn.Parameter(torch.zeros(4096)), torch.zeros(4096, dtype=torch.float16)
    optimizer = AdaX([param])
    optimizer.set_external_grads([ExternalGrads(param, [low_precision_copy.clone()], low_precision_copy)])
    with Traffic() as traffic:
        optimizer.step()
    assert traffic.bytes[STEP] == 4096 * (2 + 4 + 4 + 4 + 2 + 4 + 4 + 4)
