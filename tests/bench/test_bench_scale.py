"""Scaling: the slopes, the fit and the model of ZeRO against values by hand; the benchmark itself, small."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from adax_triton.bench.harness.providers import Provider
from adax_triton.bench.harness.timing import Clock
from adax_triton.bench.harness.workloads import Shapes
from adax_triton.bench.step import scale, scale_model
from adax_triton.bench.step.scale_model import Point, Rates, StepTime
from adax_triton.bench.step.scale_table import table

# 28 bytes at 14 GB/s are 2 ns; the 46 of DeepSpeed's passes at 23 GB/s another 2, its 42 at stage 3 are 42/23.
RATES = Rates(StepTime(call_s=0.5, tensor_s=0.25, bytes_per_s=14e9), copy=23e9)


def test_slope_is_the_exponent() -> None:
    sizes = [10, 1_000, 77_777, 10**9]
    assert scale_model.slope(sizes, [3e-7 * size**0.75 for size in sizes]) == pytest.approx(0.75)
    assert scale_model.slope([2, 5], [0.1, 0.1]) == pytest.approx(0)
    with pytest.raises(ValueError, match="two different"):
        scale_model.slope([5, 5], [1.0, 2.0])


def test_fit_recovers_the_constants_of_exact_points() -> None:
    truth = StepTime(call_s=20e-6, tensor_s=3e-6, bytes_per_s=40e9)
    flat = [Point(numel, 1, truth.seconds(numel, 1, 28)) for numel in (1_000, 100_000, 50_000_000)]
    many = [Point(1024 * count, count, truth.seconds(1024 * count, count, 28)) for count in (1, 7, 64, 1000)]
    fitted = scale_model.fit(flat, many, 28)
    assert fitted == pytest.approx(truth, rel=1e-3)


def test_fit_has_no_negative_constants_and_refuses_what_shows_no_rate() -> None:
    flat = [Point(1_000, 1, 1e-6), Point(10**8, 1, 1e-1)]
    falling = [Point(1024, 1, 5e-5), Point(1024 * 64, 64, 1e-5)]
    steep = [Point(1024, 1, 1e-6), Point(1024 * 10, 10, 1e-4)]
    assert scale_model.fit(flat, falling, 28).tensor_s == 0
    assert scale_model.fit(flat, steep, 28).call_s == 0
    with pytest.raises(ValueError, match="larger sizes"):
        scale_model.fit([Point(10, 1, 1e-6)], falling, 28)


@pytest.mark.parametrize(("stage", "unfused"), [(1, 74), (2, 74), (3, 70)])
def test_bytes_of_a_step(stage: int, unfused: int) -> None:
    assert scale_model.step_bytes(stage, fused=False) == unfused
    assert scale_model.step_bytes(stage, fused=True) == 30
    # m and v read and written: 2 * 8 bytes become 2 * (1 + 2 + 1/32).
    assert scale_model.step_bytes(stage, fused=False, states="8bit_v16") == unfused - 16 + 6.0625
    assert scale_model.step_bytes(stage, fused=True, states="8bit_v16") == 30 - 16 + 6.0625


@pytest.mark.parametrize(
    ("stage", "fused", "owned", "seconds"),
    [
        (2, False, 1e9, 0.75 + 2 + 2),
        (1, True, 1e9, 0.75 + 30 / 14),
        (3, False, 1e9, 0.75 + 2 + 42 / 23),
        (3, True, 2.5e9, 3 * 0.75 + 2.5 * 30 / 14),  # three sub-groups
    ],
)
def test_time_of_a_step(stage: int, fused: bool, owned: float, seconds: float) -> None:
    assert scale_model.step_seconds(8 * owned, 8, stage, fused, RATES, "float32") == pytest.approx(seconds)


@pytest.mark.parametrize(("stage", "gigabytes"), [(1, 16 + 16 + 12 + 6), (2, 16 + 2 + 12 + 6), (3, 2 + 2 + 12 + 6)])
def test_memory_of_a_gpu(stage: int, gigabytes: float) -> None:
    assert scale_model.memory_bytes(8e9, 8, stage, False, "float32") == pytest.approx(gigabytes * 1e9)
    assert scale_model.memory_bytes(8e9, 8, stage, True, "float32") == pytest.approx((gigabytes - 6) * 1e9)
    # 4 + 8 bytes of master and states become 4 + 3.03125.
    assert scale_model.memory_bytes(8e9, 8, stage, True, "8bit_v16") == pytest.approx((gigabytes - 6 - 4.96875) * 1e9)


def test_flat_gradients_of_stage_3_are_of_one_sub_group() -> None:
    unfused, fused = (scale_model.memory_bytes(40e9, 8, 3, is_fused, "float32") for is_fused in (False, True))
    assert unfused - fused == 6e9


def test_gathering_is_of_all_weights_that_others_own() -> None:
    assert scale_model.gather_seconds(8e9, 8, 2, network=7e9) == 2.0
    assert scale_model.gather_seconds(8e9, 8, 3, network=7e9) == 0.0


@pytest.fixture
def quick_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's fused step also in the place of ours, which would compile for most of a minute."""
    (fused,) = [provider for provider in scale.PROVIDERS if provider.label == "torch AdamW fused"]
    monkeypatch.setattr(scale, "PROVIDERS", (fused, dataclasses.replace(fused, name=scale.OURS)))


def test_points_are_measured(quick_providers: None) -> None:
    said: list[str] = []
    cpu = torch.device("cpu")
    points = scale._measure(
        list(scale.PROVIDERS), [(3,), (7, 5)], Clock(cpu), cpu, 2, lambda count, now: said.append(now)
    )
    assert points.keys() == {"copy", "torch AdamW fused", "adax_triton.AdaXW"}
    assert all(point["numel"] == 38 and point["tensors"] == 2 for point in points.values())
    assert all(0 < point["p20_ms"] <= point["median_ms"] <= point["p80_ms"] for point in points.values())
    assert said == ["38 elements, 2 tensors"] * 2


def test_command_fits_and_extends(
    quick_providers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = StepTime(call_s=20e-6, tensor_s=3e-6, bytes_per_s=40e9)

    def measured(providers: list[Provider], shapes: Shapes, *_: object) -> dict[str, dict[str, float]]:
        numel = sum(torch.Size(shape).numel() for shape in shapes)
        seconds = truth.seconds(numel, len(shapes), 28)
        names = ["copy", *(provider.label for provider in providers)]
        return {name: scale._point(numel, len(shapes), [seconds]) for name in names}

    monkeypatch.setattr(scale, "_measure", measured)  # a busy machine's times may show no line
    parser = argparse.ArgumentParser()
    scale.add_arguments(parser)
    file = tmp_path / "scale.json"
    flags = ["--device=cpu", "--sizes", "1", "999", "2e8", "--tensors", "1", "5", "--network=50"]
    monkeypatch.setattr(scale, "free_bytes", lambda device: 1e12)
    assert scale.main(parser.parse_args([*flags, "--json", str(file)])) == 0
    result = json.loads(file.read_text())
    assert result["benchmark"] == "scale"
    ours = result["providers"]["adax_triton.AdaXW"]
    assert [point["numel"] for point in ours["elements"]] == [1, 999, 200_000_000]
    assert [point["tensors"] for point in ours["tensors"]] == [1, 5]
    assert result["fit"] == pytest.approx(truth._asdict(), rel=1e-3)
    assert all(abs(point["model_error"]) < 1e-3 for line in ("elements", "tensors") for point in ours[line])
    assert ours["tensors_slope"] == scale_model.slope([1, 5], [point["median_ms"] for point in ours["tensors"]])
    assert len(result["paper"]["rows"]) == 3 * 5 * 4
    assert table(result) in capsys.readouterr().out
    assert "with those fused" in table(result)
    assert "50 GB/s: 1B: 40 ms" in table(result)


def test_given_bandwidth_takes_the_share_of_the_step() -> None:
    result = {"fit": {"call_s": 0.0, "tensor_s": 0.0, "bytes_per_s": 9e9}, "copy_bytes_per_s": 10e9}
    scale.extend(result, bandwidth=100.0, network=None, states="float32")
    assert result["paper"]["step_bytes_per_s"] == pytest.approx(90e9)
    assert result["paper"]["copy_bytes_per_s"] == 100e9
    result["fit"]["bytes_per_s"] = 15e9
    scale.extend(result, bandwidth=100.0, network=None, states="float32")
    assert result["paper"]["step_bytes_per_s"] == pytest.approx(100e9)
    with pytest.raises(ValueError, match="bandwidth"):
        scale.extend(result, bandwidth=0.0, network=None, states="float32")


def test_bad_lines_are_refused() -> None:
    cpu = torch.device("cpu")
    ours = scale.choose(["AdaXW"])
    with pytest.raises(ValueError, match="tensors"):
        scale.run(cpu, (10, 20), (3,), 10, 1, ours)
    with pytest.raises(ValueError, match="sizes"):
        scale.run(cpu, (10, 10**15), (1, 2), 10, 1, ours)
    with pytest.raises(ValueError, match="rounds"):
        scale.run(cpu, (10, 20), (1, 2), 10, 0, ours)


def test_only_leaves_out_others_but_never_ours(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    scale.add_arguments(parser)
    assert [provider.label for provider in scale.choose(["AdaXW"])] == [scale.OURS]
    assert [provider.label for provider in scale.choose(["fused"])] == [scale.OURS, "torch AdamW fused"]
    assert scale.main(parser.parse_args(["--device=cpu", "--quick", "--list"])) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [scale.OURS, "torch AdamW fused"]
    assert "1,000, 30,000, 1,000,000" in printed[2]
    assert scale.main(parser.parse_args(["--device=cpu", "--only", "nobody"])) == 2
    assert "nobody" in capsys.readouterr().err
