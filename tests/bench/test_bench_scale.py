"""Test the scaling benchmark: slopes, points, ZeRO model and a small run.

Oracle of the ZeRO model: hand-computed values.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adax_triton.bench.harness import correctness, timing
from adax_triton.bench.step import scale, zero_model
from paths import ROOT

from adax_triton.cli.main import main

CPU = torch.device("cpu")
# Bytes per second of a step and of a copy. The 28 bytes of a step then take 2 ns, and so do the 46 bytes of DeepSpeed's
# passes. At stage 3 the passes move 42 bytes, in 42 / 23 ns.
RATES = (14e9, 23e9)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace AdaXW by torch's fused AdamW, and use small caches.

    The interpreter is slow.
    """
    (fused,) = [provider for provider in scale.PROVIDERS if provider.label == "torch AdamW fused"]
    monkeypatch.setattr(scale, "PROVIDERS", (dataclasses.replace(fused, name=scale.OURS), fused))
    monkeypatch.setattr(correctness, "SHAPES", [(33, 17), (3,)])
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**20)


def measured(**providers: Any) -> dict[str, Any]:
    """Return a result of `bench step` with step time proportional to size."""
    top = {"environment": {}, "rounds": 2, "dtype": "float32", "bytes_per_element": 28.0}
    sizes = {
        "elements": ((10, 1, 1.0), (20, 1, 2.0), (40, 1, 4.0)),
        "tensors": ((8, 1, 1.0), (16, 2, 2.0), (32, 4, 4.0)),
    }
    workloads = [
        {
            **{"name": f"{line} {index}", "numel": numel, "tensors": tensors},
            "providers": {
                "copy": {"median_ms": ms, "p20_ms": ms, "p80_ms": ms, "host_us": None, "gb_per_s": 1.0},
                **providers,
            },
        }
        for line, points in sizes.items()
        for index, (numel, tensors, ms) in enumerate(points)
    ]
    return {**top, "workloads": workloads}


def test_slope_is_the_exponent() -> None:
    sizes = [10, 1_000, 77_777, 10**9]
    assert scale.slope(sizes, [3e-7 * size**0.75 for size in sizes]) == pytest.approx(0.75)
    assert scale.slope([2, 5], [0.1, 0.1]) == pytest.approx(0)
    with pytest.raises(ValueError, match="two different"):
        scale.slope([5, 5], [1.0, 2.0])


def test_lines_have_one_point_per_workload() -> None:
    given = measured(broken={"absent": "why"})
    given["workloads"].append({"name": "elements 3", "numel": 10**15, "tensors": 1, "providers": {"broken": {}}})
    result = scale.lines_of(given)
    row = result["providers"]["copy"]
    assert [point["numel"] for point in row["elements"]] == [10, 20, 40]
    assert [point["tensors"] for point in row["tensors"]] == [1, 2, 4]
    assert row["elements"][0] == {"numel": 10, "tensors": 1, "median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0}
    assert all(row[f"{line}_slope{last}"] == pytest.approx(1.0) for line in scale.AXES for last in ("", "_last"))
    assert result["copy_bytes_per_s"] == 8 * 40 / 4e-3
    assert result["too_large"] == [10**15]
    assert result["providers"]["broken"] == {"absent": "why"}
    assert "Left out, more than the free memory: 1,000,000,000,000,000." in scale.table(result)


def test_command_measures_both_lines(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scale.json"
    words = ["bench", "scale", "--device=cpu", "--sizes", "1", "999", "--tensors", "1", "5", "--rounds", "2"]
    assert main([*words, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["benchmark"] == "scale"
    assert result["providers"].keys() == {"copy", "torch AdamW fused", "adax_triton.AdaXW"}
    for row in result["providers"].values():
        assert [point["numel"] for point in row["elements"]] == [1, 999]
        assert [point["tensors"] for point in row["tensors"]] == [1, 5]
        points = (*row["elements"], *row["tensors"])
        assert all(0 < point["p20_ms"] <= point["median_ms"] <= point["p80_ms"] for point in points)
    assert scale.table(result) in capsys.readouterr().out


def test_line_needs_two_points(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--sizes", "10", "20", "--tensors", "3"], ["--sizes", "10", "1e15", "--tensors", "1", "2"]):
        assert main(["bench", "scale", "--device=cpu", "--rounds", "2", *words]) == 2
        assert "sizes, tensors" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "scale", "--device=cpu", "--rounds", "0"])


@pytest.mark.parametrize(("stage", "unfused"), [(1, 74), (2, 74), (3, 70)])
def test_bytes_of_a_step(stage: int, unfused: int) -> None:
    assert zero_model.STEP_BYTES + zero_model.pass_bytes(stage) == unfused
    assert zero_model.FUSED_BYTES == 30


@pytest.mark.parametrize(
    ("stage", "fused", "owned", "seconds"),
    [(2, False, 1e9, 2 + 2), (1, True, 1e9, 30 / 14), (3, False, 1e9, 2 + 42 / 23), (3, True, 2.5e9, 2.5 * 30 / 14)],
)
def test_time_of_a_step(stage: int, fused: bool, owned: float, seconds: float) -> None:
    assert zero_model.step_seconds(owned, stage, fused, *RATES) == pytest.approx(seconds)


@pytest.mark.parametrize(("stage", "gigabytes"), [(1, 16 + 16 + 12 + 6), (2, 16 + 2 + 12 + 6), (3, 2 + 2 + 12 + 6)])
def test_memory_of_a_gpu(stage: int, gigabytes: float) -> None:
    assert zero_model.memory_bytes(8e9, 8, stage, False) == pytest.approx(gigabytes * 1e9)
    assert zero_model.memory_bytes(8e9, 8, stage, True) == pytest.approx((gigabytes - 6) * 1e9)


def test_stage_3_flattens_gradients_of_one_sub_group() -> None:
    unfused, fused = (zero_model.memory_bytes(40e9, 8, 3, is_fused) for is_fused in (False, True))
    assert unfused - fused == 6e9


def test_zero_model_needs_gpu_results(capsys: pytest.CaptureFixture[str]) -> None:
    results = ROOT / "bench" / "results"
    assert main(["bench", "scale", "--model", str(results / "nvidia-h100-step.json")]) == 0
    printed = capsys.readouterr().out
    assert "a step at 2,995 GB/s, a copy at 3,025 GB/s" in printed
    assert "| 1T | 3 | 2,900 / 1,250 | " in printed
    for name in ("cpu-step", "nvidia-h100-host"):
        assert main(["bench", "scale", "--model", str(results / f"{name}.json")]) == 2
        assert "on a GPU" in capsys.readouterr().err
