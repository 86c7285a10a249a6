"""Count how often Triton compiles in steps with changing numbers.

Each key of its cache is one compilation.

Usage, with TRITON_INTERPRET unset: python test_compiled_variants.py
Prints the number of keys of each case as JSON.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from paths import SUPPORT

pytest.importorskip("triton")

# Steps of the case "capturable", which launches every kernel, and of the other cases. In 224 steps every argument takes
# every number.
STEPS, FEWER_STEPS = 1000, 224
# Triton specializes on 0, 1 and multiples of 16, unless an argument is listed in do_not_specialize.
NUMBERS = (0, 1, 16, 1e-3, 48, 2, 1600, 0.5)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "8bit_v16": {"states": "8bit_v16", "master_weights": "24bit"},
    "scaled and clipped": {"max_grad_norm": 1.0},
    "capturable": {"capturable": True, "telemetry": True, "max_grad_norm": 1.0},
}
KERNELS = {
    "plain": {"adax_step_kernel"},
    "8bit_v16": {"adax_step_kernel"},
    "scaled and clipped": {"adax_step_kernel", "prepare_step_kernel", "grad_norm_kernel"},
    "capturable": {"adax_step_kernel", "prepare_step_kernel", "grad_norm_kernel", "sum_rows_kernel"},
}


def compiled(case: str) -> dict[str, list[int]]:
    """Return the number of compiled variants of each kernel.

    The first number counts the steps in which every v changes, the second counts all steps.
    """
    import code_audit
    import triton

    from adax_triton import AdaXW
    from adax_triton.step import backend

    code_audit.driver.set_active(code_audit.absent_device(code_audit.TARGETS["sm_90"]))
    keys: dict[str, set[str]] = defaultdict(set)

    def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        keys[fn.name.rpartition(".")[2]].add(compile["key"])
        return True  # neither compile nor launch

    triton.knobs.runtime.jit_cache_hook = record
    dtype = torch.bfloat16 if case == "8bit_v16" else torch.float32
    params = [torch.zeros(4096 + index, dtype=dtype, requires_grad=True) for index in range(17)]
    optimizer = AdaXW(params, **CASES[case])
    counts = []
    with mock.patch.object(backend, "_interpreting", lambda: True):  # CPU tensors go to the kernel
        for step in range(STEPS if case == "capturable" else FEWER_STEPS):
            change(optimizer, params, step, case not in ("plain", "8bit_v16"))
            optimizer.step()
        counts.append({name: len(found) for name, found in keys.items()})
        optimizer.param_groups[0]["betas"] = (0.9, 1e-4)
        for state in optimizer.state.values():
            state["step"] = torch.full_like(state["step"], 10**6) if case not in ("plain", "8bit_v16") else 10**6
        for _ in range(3):
            optimizer.step()
        counts.append({name: len(found) for name, found in keys.items()})
    return {name: [count.get(name, 0) for count in counts] for name in keys}


def change(optimizer: Any, params: list[torch.Tensor], step: int, scaled: bool) -> None:
    number = NUMBERS[step % len(NUMBERS)]
    optimizer.param_groups[0].update(
        lr=NUMBERS[step // 3 % len(NUMBERS)],
        betas=((0.0, 0.9)[step % 2], (1e-4, 0.0)[step // 2 % 2]),
        eps=NUMBERS[step // 5 % len(NUMBERS)],
        weight_decay=NUMBERS[step // 7 % len(NUMBERS)],
        seed=step % 48,
        maximize=step % 3 == 0,
    )
    if scaled:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(float(number or 4)), torch.tensor(float(step % 2))
        optimizer.max_grad_norm = number or 8
    # Change the number of tensors with gradients.
    present = (17, 16, 1, 2)[step // 56 % 4]
    for index, param in enumerate(params):
        param.grad = torch.ones_like(param) if index < present else None


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[int]]]:
    """Return `compiled` of each case, from a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SUPPORT)
    run = subprocess.run(
        [sys.executable, str(Path(__file__).resolve())],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path_factory.mktemp("variants"),
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("case", CASES)
def test_changing_numbers_compile_each_kernel_once(case: str, found: dict[str, dict[str, list[int]]]) -> None:
    assert {name: counts[0] for name, counts in found[case].items()} == dict.fromkeys(KERNELS[case], 1)


@pytest.mark.parametrize("case", CASES)
def test_skipping_unchanged_v_compiles_the_step_once_more(case: str, found: dict[str, dict[str, list[int]]]) -> None:
    host_knows_step = case in ("plain", "8bit_v16")
    again = {name: counts[1] - counts[0] for name, counts in found[case].items()}
    assert again == {name: int(host_knows_step and name == "adax_step_kernel") for name in KERNELS[case]}


if __name__ == "__main__":
    print(json.dumps({case: compiled(case) for case in CASES}))
