"""Check the compiled step kernel for four GPU architectures, without a GPU.

See code_audit.py.
"""

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

# Limits of registers per thread, with triton 3.7.1. Resident warps of an SM with 65536 registers:
#   registers  40  48  64  80  112
#   warps      48  40  32  24   16
# A SIMD of gfx942 runs at most 8 waves: 8 with 64 registers, 7 with 72.
REGISTERS = {
    # sm_80, sm_90, sm_100, gfx942
    "plain": (48, 48, 56, 56),  # float32 states, no master, no flag; gradients have the parameter's dtype (most common)
    "plain_other_grad_dtype": (64, 64, 64, 56),  # the same, but gradients have another dtype
    "plain_unaligned": (80, 64, 64, 80),
    "other": (80, 64, 64, 68),  # other states, a master, stochastic rounding or skip_unchanged_v
    "other_unaligned": (164, 128, 168, 82),
    "float_telemetry": (104, 80, 80, 72),  # telemetry, states not quantized
    "quantized_telemetry": (112, 112, 112, 72),
    # The kernel loads a float32 master in addition to the parameter.
    "quantized_fp32_master": (105, 77, 80, 66),
    "quantized_fp32_master_unaligned": (163, 168, 168, 86),
    "quantized_fp32_master_telemetry": (128, 128, 128, 72),
}
# Limits of the 8-bit modes on sm_90, slightly above the current counts of instructions in tile and tail. Instructions
# limit the speed on an H200. With more than 48 registers only 32 warps run instead of 40, which takes 4 to 6 % longer.
INSTRUCTIONS = {
    "bf16-bf16-8bit_v16-alone-stochastic-aligned": 650,
    "bf16-bf16-8bit_v16-int8-aligned": 745,
    "bf16-bf16-8bit-alone-stochastic-aligned": 795,
    "bf16-bf16-8bit-int8-aligned": 900,
}

MERGED = ("tile", "load", "group_exponents")  # the assembler merges these loads

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def audit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Facts]]:
    """Return {target: {variant name: audit result}}.

    sm_90 has all variants. Other targets have a few, or all of them with AUDIT=all.
    """
    found = audit_facts(request.config, SUPPORT / "code_audit.py", tmp_path_factory.mktemp("audit"))
    return {target: {variant_name(facts): facts for facts in found[target]} for target in TARGETS}


def variant_name(facts: Facts) -> str:
    parts = [NAMES[facts["param_dtype"]], NAMES[facts["grad_dtype"]], facts["states"], facts["master"] or "alone"]
    parts += [name for name in FLAGS if facts[name]]
    return "-".join([*parts, "aligned" if facts["aligned"] else "unaligned"])


def is_plain(facts: Facts) -> bool:
    return facts["states"] == "float32" and not any(
        facts[name] for name in ("master", "stochastic", "skip_unchanged_v", "telemetry")
    )


def is_quantized(facts: Facts) -> bool:
    return facts["states"] in ("8bit_v16", "8bit")


def precision(facts: Facts) -> Precision:
    return Precision(facts["states"], "24bit" if facts["master"] == "int8" else facts["master"] and "float32")


def dtype_with_states(facts: Facts) -> torch.dtype:
    """Return a parameter dtype for which the package allocates these states.

    It is float16 for a float32 master.
    """
    return torch.float16 if facts["master"] == "float32" else getattr(torch, facts["param_dtype"])


def dtypes(facts: Facts) -> dict[str, torch.dtype]:
    """Return the dtype of each stream, as the package allocates it."""
    param = getattr(torch, facts["param_dtype"])
    found = {"param": param, "grad": getattr(torch, facts["grad_dtype"])}
    layouts = state_layouts(torch.empty(128, 64, dtype=dtype_with_states(facts)), precision(facts))
    return found | {name: layout.dtype for name, layout in layouts.items()}


def tile_accesses(facts: Facts) -> Counter:
    """Count one thread's accesses to parameters, gradients and states in the tile.

    The tile is the hot path.
    """
    return Counter(
        (kind, stream, bits) for region, kind, stream, bits in facts["accesses"] if region == "tile" and stream in DATA
    )


def expected_accesses(facts: Facts) -> Counter:
    expected = Counter()
    streams = {name: dtype for name, dtype in dtypes(facts).items() if name in DATA}
    for stream, dtype in streams.items():
        width = min(elements_per_access(facts) * dtype.itemsize, 16)
        count = facts["elements_per_thread"] * dtype.itemsize // width
        copied = stream == "param" and facts["param_is_copy"]
        for kind in ("load",) if stream == "grad" else ("store",) if copied else ("load", "store"):
            expected[kind, stream, 8 * width] = count
    return expected


def bytes_per_element(facts: Facts, kind: str) -> float:
    moved = sum(count * bits // 8 for (access, _, bits), count in tile_accesses(facts).items() if access == kind)
    # Count each exponent once, although several threads load it.
    exponents = dtypes(facts)["group_exponents"].itemsize / GROUP if is_quantized(facts) else 0
    return moved / facts["elements_per_thread"] + exponents


def elements_per_access(facts: Facts) -> int:
    """Return the elements per access: 16 bytes of the widest stored dtype.

    Unaligned tensors have 1.
    """
    widest = max(dtype.itemsize for name, dtype in dtypes(facts).items() if name in DATA and name != "grad")
    return min(16 // widest, 8) if facts["aligned"] else 1


def assembled_accesses(facts: Facts) -> Counter:
    """Return the accesses that the machine code must have.

    Loads of the tile's group exponents are not included.
    """
    found = Counter((kind, bits) for *where, bits in facts["accesses"] for kind in [where[1]] if tuple(where) != MERGED)
    if facts["stochastic"] or facts["states"] != "float32" or facts["master"] == "int8":
        # The assembler narrows one load: random bits need only the lower half of the first element's index.
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


def field_values(variants: dict[str, Facts]) -> set[Any]:
    """Return all (field, value) and (states, master) pairs of the variants."""
    fields = (*FLAGS, "param_dtype", "grad_dtype", "states", "master", "aligned")
    values = {(field, facts[field]) for facts in variants.values() for field in fields}
    return values | {(facts["states"], facts["master"]) for facts in variants.values()}


@pytest.mark.parametrize("target", TARGETS)
def test_every_field_value_is_compiled(audit: dict[str, dict[str, Facts]], target: str) -> None:
    assert field_values(audit[target]) == field_values(audit["sm_90"])


@pytest.mark.parametrize("target", TARGETS)
def test_each_stream_is_accessed_once_at_its_full_width(audit: dict[str, dict[str, Facts]], target: str) -> None:
    found = {name: tile_accesses(facts) for name, facts in audit[target].items()}
    assert found == {name: expected_accesses(facts) for name, facts in audit[target].items()}


@pytest.mark.parametrize("target", TARGETS)
def test_bytes_per_element_equal_the_formula(audit: dict[str, dict[str, Facts]], target: str) -> None:
    found, expected = {}, {}
    for name, facts in audit[target].items():
        param, grad, kept = dtypes(facts)["param"], dtypes(facts)["grad"], precision(facts)
        found[name] = bytes_per_element(facts, "load"), bytes_per_element(facts, "store")
        like = dtype_with_states(facts)
        stored = bytes_stored(like, kept) - like.itemsize + param.itemsize
        loaded = bytes_loaded(like, grad, kept) - (like.itemsize if facts["param_is_copy"] else 0)
        expected[name] = loaded, stored
    assert found == expected


@pytest.mark.parametrize("target", NVIDIA)
def test_machine_code_has_the_same_accesses_as_the_ptx(audit: dict[str, dict[str, Facts]], target: str) -> None:
    for name, facts in audit[target].items():
        machine, ptx = Counter(map(tuple, facts["machine"])), assembled_accesses(facts)
        exponents = machine - ptx
        assert ptx - machine == Counter(), name
        if is_quantized(facts):
            # PTX loads an exponent per element. The assembler merges them to at most one load per group and thread.
            groups = facts["elements_per_thread"] // elements_per_access(facts)
            ((access, count),) = exponents.items()
            assert access == ("load", 8 * dtypes(facts)["group_exponents"].itemsize), name
            assert count <= groups, name
        else:
            assert exponents == Counter(), name


@pytest.mark.parametrize("target", TARGETS)
def test_tile_loads_everything_before_the_first_store(audit: dict[str, dict[str, Facts]], target: str) -> None:
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
def test_shared_memory_and_barriers_are_within_the_limits(audit: dict[str, dict[str, Facts]], target: str) -> None:
    for name, facts in audit[target].items():
        assert facts["layout_conversions"] == is_quantized(facts), name
        if facts["telemetry"]:
            # Each of the five sums uses one word of shared memory per warp.
            assert facts["barriers"] <= 15 and 0 < facts["shared"] <= 160, name
            continue
        # An unaligned thread has elements of eight groups. Shared memory passes their exponents to the storing thread.
        passes_exponents = is_quantized(facts) and not facts["aligned"]
        assert facts["barriers"] == passes_exponents, name
        # AMD reduces within a wave by ds_ operations.
        reduces = target == "gfx942" and (is_quantized(facts) or facts["skip_unchanged_v"])
        assert facts["shared"] <= (130 if passes_exponents else 5 if reduces else 0), name


@pytest.mark.parametrize("target", TARGETS)
def test_telemetry_stores_five_words_per_program(audit: dict[str, dict[str, Facts]], target: str) -> None:
    for name, facts in audit[target].items():
        found = [access for access in facts["accesses"] if access[2] == "chunk_sums"]
        assert all(access[:2] == ["table", "store"] for access in found), name
        assert sum(bits for *_, bits in found) == (5 * 32 if facts["telemetry"] else 0), name


def register_limit(facts: Facts) -> str:
    """Return the key of REGISTERS for a variant."""
    if is_plain(facts) and facts["aligned"]:
        return "plain" if facts["param_dtype"] == facts["grad_dtype"] else "plain_other_grad_dtype"
    if is_quantized(facts) and facts["master"] == "float32":
        kind = "quantized_fp32_master"
    elif facts["telemetry"]:
        return "quantized_telemetry" if is_quantized(facts) else "float_telemetry"
    else:
        kind = "plain" if is_plain(facts) else "other"
    return f"{kind}_telemetry" if facts["telemetry"] else kind if facts["aligned"] else f"{kind}_unaligned"


@pytest.mark.parametrize("target", TARGETS)
def test_registers_are_within_the_limits(audit: dict[str, dict[str, Facts]], target: str) -> None:
    column, excess = TARGETS.index(target), {}
    for name, facts in audit[target].items():
        if facts["registers"] > REGISTERS[register_limit(facts)][column]:
            excess[name] = facts["registers"]
    assert excess == {}


def test_8bit_modes_run_40_warps_and_stay_within_the_instruction_limits(audit: dict[str, dict[str, Facts]]) -> None:
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
