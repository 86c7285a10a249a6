"""The launch-variant benchmark: labels, verdicts, and the command in the interpreter."""

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
from adax_triton.bench.launch_variants import command
from adax_triton.bench.launch_variants.variants import LATE_STEP, SAME, SECTIONS, Case, Variant, parse

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors need the interpreter")

CPU = torch.device("cpu")
NUMEL = 2100  # one chunk, one group of 32, and 20 more elements
ALL_8BIT = "bf16 + 8bit + 24-bit masters"
DRY = ["--device", "cpu", "--numel", str(NUMEL), "--rounds", "1"]


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**20)


def test_label_names_every_property() -> None:
    capped = {"num_warps": 8, "maxnreg": 48}
    assert parse("2048x8 r48 settled")[1:] == (2048, capped, True)
    assert parse("1024x4")[1:] == (1024, {"num_warps": 4}, False)
    assert parse("1024x4").elements_per_thread == 8


@interpreted
def test_changed_result_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    original = Case.call

    def changed(case: Case, variant: Variant) -> Any:
        launch = original(case, variant)

        def wrong(*scalars: torch.Tensor) -> None:
            launch(*scalars)
            for name in ("param", "exp_avg"):
                case.tensors[name].fill_(1)

        return wrong if variant.label == "1024x8" else launch

    monkeypatch.setattr(Case, "call", changed)
    assert command.main([*DRY, "--modes", ALL_8BIT, "--variants", "2048x8 r48", "1024x8"]) == 1
    printed = capsys.readouterr()
    assert re.search(r"\| DIFFERS .*exp_avg.* of the largest update \|", printed.out)
    assert f"{ALL_8BIT}: 1024x8 DIFFERS" in printed.err and "r48" not in printed.err


@interpreted
def test_dry_run_writes_the_printed_rows(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # A variant whose launch fails gets a row with the error. The other variants are timed.
    monkeypatch.setitem(SECTIONS, "fp32", SECTIONS["fp32"]._replace(labels="3x1, 1024x4 r48"))
    path, written = tmp_path / "variants.json", []

    def watched(*arguments: Any) -> Case:
        written.append(path.exists() and len(json.loads(path.read_text())["sections"]))
        if len(written) == 3:
            raise torch.OutOfMemoryError("no room")
        return Case(*arguments)

    monkeypatch.setattr(command, "Case", watched)
    names = ["fp32", "fp32, frozen", ALL_8BIT]
    assert command.main([*DRY, "--modes", *names, "--json", str(path)]) == 1
    assert written == [False, 1, 2]
    result = json.loads(path.read_text())
    assert (result["benchmark"], result["environment"]["torch"]) == ("variants", torch.__version__)
    steps, frozen, absent = result["sections"]
    assert [steps["name"], frozen["name"], absent["name"]] == names
    assert absent["absent"] == "OutOfMemoryError: no room"
    assert list(steps["rows"]) == ["2048x8", "3x1", "1024x4 r48", "copy"]
    assert "Error: " in steps["rows"]["3x1"]["absent"]
    assert steps["rows"]["1024x4 r48"]["verdict"] == SAME
    assert frozen["rows"]["copy"]["of_reference"] == 1.0
    for row in [*steps["rows"].values(), *frozen["rows"].values()]:
        assert "absent" in row or row["ms"] > 0
    assert command.table(result).replace("\n\n", "\n") in capsys.readouterr().out.replace("\n\n", "\n")


@interpreted
def test_first_variant_is_timed_without_a_budget() -> None:
    section = SECTIONS["fp32"]
    found = command.measure(section.variants(), Case(section, NUMEL, CPU), Clock(CPU), rounds=20, until=0.0)
    assert found["rounds"] == command.LEAST_ROUNDS
    timed = [label for label, row in found["rows"].items() if "ms" in row]
    assert timed == ["2048x8", "copy"]
    assert found["rows"]["1024x8"] == {"absent": command.NOT_REACHED}
    # fp32 moves 28 bytes per element.
    row = found["rows"]["2048x8"]
    assert row["tb_per_s"] * row["ms"] == pytest.approx(28 * NUMEL / 1e9)


@interpreted
@pytest.mark.parametrize("name", ["fp32, frozen", "bf16 + bfloat16, frozen"])
def test_late_step_changes_no_second_moment(name: str) -> None:
    section = SECTIONS[name]
    assert section.steps is not None and section.steps[-1] == LATE_STEP
    before, after = (Case(section._replace(steps=steps), NUMEL, CPU) for steps in (section.steps[:-1], section.steps))
    for case in (before, after):
        assert case.check(case.call(parse("2048x8"))) == SAME
    assert torch.equal(before.tensors["exp_avg_sq"], after.tensors["exp_avg_sq"])
    assert before.tensors["exp_avg_sq"].count_nonzero() == NUMEL
    assert not torch.equal(before.tensors["exp_avg"], after.tensors["exp_avg"])
    skip_unchanged_v = parse("2048x8 settled")
    assert after.check(after.call(skip_unchanged_v)) == SAME
    assert (
        after.bytes_moved(parse("2048x8")) - after.bytes_moved(skip_unchanged_v) == after.tensors["exp_avg_sq"].nbytes
    )


COMPILING = """
import sys
from adax_triton.bench.launch_variants.compile import compile_all, compile_variant
from adax_triton.bench.launch_variants.variants import SECTIONS, parse
from triton.backends.compiler import GPUTarget

if __name__ == "__main__":
    target = GPUTarget("cuda", 90, 32)
    jobs = {label: (SECTIONS[sys.argv[1]], parse(label), target) for label in ("1024x4 r48", "3x1")}
    assert not compile_all(compile_variant, jobs, 120.0)
"""


def test_variants_compile_without_a_gpu(tmp_path: Path) -> None:
    # Without this test, a compilation error would appear only on a GPU. Starting the processes takes 5 s.
    script, cache = tmp_path / "compiling.py", tmp_path / "cache"
    script.write_text(COMPILING)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-P", str(script), ALL_8BIT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^1024x4 r48: \d+\.\d s$", done.stdout, re.MULTILINE)
    assert re.search(r"^3x1: \w+: ", done.stdout, re.MULTILINE)
    assert len(list(cache.rglob("*.cubin"))) == 1
