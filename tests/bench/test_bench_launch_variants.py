"""The benchmark of launch variants: its rewrites of the kernel, its verdicts, and the command in the interpreter."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adax_triton.bench.harness import timing
from adax_triton.bench.harness.timing import Clock
from adax_triton.bench.step import kernel_rewrites, launch_variants
from adax_triton.bench.step.kernel_rewrites import EXACT, REWRITES, Edit
from adax_triton.bench.step.variant_cases import SAME, NormCase, StepCase, case_of
from adax_triton.bench.step.variant_sections import FROZEN, SECTIONS, Variant, variants_of

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors need the interpreter")

CPU = torch.device("cpu")
NUMEL = 2100  # a chunk, groups of 32 and four elements more
LOWEST = "bf16 + 8bit + 24-bit masters"
DRY = ["--device", "cpu", "--numel", str(NUMEL), "--rounds", "1"]


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**20)


def verdicts(section: str, variants: list[Variant], folder: Path) -> list[str]:
    case = case_of(SECTIONS[section], NUMEL, CPU, folder)
    return [case.check(variant, case.call(variant)) for variant in (Variant(2048, 8), *variants)]


@interpreted
@pytest.mark.parametrize("name", REWRITES)
def test_every_rewrite_applies_and_runs(name: str, tmp_path: Path) -> None:
    # Eight bits hide what a quotient changes.
    section = "fp32" if name == "quotient" else LOWEST
    present, rewritten = verdicts(section, [Variant(1024, 4, 48, (name,))], tmp_path)
    assert present == SAME
    assert rewritten == SAME if name in EXACT else rewritten.startswith("other")
    for module, old, new in REWRITES[name]:
        (source,) = (path.read_text() for path in tmp_path.glob(f"{module}_*.py"))
        assert new in source and old not in source.replace(new, "")


def test_rewrite_whose_text_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(REWRITES, "quotient", (*REWRITES["quotient"], Edit("quantization", "no such text", "")))
    with pytest.raises(ValueError, match=r"'quotient' replaces 'no such text', which kernels/compact\.py"):
        kernel_rewrites.rewritten_kernel(["quotient"], tmp_path)
    with pytest.raises(ValueError, match="Invalid rewrite: 'faster'"):
        kernel_rewrites.rewritten_kernel(["abs-product", "faster"], tmp_path)


@interpreted
def test_changed_result_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    by_one = Edit("quantization", "12582912.0", "12582913.0")  # each code of m
    monkeypatch.setitem(REWRITES, "abs-product", (by_one,))
    assert launch_variants.main([*DRY, "--modes", LOWEST, "--variants", "2048x8 abs-product"]) == 1
    printed = capsys.readouterr()
    assert re.search(r"\| DIFFERS .*exp_avg,.* of the largest update \|", printed.out)
    assert f"{LOWEST}: 2048x8 abs-product DIFFERS" in printed.err


@interpreted
def test_dry_run_writes_what_it_prints(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # One that cannot be launched is a row, and the others are timed.
    section = SECTIONS["fp32"]._replace(variants=(Variant(2048, 8, rewrites=("faster",)), Variant(1024, 4, 48)))
    monkeypatch.setitem(SECTIONS, "fp32", section)
    path, make, written = tmp_path / "variants.json", case_of, []

    def watched(*arguments: Any) -> StepCase | NormCase:
        written.append(path.exists() and len(json.loads(path.read_text())["sections"]))
        if len(written) == 3:
            raise torch.OutOfMemoryError("no room")
        return make(*arguments)

    monkeypatch.setattr(launch_variants, "case_of", watched)
    names = ["fp32", "norm of bfloat16", "norm of float32"]
    assert launch_variants.main([*DRY, "--modes", *names, "--json", str(path)]) == 1
    assert written == [False, 1, 2]
    result = json.loads(path.read_text())
    assert (result["benchmark"], result["environment"]["torch"]) == ("variants", torch.__version__)
    steps, norms, absent = result["sections"]
    assert [steps["name"], norms["name"], absent["name"]] == names
    assert absent["absent"] == "OutOfMemoryError: no room"
    assert list(steps["rows"]) == ["2048x8", "2048x8 faster", "1024x4 r48", "copy"]
    assert steps["rows"]["2048x8 faster"]["absent"].startswith("ValueError: Invalid rewrite: 'faster'")
    assert steps["rows"]["1024x4 r48"]["verdict"] == SAME
    assert norms["reference"] in ("copy", "torch.sum")
    assert norms["rows"][norms["reference"]]["of_reference"] == 1.0
    for row in [*steps["rows"].values(), *norms["rows"].values()]:
        assert "absent" in row or row["ms"] > 0
    assert launch_variants.table(result).replace("\n\n", "\n") in capsys.readouterr().out.replace("\n\n", "\n")


@interpreted
def test_budget_keeps_the_present_variant_and_the_least_rounds(tmp_path: Path) -> None:
    section = SECTIONS["fp32"]
    case, variants = case_of(section, NUMEL, CPU, tmp_path), {one.label: one for one in variants_of(section)}
    failed = {"2048x8 r48": "PTXASError: no"}
    found = launch_variants.measure(variants, case, failed, Clock(CPU), rounds=20, until=0.0)
    assert found["rounds"] == launch_variants.LEAST_ROUNDS
    timed = [label for label, row in found["rows"].items() if "ms" in row]
    assert timed == ["2048x8", "copy"]
    assert found["rows"]["1024x8"] == {"absent": launch_variants.NOT_REACHED}
    # fp32 moves 28 bytes per element.
    row = found["rows"]["2048x8"]
    assert row["tb_per_s"] * row["ms"] == pytest.approx(28 * NUMEL / 1e9)


@interpreted
@pytest.mark.parametrize("name", ["fp32, frozen", "bf16 + bfloat16, frozen"])
def test_frozen_step_changes_no_second_moment(name: str, tmp_path: Path) -> None:
    section = SECTIONS[name]
    assert section.steps[-1] == FROZEN
    before, after = (
        case_of(section._replace(steps=steps), NUMEL, CPU, tmp_path) for steps in (section.steps[:-1], section.steps)
    )
    for case in (before, after):
        assert isinstance(case, StepCase)
        assert case.check(Variant(2048, 8), case.call(Variant(2048, 8))) == SAME
    assert torch.equal(before.tensors["exp_avg_sq"], after.tensors["exp_avg_sq"])
    assert before.tensors["exp_avg_sq"].count_nonzero() == NUMEL
    assert not torch.equal(before.tensors["exp_avg"], after.tensors["exp_avg"])
    skip_unchanged_v = Variant(2048, 8, skip_unchanged_v=True)
    assert after.check(skip_unchanged_v, after.call(skip_unchanged_v)) == SAME
    assert (
        after.bytes_moved(Variant(2048, 8)) - after.bytes_moved(skip_unchanged_v) == after.tensors["exp_avg_sq"].nbytes
    )


@interpreted
def test_wrong_norm_is_seen(tmp_path: Path) -> None:
    section = SECTIONS["norm of bfloat16"]
    case = case_of(section, NUMEL, CPU, tmp_path)
    assert isinstance(case, NormCase)
    call = case.call(section.variants[0])
    assert case.check(section.variants[0], call).startswith(SAME)
    case.grad[-1] = 5.0  # the expected norm is that of before
    assert case.check(section.variants[0], call).startswith("DIFFERS")


COMPILING = """
import json, sys
from adax_triton.bench.step.kernel_rewrites import REWRITES
from adax_triton.bench.step.launch_variants import compile_all
from adax_triton.bench.step.variant_sections import SECTIONS, Variant
from triton.backends.compiler import GPUTarget

if __name__ == "__main__":
    jobs = [(SECTIONS[sys.argv[1]], Variant(1024, 4, 48, (name,))) for name in (*REWRITES, "faster")]
    failed = compile_all(jobs, GPUTarget("cuda", 90, 32), 1, 120.0)
    print(json.dumps({label: why for (_, label), why in failed.items()}))
"""


def test_rewrites_compile_without_a_gpu(tmp_path: Path) -> None:
    # Takes 5 s, to start processes that compile: otherwise only a GPU would show that the rewrites do.
    script, cache = tmp_path / "compiling.py", tmp_path / "cache"
    script.write_text(COMPILING)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-P", str(script), LOWEST]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary, failed = done.stdout.splitlines()
    assert summary.startswith(f"compiled {len(REWRITES)} of {len(REWRITES) + 1} in ")
    assert list(json.loads(failed)) == ["1024x4 r48 faster"]
    assert len(list(cache.rglob("*.cubin"))) == len(REWRITES)
