"""What the compilers make of the gradient sums, for four GPU architectures and without a GPU: grad_stats_audit.py."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Per thread, over triton 3.6.0 and 3.7.1: 32 leave all 64 warps on an SM of 65536, 48 leave 40. On gfx942, up to 64
# leave all 8 waves of a SIMD.
MOST_REGISTERS = {True: {"sm_80": 32, "sm_90": 32, "sm_100": 32, "gfx942": 64}, False: dict.fromkeys(TARGETS, 64)}

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Facts]]:
    """The facts of each variant of each target, compiled afresh in processes where Triton is not interpreting."""
    folder = tmp_path_factory.mktemp("audit")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    script = Path(__file__).with_name("grad_stats_audit.py")
    found = {}
    for target in TARGETS:
        output = subprocess.run([sys.executable, script, target], stdout=subprocess.PIPE, env=environment, cwd=folder)
        assert output.returncode == 0, "see the captured stderr"
        found[target] = json.loads(output.stdout)
    return found


def itemsize(facts: Facts) -> int:
    return getattr(torch, facts["grad_dtype"]).itemsize


def gradient_loads(facts: Facts) -> Counter:
    return Counter((stream, bits) for stream, kind, bits in facts["accesses"] if stream != "table" and kind == "load")


def expected_loads(facts: Facts) -> Counter:
    width = 16 if facts["aligned"] else itemsize(facts)
    loads = {("tile", 8 * width): facts["elements_per_thread"] * itemsize(facts) // width}
    # A tail of less than a vector, which only vectors can have.
    return Counter(loads | ({("tail", 8 * itemsize(facts)): 1} if facts["aligned"] else {}))


@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_is_compiled(audit: dict[str, list[Facts]], target: str) -> None:
    found = [(facts["grad_dtype"], facts["aligned"]) for facts in audit[target]]
    assert sorted(found) == sorted((dtype, aligned) for dtype in DTYPES for aligned in (True, False))


@pytest.mark.parametrize("target", TARGETS)
def test_each_gradient_is_read_once_at_full_width(audit: dict[str, list[Facts]], target: str) -> None:
    found, expected = map(gradient_loads, audit[target]), map(expected_loads, audit[target])
    assert list(found) == list(expected)


@pytest.mark.parametrize("target", TARGETS)
def test_bytes_per_element_are_those_of_the_dtype(audit: dict[str, list[Facts]], target: str) -> None:
    for facts in audit[target]:
        moved = sum(count * bits // 8 for (stream, bits), count in gradient_loads(facts).items() if stream == "tile")
        assert moved / facts["elements_per_thread"] == itemsize(facts), facts["grad_dtype"]


@pytest.mark.parametrize("target", TARGETS)
def test_beside_gradients_only_tables_are_read_and_one_sum_is_written(
    audit: dict[str, list[Facts]], target: str
) -> None:
    for facts in audit[target]:
        tables = [(kind, bits) for stream, kind, bits in facts["accesses"] if stream == "table"]
        # The chunk, the address and the number of elements, before the loop and in it; AMD has scalar loads for them.
        assert tables == ([] if target == "gfx942" else [("load", 64)] * 6)
        assert [tuple(found) for found in facts["accesses"] if found[1] == "store"] == [("partial", "store", 32)]


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_has_the_accesses_of_the_assembly(audit: dict[str, list[Facts]], target: str) -> None:
    for facts in audit[target]:
        assembly = Counter((kind, bits) for _, kind, bits in facts["accesses"])
        assert Counter(map(tuple, facts["machine"])) == assembly, facts["grad_dtype"]


@pytest.mark.parametrize("target", TARGETS)
def test_code_has_no_spills_and_no_atomics(audit: dict[str, list[Facts]], target: str) -> None:
    assert [(facts["spills"], facts["atomics"]) for facts in audit[target]] == [(0, 0)] * 8


@pytest.mark.parametrize("target", TARGETS)
def test_registers_are_within_bounds(audit: dict[str, list[Facts]], target: str) -> None:
    for facts in audit[target]:
        assert facts["registers"] <= MOST_REGISTERS[facts["aligned"]][target], (facts["grad_dtype"], facts["aligned"])


@pytest.mark.parametrize("target", TARGETS)
def test_tables_of_any_size_share_one_compiled_variant(audit: dict[str, list[Facts]], target: str) -> None:
    assert [facts["launches"] for facts in audit[target]] == [5] * 8
    keys = [key for facts in audit[target] for key in facts["keys"]]
    assert len(keys) == len(set(keys)) == 8
