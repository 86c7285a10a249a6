"""Check the compiled small kernels for four GPU architectures; see small_kernels_audit.py."""

from collections import Counter
from typing import Any

import pytest
import torch
from audit_cache import audit_facts
from paths import SUPPORT

pytest.importorskip("triton")

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Per thread, over triton 3.6.0 and 3.7.1: 32 leave all 64 warps on an SM of 65536, 48 leave 40. On gfx942, up to 64
# leave all 8 waves of a SIMD.
MOST_REGISTERS = {True: {"sm_80": 32, "sm_90": 32, "sm_100": 32, "gfx942": 64}, False: dict.fromkeys(TARGETS, 64)}

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def audit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The facts of each variant of each kernel, by target."""
    return audit_facts(request.config, SUPPORT / "small_kernels_audit.py", tmp_path_factory.mktemp("audit"))


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    """One of the targets."""
    return request.param


@pytest.fixture
def sums(audit: dict[str, dict[str, Any]], target: str) -> list[Facts]:
    """The facts of each variant of the gradient sums."""
    return audit[target]["grad_norm_kernel"]


@pytest.fixture
def schedule(audit: dict[str, dict[str, Any]], target: str) -> Facts:
    """The facts of the one variant of the device's schedule."""
    (facts,) = audit[target]["prepare_step_kernel"]
    return facts


def itemsize(facts: Facts) -> int:
    return getattr(torch, facts["grad_dtype"]).itemsize


def gradient_loads(facts: Facts) -> Counter:
    return Counter((stream, bits) for stream, kind, bits in facts["accesses"] if stream != "table" and kind == "load")


def expected_loads(facts: Facts) -> Counter:
    width = 16 if facts["aligned"] else itemsize(facts)
    loads = {("tile", 8 * width): facts["elements_per_thread"] * itemsize(facts) // width}
    # Only vectorized variants have a tail, shorter than a vector.
    return Counter(loads | ({("tail", 8 * itemsize(facts)): 1} if facts["aligned"] else {}))


def test_every_variant_of_the_sums_is_compiled(sums: list[Facts]) -> None:
    found = [(facts["grad_dtype"], facts["aligned"]) for facts in sums]
    assert sorted(found) == sorted((dtype, aligned) for dtype in DTYPES for aligned in (True, False))


def test_each_gradient_is_read_once_at_full_width(sums: list[Facts]) -> None:
    assert list(map(gradient_loads, sums)) == list(map(expected_loads, sums))


def test_bytes_per_element_are_those_of_the_dtype(sums: list[Facts]) -> None:
    for facts in sums:
        moved = sum(count * bits // 8 for (stream, bits), count in gradient_loads(facts).items() if stream == "tile")
        assert moved / facts["elements_per_thread"] == itemsize(facts), facts["grad_dtype"]


def test_only_gradients_and_tables_are_read_and_one_sum_is_written(sums: list[Facts], target: str) -> None:
    for facts in sums:
        tables = [(kind, bits) for stream, kind, bits in facts["accesses"] if stream == "table"]
        # The chunk, the address and the number of elements, before the loop and in it; AMD has scalar loads for them.
        assert tables == ([] if target == "gfx942" else [("load", 64)] * 6)
        assert [tuple(found) for found in facts["accesses"] if found[1] == "store"] == [("partial", "store", 32)]


def test_machine_code_has_the_accesses_of_the_assembly(sums: list[Facts]) -> None:
    for facts in sums:
        assembly = Counter((kind, bits) for _, kind, bits in facts["accesses"])
        assert Counter(map(tuple, facts["machine"])) == assembly, facts["grad_dtype"]


def test_sums_have_no_spills_and_no_atomics(sums: list[Facts]) -> None:
    assert [(facts["spills"], facts["atomics"]) for facts in sums] == [(0, 0)] * 8


def test_registers_are_within_bounds(sums: list[Facts], target: str) -> None:
    for facts in sums:
        assert facts["registers"] <= MOST_REGISTERS[facts["aligned"]][target], (facts["grad_dtype"], facts["aligned"])


def test_tables_of_any_size_share_one_variant_of_the_sums(sums: list[Facts]) -> None:
    assert [facts["launches"] for facts in sums] == [5] * 8
    keys = [key for facts in sums for key in facts["keys"]]
    assert len(keys) == len(set(keys)) == 8


def test_schedule_compiles_once_for_all_sizes_and_values(schedule: Facts) -> None:
    assert schedule["launches"] == 7
    assert len(schedule["keys"]) == 1
    assert schedule["signature"]["n"] == "i64"


def test_schedule_is_kept_in_registers(schedule: Facts) -> None:
    assert (schedule["spills"], schedule["shared"]) == (0, 0)


def test_exponential_and_logarithm_are_linked_in(schedule: Facts) -> None:
    assert schedule["unresolved"] == []


def test_rows_of_all_sizes_share_one_variant_without_spills_and_atomics(
    audit: dict[str, dict[str, Any]], target: str
) -> None:
    (facts,) = audit[target]["add_rows_kernel"]
    assert facts["launches"] == 5 and len(facts["keys"]) == 1
    assert (facts["spills"], facts["atomics"]) == (0, 0)
    assert facts["registers"] <= 64  # of 1024 threads an SM of 65536 then holds all
