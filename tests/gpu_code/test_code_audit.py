"""Check the compiled step kernel for four GPU architectures, without a GPU; see code_audit.py."""

import os
from collections import Counter
from typing import Any

import pytest
import torch
from audit_cache import audit_facts
from paths import SUPPORT

from adax_triton.state.precision import Precision, bytes_loaded, bytes_stored, state_layouts
from adax_triton.update.quantization import GROUP

pytest.importorskip("triton")

NVIDIA = ("sm_80", "sm_90", "sm_100")
TARGETS = (*NVIDIA, "gfx942")
DATA = ("param", "grad", "exp_avg", "exp_avg_sq", "master")
FLAGS = ("stochastic", "skip_unchanged_v", "telemetry", "param_is_copy")
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}

# Registers per thread, in triton 3.7.1. On an SM of 65536 registers, 40 allow 48 warps, 48 allow 40, 64 allow 32, 80
# allow 24 and 112 allow 16. On gfx942, up to 64 allow all 8 waves of a SIMD, and up to 72 allow 7.
REGISTERS = {
    # Columns 1 to 3, float32 states: aligned gradients of the parameter's dtype (the common case), aligned gradients of
    # another dtype, unaligned. Columns 4 and 5, other states: aligned, unaligned. Columns 6 and 7, aligned with
    # telemetry: without codes, with codes.
    "sm_80": (48, 64, 80, 80, 164, 104, 112),
    "sm_90": (48, 64, 64, 64, 128, 80, 112),
    "sm_100": (56, 64, 64, 64, 168, 80, 112),
    "gfx942": (56, 56, 80, 68, 82, 72, 72),
}
# With codes and a float32 master, which is read in addition to the parameter: aligned, unaligned, with telemetry.
REGISTERS_OF_COPIES = {
    "sm_80": (105, 163, 128),
    "sm_90": (77, 168, 128),
    "sm_100": (80, 168, 128),
    "gfx942": (66, 86, 72),
}
# Instruction limits of the 8-bit modes on sm_90, tail included, slightly above the current counts: instructions limit
# the speed on an H200. With more than 48 registers only 32 warps run instead of 40, which takes 4 to 6 % longer.
INSTRUCTIONS = {
    "bf16-bf16-8bit_v16-alone-stochastic-aligned": 650,
    "bf16-bf16-8bit_v16-int8-aligned": 745,
    "bf16-bf16-8bit-alone-stochastic-aligned": 795,
    "bf16-bf16-8bit-int8-aligned": 890,
}

MERGED = ("tile", "load", "group_exponents")

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def audit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Facts]]:
    """The facts of each variant of each target: all of sm_90, a few of the others unless AUDIT=all."""
    found = audit_facts(request.config, SUPPORT / "code_audit.py", tmp_path_factory.mktemp("audit"))
    return {target: {variant_name(facts): facts for facts in found[target]} for target in TARGETS}


def variant_name(facts: Facts) -> str:
    words = [NAMES[facts["param_dtype"]], NAMES[facts["grad_dtype"]], facts["states"], facts["master"] or "alone"]
    words += [name for name in FLAGS if facts[name]]
    return "-".join([*words, "aligned" if facts["aligned"] else "unaligned"])


def is_plain(facts: Facts) -> bool:
    return facts["states"] == "float32" and not any(
        facts[name] for name in ("master", "stochastic", "skip_unchanged_v", "telemetry")
    )


def has_codes(facts: Facts) -> bool:
    return facts["states"] in ("8bit_v16", "8bit")


def precision(facts: Facts) -> Precision:
    return Precision(facts["states"], "24bit" if facts["master"] == "int8" else facts["master"] and "float32")


def with_states_like(facts: Facts) -> torch.dtype:
    """Return a parameter dtype for this combination: a float32 master belongs to a float16 parameter."""
    return torch.float16 if facts["master"] == "float32" else getattr(torch, facts["param_dtype"])


def dtypes(facts: Facts) -> dict[str, torch.dtype]:
    """The dtype of each stream, from what the package allocates."""
    param = getattr(torch, facts["param_dtype"])
    found = {"param": param, "grad": getattr(torch, facts["grad_dtype"])}
    layouts = state_layouts(torch.empty(128, 64, dtype=with_states_like(facts)), precision(facts))
    return found | {name: layout.dtype for name, layout in layouts.items()}


def tile_accesses(facts: Facts) -> Counter:
    """The accesses to parameters, gradients and states on the hot path of one thread."""
    return Counter(
        (kind, stream, bits) for region, kind, stream, bits in facts["accesses"] if region == "tile" and stream in DATA
    )


def expected_accesses(facts: Facts) -> Counter:
    expected = Counter()
    streams = {name: dtype for name, dtype in dtypes(facts).items() if name in DATA}
    for stream, dtype in streams.items():
        width = min(vector(facts) * dtype.itemsize, 16)
        count = facts["elements_per_thread"] * dtype.itemsize // width
        copied = stream == "param" and facts["param_is_copy"]
        for kind in ("load",) if stream == "grad" else ("store",) if copied else ("load", "store"):
            expected[kind, stream, 8 * width] = count
    return expected


def bytes_per_element(facts: Facts, kind: str) -> float:
    moved = sum(count * bits // 8 for (how, _, bits), count in tile_accesses(facts).items() if how == kind)
    # One exponent for a group, though several threads ask for it.
    exponents = dtypes(facts)["group_exponents"].itemsize / GROUP if has_codes(facts) else 0
    return moved / facts["elements_per_thread"] + exponents


def vector(facts: Facts) -> int:
    """Elements at a time: those of a 16-byte store of the widest dtype stored, or one."""
    widest = max(dtype.itemsize for name, dtype in dtypes(facts).items() if name in DATA and name != "grad")
    return min(16 // widest, 8) if facts["aligned"] else 1


def ptx_accesses(facts: Facts) -> Counter:
    """The accesses of the PTX after assembling, without the loads of the tile's group exponents."""
    found = Counter((kind, bits) for *where, bits in facts["accesses"] for kind in [where[1]] if tuple(where) != MERGED)
    if facts["stochastic"] or facts["states"] != "float32" or facts["master"] == "int8":
        # Random bits need only the lower half of the first element's index.
        found += Counter({("load", 32): 1})
        found -= Counter({("load", 64): 1})
    return found


def test_every_variant_is_compiled(audit: dict[str, dict[str, Facts]]) -> None:
    pairs = [f"{param}-{grad}" for param in ("fp32", "bf16", "fp16") for grad in ("fp32", "bf16", "fp16", "fp64")]
    expected = {f"{pair}-float32-alone-{aligned}" for pair in pairs for aligned in ("aligned", "unaligned")}
    kept = ("fp32-fp32", "alone"), ("bf16-bf16", "alone"), ("bf16-bf16", "alone-stochastic")
    masters = ("bf16-bf16", "int16"), ("bf16-bf16", "int8"), ("fp16-fp16", "float32")
    for states in ("float32", "bfloat16", "8bit_v16", "8bit"):
        for pair, master in (*kept, *masters):
            endings = ("aligned", "unaligned", "skip_unchanged_v-aligned")
            expected |= {f"{pair}-{states}-{master}-{ending}" for ending in endings}
        for pair, master in (kept[0], kept[2], *masters[1:]):
            expected.add(f"{pair}-{states}-{master}-telemetry-aligned")
    copies = "bf16-bf16", "bf16-fp32", "fp32-fp32"
    expected |= {f"{pair}-float32-float32-param_is_copy-aligned" for pair in copies}
    expected.add("bf16-bf16-float32-float32-param_is_copy-unaligned")
    assert set(audit["sm_90"]) == expected
    for target in TARGETS:
        assert set(audit[target]) <= expected
        assert set(audit[target]) == expected or os.environ.get("AUDIT") != "all"


def traits(variants: dict[str, Facts]) -> set[Any]:
    """Every value of each field, and every pair of states and master."""
    fields = (*FLAGS, "param_dtype", "grad_dtype", "states", "master", "aligned")
    values = {(field, facts[field]) for facts in variants.values() for field in fields}
    return values | {(facts["states"], facts["master"]) for facts in variants.values()}


@pytest.mark.parametrize("target", TARGETS)
def test_every_trait_is_compiled(audit: dict[str, dict[str, Facts]], target: str) -> None:
    assert traits(audit[target]) == traits(audit["sm_90"])


@pytest.mark.parametrize("target", TARGETS)
def test_each_stream_is_moved_once_at_its_full_width(audit: dict[str, dict[str, Facts]], target: str) -> None:
    found = {name: tile_accesses(facts) for name, facts in audit[target].items()}
    assert found == {name: expected_accesses(facts) for name, facts in audit[target].items()}


@pytest.mark.parametrize("target", TARGETS)
def test_bytes_per_element_are_those_of_the_formula(audit: dict[str, dict[str, Facts]], target: str) -> None:
    found, expected = {}, {}
    for name, facts in audit[target].items():
        param, grad, kept = dtypes(facts)["param"], dtypes(facts)["grad"], precision(facts)
        found[name] = bytes_per_element(facts, "load"), bytes_per_element(facts, "store")
        like = with_states_like(facts)
        stored = bytes_stored(like, kept) - like.itemsize + param.itemsize
        loaded = bytes_loaded(like, grad, kept) - (like.itemsize if facts["param_is_copy"] else 0)
        expected[name] = loaded, stored
    assert found == expected


@pytest.mark.parametrize("target", NVIDIA)
def test_machine_code_has_the_accesses_of_the_ptx(audit: dict[str, dict[str, Facts]], target: str) -> None:
    for name, facts in audit[target].items():
        machine, ptx = Counter(map(tuple, facts["machine"])), ptx_accesses(facts)
        exponents = machine - ptx
        assert ptx - machine == Counter(), name
        if has_codes(facts):
            # PTX loads an exponent per element. The assembler merges the loads: at most one per group and thread.
            groups = facts["elements_per_thread"] // vector(facts)
            ((access, count),) = exponents.items()
            assert access == ("load", 8 * dtypes(facts)["group_exponents"].itemsize), name
            assert count <= groups, name
        else:
            assert exponents == Counter(), name


@pytest.mark.parametrize("target", TARGETS)
def test_all_loads_of_the_tile_are_issued_before_the_first_store(
    audit: dict[str, dict[str, Facts]], target: str
) -> None:
    late = {}
    for name, facts in audit[target].items():
        kinds = [kind for kind, _ in facts["machine"]]
        before = Counter(bits for _, bits in facts["machine"][: kinds.index("store")])
        expected = Counter()
        for (kind, _, bits), count in tile_accesses(facts).items():
            expected[bits] += count if kind == "load" else 0
        if any(before[bits] < count for bits, count in expected.items()):
            late[name] = expected - before
    assert late == {}


@pytest.mark.parametrize("target", TARGETS)
def test_code_has_no_spills(audit: dict[str, dict[str, Facts]], target: str) -> None:
    assert [name for name, facts in audit[target].items() if facts["spills"]] == []


@pytest.mark.parametrize("target", TARGETS)
def test_code_stays_out_of_shared_memory(audit: dict[str, dict[str, Facts]], target: str) -> None:
    for name, facts in audit[target].items():
        assert facts["layout_conversions"] == has_codes(facts), name
        if facts["telemetry"]:
            # Five sums over the warps of a program, each through a word per warp.
            assert facts["barriers"] <= 15 and 0 < facts["shared"] <= 160, name
            continue
        # An unaligned thread has elements of eight groups. Their exponents go to the storing thread by shared memory.
        trips = has_codes(facts) and not facts["aligned"]
        assert facts["barriers"] == trips, name
        # AMD's reductions within a wave are ds_ operations.
        reduces = target == "gfx942" and (has_codes(facts) or facts["skip_unchanged_v"])
        assert facts["shared"] <= (130 if trips else 5 if reduces else 0), name


@pytest.mark.parametrize("target", TARGETS)
def test_telemetry_stores_five_words_per_program(audit: dict[str, dict[str, Facts]], target: str) -> None:
    for name, facts in audit[target].items():
        found = [access for access in facts["accesses"] if access[2] == "chunk_sums"]
        assert all(access[:2] == ["table", "store"] for access in found), name
        assert sum(bits for *_, bits in found) == (5 * 32 if facts["telemetry"] else 0), name


@pytest.mark.parametrize("target", TARGETS)
def test_registers_are_within_bounds(audit: dict[str, dict[str, Facts]], target: str) -> None:
    alike, aligned, unaligned, rounded_aligned, rounded_unaligned, *with_telemetry = REGISTERS[target]
    excess = {}
    for name, facts in audit[target].items():
        if has_codes(facts) and facts["master"] == "float32":
            bound = REGISTERS_OF_COPIES[target][2 if facts["telemetry"] else not facts["aligned"]]
        elif facts["telemetry"]:
            bound = with_telemetry[has_codes(facts)]
        elif not is_plain(facts):
            bound = rounded_aligned if facts["aligned"] else rounded_unaligned
        elif not facts["aligned"]:
            bound = unaligned
        else:
            bound = alike if facts["param_dtype"] == facts["grad_dtype"] else aligned
        if facts["registers"] > bound:
            excess[name] = facts["registers"]
    assert excess == {}


def test_8_bit_modes_leave_40_warps_and_few_instructions(audit: dict[str, dict[str, Facts]]) -> None:
    found = {name: audit["sm_90"][name] for name in INSTRUCTIONS}
    assert {name: facts["registers"] for name, facts in found.items() if facts["registers"] > 48} == {}
    excess = {name: facts["instructions"] - INSTRUCTIONS[name] for name, facts in found.items()}
    assert {name: count for name, count in excess.items() if count > 0} == {}


@pytest.mark.parametrize("target", TARGETS)
def test_tables_of_any_size_and_content_share_one_compiled_variant(
    audit: dict[str, dict[str, Facts]], target: str
) -> None:
    keys = [key for facts in audit[target].values() for key in facts["keys"]]
    assert len(keys) == len(set(keys)) == len(audit[target])
