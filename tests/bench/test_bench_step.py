"""The step benchmark: formulas, workloads, statistics and the command."""

import dataclasses
import importlib.util
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from adax_triton.bench.harness import correctness, providers, timing, workloads
from adax_triton.bench.harness.environment import origin
from adax_triton.bench.harness.modes import FP32, MODES, Mode
from adax_triton.bench.harness.providers import PROVIDERS, Provider
from adax_triton.bench.step import command as step_report
from adax_triton.bench.step import measure as step
from adax_triton.bench.step import table as step_table
from paths import SUPPORT
from torch import nn

from adax_triton import AdaXW
from adax_triton.cli.main import main

CPU = torch.device("cpu")
ONE = {"flat 1,000": workloads.flat(1000)}


@pytest.fixture(autouse=True)
def few_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness, "SHAPES", [(33, 17), (3,)])
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**20)


def named(*labels: str) -> list[Provider]:
    return [provider for provider in PROVIDERS if provider.label in labels]


@pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
def test_bytes_per_element_match_tensor_sizes(mode: Mode, native_cpu: torch.device) -> None:
    param = nn.Parameter(torch.ones(128, 64, device=native_cpu, dtype=mode.param_dtype))
    param.grad = torch.ones_like(param)
    optimizer = AdaXW([param], states=mode.precision.states, master_weights=mode.precision.master_weights)
    optimizer.step()
    states = sum(value.nbytes for value in optimizer.state[param].values() if isinstance(value, torch.Tensor))
    # All tensors are read. All except the gradient are written.
    assert mode.bytes_per_element == (2 * param.nbytes + param.grad.nbytes + 2 * states) / param.numel()
    assert mode.state_bytes == states / param.numel()


def test_bytes_per_element_match_the_code_audit() -> None:
    pytest.importorskip("triton")
    spec = importlib.util.spec_from_file_location("code_audit", SUPPORT / "code_audit.py")
    code_audit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code_audit)
    masters = {None: None, "float32": "int16", "24bit": "int8"}
    for mode in MODES.values():
        states, master_weights = mode.precision
        variant = code_audit.StepVariant(
            mode.param_dtype,
            mode.param_dtype,
            states,
            masters[master_weights],
            stochastic=mode.weight_rounding == "stochastic",
        )
        assert variant in code_audit.step_variants(), mode.name


@pytest.mark.parametrize(
    ("shapes", "tensors", "numel"),
    [
        (workloads.gpt2(), 148, 124_439_808),
        (workloads.llama3_8b(), 291, 8_030_261_248),
        (workloads.llama3_8b(ranks=8), 291, 8_030_261_248 // 8),
        (workloads.resnet50(), 161, 25_557_032),
        (workloads.vit_l(), 296, 304_326_632),
        (workloads.many_small_tensors(), 1000, 4_096_000),
        (workloads.flat(7), 1, 7),
    ],
    ids=["gpt2", "llama3-8b", "llama3-8b-shard", "resnet50", "vit-l", "many-small", "flat"],
)
def test_workloads_have_expected_tensor_and_element_counts(shapes: workloads.Shapes, tensors: int, numel: int) -> None:
    assert len(shapes) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes) == numel


def test_statistics_are_computed_from_times_and_bytes() -> None:
    copy, entry = step.Entry(None, times=[0.25, 0.25]), step.Entry(named("adax_triton.AdaXW")[0])
    entry.times, entry.host_times = [0.5, 1.0, 2.0], [1e-4, 2e-4, 3e-4]
    row = step.summarize(entry, copy, 10**9)
    assert row["median_ms"] == 1000.0
    assert row["p20_ms"] == pytest.approx(700.0) and row["p80_ms"] == pytest.approx(1600.0)
    assert row["gb_per_s"] == 28.0
    assert row["copy_share"] == 28 / 32  # the copy moves 8 bytes per element, at 32 GB/s
    assert row["host_us"] == 200.0
    assert step.summarize(copy, copy, 10**9)["gb_per_s"] == 32.0


def test_wrong_provider_is_not_timed() -> None:
    (fused,) = named("torch AdamW fused")
    wrong = dataclasses.replace(fused, name="wrong", second_moment="adax")
    *_, result = step_report.run(ONE, CPU, [fused, wrong], rounds=2, budget=60)
    rows = result["workloads"][0]["providers"]
    assert "WrongResultError" in rows["wrong"]["absent"]
    assert "median_ms" not in rows["wrong"]
    assert rows["torch AdamW fused"]["rounds"] == rows["copy"]["rounds"] == 2
    assert rows["torch AdamW fused"]["error"] <= rows["torch AdamW fused"]["tolerance"]
    assert step_report.failures(result) == {}  # only failures of AdaXW count


def test_missing_providers_are_listed_with_the_reason() -> None:
    (fused,) = named("torch AdamW fused")
    elsewhere = dataclasses.replace(fused, name="GPU only", device_types=("cuda",))
    missing = dataclasses.replace(fused, package="no_such_package")
    passed, rejected = step_report.check_all([missing, elsewhere], CPU, time.perf_counter() + 60)
    assert passed == {}
    reasons = {label: row["absent"] for label, row in rejected.items()}
    assert reasons == {fused.label: "no_such_package is not installed", "GPU only": "not for a CPU"}


def test_every_provider_is_listed_on_every_device(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = step_report.choose(tuple(MODES), None)
    assert set(chosen) == set(PROVIDERS)
    groups = {name: list(group) for name, group in itertools.groupby(chosen, lambda provider: provider.mode.name)}
    assert list(groups) == list(MODES) and sum(map(len, groups.values())) == len(chosen)
    assert all(group[0].name == providers.OURS for group in groups.values())
    assert main(["bench", "step", "--device", "cpu", "--list"]) == 0
    assert "  FlashOptim: absent: not for a CPU" in capsys.readouterr().out


def test_size_is_kept_if_one_mode_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_report, "free_bytes", lambda device: 80e9)
    gpu = torch.device("cuda")
    assert step_report.default_sizes(gpu, ("fp32",))[-1] == 4_000_000_000  # 64 GB
    monkeypatch.setattr(step_report, "free_bytes", lambda device: 40e9)
    assert step_report.default_sizes(gpu, ("fp32",))[-1] == 1_000_000_000
    assert step_report.default_sizes(gpu, ("fp32", "bf16 + 8bit_v16"))[-1] == 4_000_000_000  # 28 GB


def test_failing_adaxw_provider_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def broken(params: list[torch.Tensor], rule: providers.Rule) -> providers.Step:
        raise RuntimeError("no such kernel")

    (ours,) = named("adax_triton.AdaXW")
    monkeypatch.setattr(
        step_report, "PROVIDERS", (dataclasses.replace(ours, build=broken), *named("torch AdamW fused"))
    )
    words = ["bench", "step", "--device", "cpu", "--sizes", "10", "--models", "--rounds", "1"]
    assert main([*words, "--only", "AdaXW", "fused"]) == 1
    assert "adax_triton.AdaXW: RuntimeError: no such kernel" in capsys.readouterr().err


def test_no_check_starts_after_its_budget() -> None:
    (fused,) = named("torch AdamW fused")
    passed, rejected = step_report.check_all([fused], CPU, time.perf_counter() - 1)
    assert (passed, rejected[fused.label]["absent"]) == ({}, step_report.NOT_REACHED)


def test_slow_compilation_runs_once() -> None:
    (fused,) = named("torch AdamW fused")
    slow = dataclasses.replace(fused, name="slow", compiles_long=True)
    rows = step.measure([fused, slow], [(5,)], timing.Clock(CPU), CPU, rounds=4, seconds=60.0)
    assert [rows[name]["rounds"] for name in ("torch AdamW fused", "slow", "copy")] == [4, 2, 4]


def test_cases_beyond_the_budget_are_not_failures() -> None:
    *_, result = step_report.run(ONE, CPU, named("adax_triton.AdaXW"), rounds=1, budget=1e-9)
    row = result["workloads"][0]["providers"]["adax_triton.AdaXW"]
    assert row["absent"] == step_report.NOT_REACHED
    assert step_report.failures(result) == {}


def test_slow_compilations_are_opt_in() -> None:
    compiled = dataclasses.replace(named("torch AdamW fused")[0], compiles_long=True)
    for asked in (False, True):
        *_, result = step_report.run({"two": [(5,), (7,)]}, CPU, [compiled], rounds=1, budget=60, compile_long=asked)
        row = result["workloads"][0]["providers"][compiled.label]
        assert ("median_ms" in row) == asked
        assert asked or "--only" in row["absent"]


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (1e12, [["adax_triton.AdaXW", "adax_triton.AdamW", "torch AdamW fused", "torch AdamW foreach"]]),
        # Parameters, gradients and the copy take 16 GB; the states of each provider take 8 GB.
        (
            (16e9 + 2.5 * 8e9) / step.USABLE,
            [["adax_triton.AdaXW", name] for name in ("adax_triton.AdamW", "torch AdamW fused", "torch AdamW foreach")],
        ),
        ((16e9 + 1.5 * 8e9) / step.USABLE, None),
        (16e9, []),
    ],
    ids=["all", "two", "one", "none"],
)
def test_batches_fit_in_memory_and_include_adaxw(
    free: float, expected: list[list[str]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "free_bytes", lambda device: free)
    chosen = named("adax_triton.AdaXW", "adax_triton.AdamW", "torch AdamW fused", "torch AdamW foreach")
    found = [[provider.label for provider in batch] for batch in step.memory_batches(chosen, 10**9, CPU)]
    assert found == ([[provider.label] for provider in chosen] if expected is None else expected)


def test_too_large_workload_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "free_bytes", lambda device: 1e9)
    rows = step.measure(named("adax_triton.AdaXW"), workloads.flat(10**9), None, CPU, 1, 1.0)
    assert "16 GB" in rows["adax_triton.AdaXW"]["absent"]


def test_report_renders_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.json"
    words = ["bench", "step", "--device", "cpu", "--sizes", "1000", "--models", "--modes", "fp32", "--rounds", "2"]
    assert main([*words, "--only", "fused", "AdaXW", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["benchmark"] == "step"
    assert (result["dtype"], result["bytes_per_element"]) == ("float32", 28.0)
    text = capsys.readouterr().out
    assert text.strip() == f"{origin(result)}\n\n{step_table.table(result)}"
    assert result["environment"]["commit"] in text
    (workload,) = result["workloads"]
    for name in ("adax_triton.AdaXW", "torch AdamW fused", "copy"):
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert line.count("|") == 11  # no GPU columns
        assert workload["providers"][name]["median_ms"] > 0
    row = workload["providers"]["adax_triton.AdaXW"]
    assert row["mode"] == FP32.name
    assert row["ours_over_this"] == 1.0
    for key in ("host_us", "peak_bytes", "launches"):  # measured only on a GPU
        assert row[key] is None


def test_list_prints_planned_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--device", "cpu", "--list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert {f"  {mode.name}: {mode.bytes_per_element:g}" for mode in MODES.values()} <= set(printed)
    assert "  GPT-2 small, 148 tensors: 124,439,808 elements" in printed
    assert "  adax_triton.AdaXW, bf16 + 8bit_v16" in printed
    assert main(["bench", "step", "--device", "cpu", "--sizes", "1e6", "--models", "--modes", "fp32", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "flat 1,000,000" in printed
    assert "GPT-2" not in printed and "bf16" not in printed


@pytest.mark.parametrize(
    ("words", "named_in_error"),
    [
        (["--only", "no-such-thing"], "no-such-thing"),
        (["--sizes", "1.5"], "1.5"),
        (["--sizes", "0"], "'0'"),
        (["--sizes", "inf"], "'inf'"),
        (["--sizes", "--models"], "no workload"),
        (["--rounds", "0"], "'0'"),
        (["--budget", "-1"], "'-1'"),
        (["--modes", "fp64"], "fp64"),
        (["--models", "gpt5"], "gpt5"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_bad_arguments_are_named(words: list[str], named_in_error: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["bench", "step", "--device", "cpu", *words])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert named_in_error in capsys.readouterr().err
