"""What the compilers make of the step kernel, for four GPU architectures and without a GPU: see code_audit.py."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from adax_triton.precision import bytes_loaded, bytes_stored

pytest.importorskip("triton")

NVIDIA = ("sm_80", "sm_90", "sm_100")
TARGETS = (*NVIDIA, "gfx942")
DATA = ("param", "grad", "exp_avg", "exp_avg_sq")
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}

# Per thread, over triton 3.6.0 and 3.7.1. Gradients of the parameter's dtype, aligned, are the case to be fast: 40
# registers leave 48 warps on an SM of 65536, 48 leave 40, 64 leave 32, 80 leave 24. On gfx942, up to 64 leave all 8
# waves of a SIMD and up to 72 leave 7.
REGISTERS = {
    # target: gradients like parameters, other aligned, unaligned
    "sm_80": (48, 64, 80),
    "sm_90": (40, 64, 80),
    "sm_100": (40, 64, 80),
    "gfx942": (64, 64, 72),
}

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Facts]]:
    """The facts of each variant of each target, compiled afresh in processes where Triton is not interpreting."""
    folder = tmp_path_factory.mktemp("audit")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    script = Path(__file__).with_name("code_audit.py")
    running = {}
    for target in TARGETS:
        with (folder / target).open("w") as output:
            running[target] = subprocess.Popen(
                [sys.executable, script, target], stdout=output, env=environment, cwd=folder
            )
    failed = [target for target, process in running.items() if process.wait() != 0]
    assert not failed, "see the captured stderr"
    return {
        target: {variant_name(facts): facts for facts in json.loads((folder / target).read_text())}
        for target in TARGETS
    }


def variant_name(facts: Facts) -> str:
    aligned = "aligned" if facts["aligned"] else "unaligned"
    return f"{NAMES[facts['param_dtype']]}-{NAMES[facts['grad_dtype']]}-{aligned}"


def dtypes(facts: Facts) -> dict[str, torch.dtype]:
    param, grad = (getattr(torch, facts[name]) for name in ("param_dtype", "grad_dtype"))
    return {"param": param, "grad": grad, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}


def tile_accesses(facts: Facts) -> Counter:
    """The accesses to parameters, gradients and moments on the hot path of one thread."""
    return Counter(
        (kind, stream, bits) for region, kind, stream, bits in facts["accesses"] if region == "tile" and stream in DATA
    )


def expected_accesses(facts: Facts) -> Counter:
    expected = Counter()
    for stream, dtype in dtypes(facts).items():
        # Four elements at a time, for that is what a 16-byte store of a float32 moment holds; 16 bytes is the widest.
        width = min(4 * dtype.itemsize, 16) if facts["aligned"] else dtype.itemsize
        count = facts["elements_per_thread"] * dtype.itemsize // width
        for kind in ("load",) if stream == "grad" else ("load", "store"):
            expected[kind, stream, 8 * width] = count
    return expected


def bytes_per_element(facts: Facts, kind: str) -> float:
    moved = sum(count * bits // 8 for (how, _, bits), count in tile_accesses(facts).items() if how == kind)
    return moved / facts["elements_per_thread"]


@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_is_compiled(audit: dict[str, dict[str, Facts]], target: str) -> None:
    pairs = [f"{param}-{grad}" for param in ("fp32", "bf16", "fp16") for grad in ("fp32", "bf16", "fp16", "fp64")]
    assert set(audit[target]) == {f"{pair}-{aligned}" for pair in pairs for aligned in ("aligned", "unaligned")}


@pytest.mark.parametrize("target", TARGETS)
def test_each_stream_is_moved_once_at_its_full_width(audit: dict[str, dict[str, Facts]], target: str) -> None:
    found = {name: tile_accesses(facts) for name, facts in audit[target].items()}
    assert found == {name: expected_accesses(facts) for name, facts in audit[target].items()}


@pytest.mark.parametrize("target", TARGETS)
def test_bytes_per_element_are_those_of_the_formula(audit: dict[str, dict[str, Facts]], target: str) -> None:
    found, expected = {}, {}
    for name, facts in audit[target].items():
        param, grad = dtypes(facts)["param"], dtypes(facts)["grad"]
        found[name] = bytes_per_element(facts, "load"), bytes_per_element(facts, "store")
        expected[name] = bytes_loaded(param, grad), bytes_stored(param)
    assert found == expected


@pytest.mark.parametrize("target", NVIDIA)
def test_machine_code_has_the_accesses_of_the_ptx(audit: dict[str, dict[str, Facts]], target: str) -> None:
    machine, ptx = {}, {}
    for name, facts in audit[target].items():
        machine[name] = Counter(map(tuple, facts["machine"]))
        ptx[name] = Counter((kind, bits) for _, kind, _, bits in facts["accesses"])
    assert machine == ptx


@pytest.mark.parametrize("target", TARGETS)
def test_all_loads_of_the_tile_are_issued_before_the_first_store(
    audit: dict[str, dict[str, Facts]], target: str
) -> None:
    before, expected = {}, {}
    for name, facts in audit[target].items():
        kinds = [kind for kind, _ in facts["machine"]]
        before[name] = Counter(bits for _, bits in facts["machine"][: kinds.index("store")])
        expected[name] = Counter(
            bits for region, kind, _, bits in facts["accesses"] if kind == "load" and region != "tail"
        )
    assert before == expected


@pytest.mark.parametrize("fact", ["spills", "shared", "barriers", "layout_conversions"])
@pytest.mark.parametrize("target", TARGETS)
def test_code_has_none(audit: dict[str, dict[str, Facts]], target: str, fact: str) -> None:
    assert {name: facts[fact] for name, facts in audit[target].items() if facts[fact] != 0} == {}


@pytest.mark.parametrize("target", TARGETS)
def test_registers_are_within_bounds(audit: dict[str, dict[str, Facts]], target: str) -> None:
    alike, aligned, unaligned = REGISTERS[target]
    excess = {}
    for name, facts in audit[target].items():
        bound = unaligned if not facts["aligned"] else alike if facts["param_dtype"] == facts["grad_dtype"] else aligned
        if facts["registers"] > bound:
            excess[name] = facts["registers"]
    assert excess == {}


@pytest.mark.parametrize("target", TARGETS)
def test_tables_of_any_size_and_content_share_one_compiled_variant(
    audit: dict[str, dict[str, Facts]], target: str
) -> None:
    keys = [key for facts in audit[target].values() for key in facts["keys"]]
    assert len(keys) == len(set(keys)) == len(audit[target])
