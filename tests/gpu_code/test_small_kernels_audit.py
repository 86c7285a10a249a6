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
# Limits of registers per thread for aligned (True) and unaligned (False) variants, with triton 3.6.0 and 3.7.1. An SM
# runs at most 64 warps: 64 with 32 registers, 40 with 48. A SIMD of gfx942 runs at most 8 waves: 8 with 64 registers.
MAX_REGISTERS = {True: {"sm_80": 32, "sm_90": 32, "sm_100": 32, "gfx942": 64}, False: dict.fromkeys(TARGETS, 64)}

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def audit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return {target: {kernel name: audit results of its variants}}."""
    return audit_facts(request.config, SUPPORT / "small_kernels_audit.py", tmp_path_factory.mktemp("audit"))


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    """Return one of the targets."""
    return request.param


@pytest.fixture
def grad_norm(audit: dict[str, dict[str, Any]], target: str) -> list[Facts]:
    """Return the audit results of the variants of grad_norm_kernel."""
    return audit[target]["grad_norm_kernel"]


@pytest.fixture
def prepare_step(audit: dict[str, dict[str, Any]], target: str) -> list[Facts]:
    """Return the audit results of the variants of prepare_step_kernel."""
    return audit[target]["prepare_step_kernel"]


@pytest.fixture
def sum_rows(audit: dict[str, dict[str, Any]], target: str) -> Facts:
    """Return the audit results of sum_rows_kernel."""
    (facts,) = audit[target]["sum_rows_kernel"]
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


def test_every_variant_of_grad_norm_is_compiled(grad_norm: list[Facts]) -> None:
    found = [(facts["grad_dtype"], facts["aligned"]) for facts in grad_norm]
    assert sorted(found) == sorted((dtype, aligned) for dtype in DTYPES for aligned in (True, False))


def test_grad_norm_loads_each_gradient_once_at_full_width(grad_norm: list[Facts]) -> None:
    assert list(map(gradient_loads, grad_norm)) == list(map(expected_loads, grad_norm))


def test_grad_norm_loads_as_many_bytes_per_element_as_the_dtype_has(grad_norm: list[Facts]) -> None:
    for facts in grad_norm:
        loaded = sum(count * bits // 8 for (stream, bits), count in gradient_loads(facts).items() if stream == "tile")
        assert loaded / facts["elements_per_thread"] == itemsize(facts), facts["grad_dtype"]


def test_grad_norm_loads_gradients_and_tables_and_stores_one_sum(grad_norm: list[Facts], target: str) -> None:
    for facts in grad_norm:
        tables = [(kind, bits) for stream, kind, bits in facts["accesses"] if stream == "table"]
        # Chunk, address and number of elements: three loads before the loop, three in it. AMD uses scalar loads.
        assert tables == ([] if target == "gfx942" else [("load", 64)] * 6)
        stores = [tuple(access) for access in facts["accesses"] if access[1] == "store"]
        assert stores == [("partial", "store", 64)]


def test_machine_code_has_the_same_accesses_as_the_assembly(grad_norm: list[Facts]) -> None:
    for facts in grad_norm:
        assembly = Counter((kind, bits) for _, kind, bits in facts["accesses"])
        assert Counter(map(tuple, facts["machine"])) == assembly, facts["grad_dtype"]


def test_grad_norm_has_no_spills_and_no_atomics(grad_norm: list[Facts]) -> None:
    assert [(facts["spills"], facts["atomics"]) for facts in grad_norm] == [(0, 0)] * 8


def test_grad_norm_stays_within_the_register_limits(grad_norm: list[Facts], target: str) -> None:
    for facts in grad_norm:
        assert facts["registers"] <= MAX_REGISTERS[facts["aligned"]][target], (facts["grad_dtype"], facts["aligned"])


def test_grad_norm_compiles_once_per_variant_for_all_table_sizes(grad_norm: list[Facts]) -> None:
    assert [facts["launches"] for facts in grad_norm] == [5] * 8
    keys = [key for facts in grad_norm for key in facts["keys"]]
    assert len(keys) == len(set(keys)) == 8


def test_prepare_step_compiles_once_per_variant_for_all_sizes_and_values(prepare_step: list[Facts]) -> None:
    assert [facts["launches"] for facts in prepare_step] == [7] * 4
    keys = [key for facts in prepare_step for key in facts["keys"]]
    assert len(keys) == len(set(keys)) == 4
    types = [(facts["signature"]["n"], facts["signature"]["max_grad_norm"]) for facts in prepare_step]
    assert types == [("i64", "fp64")] * 4


def test_prepare_step_spills_nothing_and_uses_shared_memory_only_to_add(prepare_step: list[Facts]) -> None:
    assert [facts["spills"] for facts in prepare_step] == [0] * 4
    assert [facts["shared"] > 0 for facts in prepare_step] == [facts["clipped"] for facts in prepare_step]


def test_prepare_step_calls_no_unlinked_math_function(prepare_step: list[Facts]) -> None:
    assert [facts["unresolved"] for facts in prepare_step] == [[]] * 4


def test_sum_rows_compiles_once_for_all_sizes(sum_rows: Facts) -> None:
    assert sum_rows["launches"] == 5 and len(sum_rows["keys"]) == 1


def test_sum_rows_has_no_spills_no_atomics_and_few_registers(sum_rows: Facts) -> None:
    assert (sum_rows["spills"], sum_rows["atomics"]) == (0, 0)
    assert sum_rows["registers"] <= 64  # an SM with 65536 registers then holds 1024 threads
