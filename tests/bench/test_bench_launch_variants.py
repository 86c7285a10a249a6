"""Launch variants: rewrites of the kernel, verdicts, and the command in the interpreter."""

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
from adax_triton.bench.launch_variants import command, kernel_rewrites
from adax_triton.bench.launch_variants.cases import SAME, Case
from adax_triton.bench.launch_variants.kernel_rewrites import EXACT, REWRITES
from adax_triton.bench.launch_variants.variants import LATE_STEP, SECTIONS, parse

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors need the interpreter")

CPU = torch.device("cpu")
NUMEL = 2100  # a chunk, groups of 32 and four elements more
LOWEST = "bf16 + 8bit + 24-bit masters"
DRY = ["--device", "cpu", "--numel", str(NUMEL), "--rounds", "1"]


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**20)


def verdicts(section: str, label: str, folder: Path) -> list[str]:
    case = Case(SECTIONS[section], NUMEL, CPU, folder)
    return [case.check(variant, case.call(variant)) for variant in map(parse, ("2048x8", label))]


@interpreted
@pytest.mark.parametrize("name", REWRITES)
def test_every_rewrite_applies_and_runs(name: str, tmp_path: Path) -> None:
    # 8-bit codes hide the rounding difference of a division.
    section = "fp32" if name == "quotient" else LOWEST
    present, rewritten = verdicts(section, f"1024x4 r48 {name}", tmp_path)
    assert present == SAME
    assert rewritten == SAME if name in EXACT else rewritten.startswith("other")
    module, old, new = REWRITES[name]
    (source,) = (path.read_text() for path in tmp_path.glob(f"{module}_*.py"))
    assert new in source and old not in source.replace(new, "")


def test_label_names_every_property() -> None:
    capped = {"num_warps": 8, "maxnreg": 48}
    assert parse("2048x8 r48 p528 settled quotient")[1:] == (2048, 8, capped, 528, True, "quotient")
    assert parse("1024x4")[1:] == (1024, 8, {"num_warps": 4}, None, False, None)


def test_outdated_and_unknown_rewrites_are_rejected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(REWRITES, "quotient", ("quantization", "no such text", ""))
    with pytest.raises(ValueError, match=r"'quotient': kernels/quantization\.py does not contain 'no such text'"):
        kernel_rewrites.rewritten_kernel("quotient", tmp_path)
    with pytest.raises(ValueError, match="Invalid rewrite: 'faster'"):
        kernel_rewrites.rewritten_kernel("faster", tmp_path)


@interpreted
def test_changed_result_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    # Changes each code of m by one.
    monkeypatch.setitem(REWRITES, "abs-product", ("quantization", "12582912.0", "12582913.0"))
    assert command.main([*DRY, "--modes", LOWEST, "--variants", "2048x8 abs-product"]) == 1
    printed = capsys.readouterr()
    assert re.search(r"\| DIFFERS .*exp_avg,.* of the largest update \|", printed.out)
    assert f"{LOWEST}: 2048x8 abs-product DIFFERS" in printed.err


@interpreted
def test_dry_run_writes_what_it_prints(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # A variant that cannot be launched gets a row; the others are timed.
    monkeypatch.setitem(SECTIONS, "fp32", SECTIONS["fp32"]._replace(labels="2048x8 faster, 1024x4 r48"))
    path, written = tmp_path / "variants.json", []

    def watched(*arguments: Any) -> Case:
        written.append(path.exists() and len(json.loads(path.read_text())["sections"]))
        if len(written) == 3:
            raise torch.OutOfMemoryError("no room")
        return Case(*arguments)

    monkeypatch.setattr(command, "Case", watched)
    names = ["fp32", "norm of bfloat16", "norm of float32"]
    assert command.main([*DRY, "--modes", *names, "--json", str(path)]) == 1
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
    assert command.table(result).replace("\n\n", "\n") in capsys.readouterr().out.replace("\n\n", "\n")


@interpreted
def test_first_variant_is_timed_without_a_budget(tmp_path: Path) -> None:
    section = SECTIONS["fp32"]
    case, failed = Case(section, NUMEL, CPU, tmp_path), {"2048x8 r48": "PTXASError: no"}
    found = command.measure(section.variants(), case, failed, Clock(CPU), rounds=20, until=0.0)
    assert found["rounds"] == command.LEAST_ROUNDS
    timed = [label for label, row in found["rows"].items() if "ms" in row]
    assert timed == ["2048x8", "copy"]
    assert found["rows"]["1024x8"] == {"absent": command.NOT_REACHED}
    # fp32 moves 28 bytes per element.
    row = found["rows"]["2048x8"]
    assert row["tb_per_s"] * row["ms"] == pytest.approx(28 * NUMEL / 1e9)


@interpreted
@pytest.mark.parametrize("name", ["fp32, frozen", "bf16 + bfloat16, frozen"])
def test_late_step_changes_no_second_moment(name: str, tmp_path: Path) -> None:
    section = SECTIONS[name]
    assert section.steps is not None and section.steps[-1] == LATE_STEP
    before, after = (
        Case(section._replace(steps=steps), NUMEL, CPU, tmp_path) for steps in (section.steps[:-1], section.steps)
    )
    for case in (before, after):
        assert case.check(parse("2048x8"), case.call(parse("2048x8"))) == SAME
    assert torch.equal(before.tensors["exp_avg_sq"], after.tensors["exp_avg_sq"])
    assert before.tensors["exp_avg_sq"].count_nonzero() == NUMEL
    assert not torch.equal(before.tensors["exp_avg"], after.tensors["exp_avg"])
    skip_unchanged_v = parse("2048x8 settled")
    assert after.check(skip_unchanged_v, after.call(skip_unchanged_v)) == SAME
    assert (
        after.bytes_moved(parse("2048x8")) - after.bytes_moved(skip_unchanged_v) == after.tensors["exp_avg_sq"].nbytes
    )


@interpreted
def test_wrong_norm_is_seen(tmp_path: Path) -> None:
    variant = parse("2048x8 p4096")
    case = Case(SECTIONS["norm of bfloat16"], NUMEL, CPU, tmp_path)
    call = case.call(variant)
    assert case.check(variant, call).startswith(SAME)
    case.grad[-1] = 5.0  # the expected norm was computed before
    assert case.check(variant, call).startswith("DIFFERS")


COMPILING = """
import json, sys
from adax_triton.bench.launch_variants.compile import compile_all
from adax_triton.bench.launch_variants.kernel_rewrites import REWRITES
from adax_triton.bench.launch_variants.variants import SECTIONS, parse
from triton.backends.compiler import GPUTarget

if __name__ == "__main__":
    jobs = [(SECTIONS[sys.argv[1]], parse(f"1024x4 r48 {name}")) for name in (*REWRITES, "faster")]
    failed = compile_all(jobs, GPUTarget("cuda", 90, 32), 1, 120.0)
    print(json.dumps({label: why for (_, label), why in failed.items()}))
"""


def test_rewrites_compile_without_a_gpu(tmp_path: Path) -> None:
    # Otherwise only a GPU would show that the rewrites compile. Starting the processes takes 5 s.
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
