"""Test the CPU step benchmark and the count of called functions."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from adax_triton.bench import host
from adax_triton.bench.harness import correctness, timing
from adax_triton.bench.harness.providers import Rule, Step
from adax_triton.bench.step import cpu
from adax_triton.bench.step import functions as step_functions
from adax_triton.bench.step.cpu import FUSED, OUR_SIDE, OURS, WORKLOADS, Sizes, Workload

TINY = Sizes(numel=97, gpt2=(1, 8, 11, 4), tensors=3, linears=2, first_numel=10)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip pauses and large caches that only improve timing accuracy."""
    monkeypatch.setattr(timing, "_PAUSE_S", 0.0)
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**20)
    monkeypatch.setattr(correctness, "SHAPES", [(33, 17), (3,)])


@pytest.fixture
def without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (shapes, providers) in WORKLOADS.items():
        replaced = tuple(
            dataclasses.replace(one, package="no_such_package") if one.package == "deepspeed" else one
            for one in providers
        )
        monkeypatch.setitem(WORKLOADS, name, Workload(shapes, replaced))


def test_every_workload_is_timed_and_written(
    without_deepspeed: None, native_cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_first_step", lambda label, numel, environment: 0.2)
    result = json.loads(json.dumps(cpu.run(list(WORKLOADS), TINY, rounds=5, processes=3)))
    assert result.keys() == {"benchmark", "environment", "sizes", "rows"}
    assert result["environment"]["commit"]
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [*WORKLOADS, *map(cpu.FIRST_STEP.format, ("empty", "filled"))]
    for name, row in rows.items():
        assert row["rounds"] == (5 if name in WORKLOADS else 3)
        for side, found in row["sides"].items():
            if side == "DeepSpeedCPUAdam":
                assert found == {"absent": "no_such_package is not installed"}
                continue
            assert 0 < found["p20_ms"] <= found["median_ms"] <= found["p80_ms"]
            if side != OUR_SIDE:
                assert found["ours_over_this"] == row["sides"][OUR_SIDE]["median_ms"] / found["median_ms"]
    assert rows["first step of a process, cache empty"]["sides"][OUR_SIDE]["median_ms"] == 200
    lines = cpu.table(result).splitlines()
    assert all(any(line.startswith(f"| {name} | ") for line in lines) for name in rows)
    assert lines[-1].count("no_such_package is not installed") == 1


def test_failure_of_adaxw_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(params: list[torch.Tensor], rule: Rule) -> Step:
        raise ValueError("broken")

    broken = dataclasses.replace(cpu.provider(OURS), build=fail)
    monkeypatch.setitem(WORKLOADS, "stub", Workload(lambda sizes: [(5,)], (broken,)))
    with pytest.raises(RuntimeError, match="stub: ValueError: broken"):
        cpu.run(["stub"], TINY, rounds=1, processes=0)


def test_gradient_release_equals_step_after_backward(native_cpu: torch.device) -> None:
    released, after = WORKLOADS["gradient release"].providers
    weights = []
    for provider in (released, after):
        params = cpu.make_params([(3, 4), (4,)], native_cpu, seed=0)
        step = provider.build(params, cpu.RULES["adax"])
        step()
        step()
        weights.append(torch.cat([param.detach().flatten() for param in params]))
    assert torch.equal(*weights)


def test_first_step_is_timed_with_empty_and_filled_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def first_step(label: str, numel: int, environment: dict[str, str]) -> float:
        cache = Path(environment["XDG_CACHE_HOME"])
        seen.append((label, bool(list(cache.iterdir()))))
        (cache / "kernel").touch()
        return 1.0

    monkeypatch.setattr(cpu, "_first_step", first_step)
    rows = cpu.time_first_steps(10, 2)
    assert seen == 2 * [(label, filled) for label in (OURS, FUSED) for filled in (False, True)]
    assert [row["name"] for row in rows] == [cpu.FIRST_STEP.format(cache) for cache in ("empty", "filled")]
    assert all(side["median_ms"] == 1000.0 for row in rows for side in row["sides"].values())


def test_first_step_runs_in_a_new_process() -> None:
    assert cpu._first_step(FUSED, 10, os.environ) > 0


def test_later_step_calls_fewer_functions_than_the_first(native_cpu: torch.device) -> None:
    found = step_functions.trace()
    first, steady = found["first"], found["steady"]
    assert first[0] == steady[0] == "adax_triton/moment_optimizer.py: MomentOptimizer.step"
    assert len(steady) < len(first)
    assert "adax_triton/step/plan.py: StepPlan.__init__" in set(first) - set(steady)
    assert any(name.startswith("kernels/") for name in first)
    assert not any("bench" in name or "torch" in name for name in first)


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are real on a GPU")
def test_functions_of_the_gpu_path_are_counted_and_named() -> None:
    with host.launching(torch.device("cpu")):
        steps = step_functions.trace()
    assert any("TritonLaunch.run" in name for name in steps["steady"])
    table = step_functions.table({"functions": {"GPU": steps}}, names=True)
    named = [name for name in steps["steady"] if not name.endswith(">")]
    assert f"| GPU | steady | {len(named)} (+{len(steps['steady']) - len(named)}) | " in table
    assert "GPU, steady:" in table.splitlines()
