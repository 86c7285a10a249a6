"""The benchmark of CPU steps, and the count of the functions that a step calls."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adax_triton.bench import host
from adax_triton.bench.step import cpu, cpu_processes, cpu_workloads
from adax_triton.bench.step import functions as step_functions
from adax_triton.bench.step.cpu_workloads import OURS, WITHOUT, WORKLOADS, Sizes, Timed, Workload
from paths import ROOT

TINY = Sizes(numel=97, gpt2=(1, 8, 11, 4), tensors=3, linears=2, first_numel=10)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what only makes times exact, and DeepSpeed's import."""
    monkeypatch.setattr(cpu_workloads, "PAUSE_S", 0.0)
    peer = cpu_workloads.peer

    def without_deepspeed(name: str, params: list[torch.Tensor]) -> Timed:
        if name == cpu_workloads.DEEPSPEED:
            raise ImportError("no DeepSpeed here")
        return peer(name, params)

    monkeypatch.setattr(cpu_workloads, "peer", without_deepspeed)


def test_every_workload_is_timed_and_kept(
    quick: None, native_cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cpu, "first_steps", lambda *_: {cache: {OURS: [0.2, 0.1, 0.3]} for cache in ("empty", "filled")}
    )
    result = json.loads(json.dumps(cpu.run(list(WORKLOADS), TINY, rounds=5, limit_s=0.0, processes=3)))
    assert result.keys() == {"benchmark", "environment", "sizes", "package", "rows"}
    assert result["environment"]["commit"]
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [*WORKLOADS, *map(cpu.FIRST_STEP.format, ("empty", "filled"))]
    for name, row in rows.items():
        assert row["rounds"] == (5 if name in WORKLOADS else 3)
        for side, found in row["sides"].items():
            if side == cpu_workloads.DEEPSPEED:
                assert found == {"absent": "ImportError: no DeepSpeed here"}
                continue
            if name != "gradient release, per parameter":  # a difference of times of tiny models
                assert 0 < found["p20_ms"] <= found["median_ms"] <= found["p80_ms"]
            if side != OURS:
                assert found["ours_over_this"] == row["sides"][OURS]["median_ms"] / found["median_ms"]
    assert rows["first step of a process, cache empty"]["sides"][OURS]["median_ms"] == 200
    lines = cpu.table(result).splitlines()
    assert all(any(line.startswith(f"| {name} | ") for line in lines) for name in rows)
    assert lines[-1].count("no DeepSpeed here") == 2


def test_time_without_is_subtracted_and_shared_by_the_parts(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    monkeypatch.setattr(cpu, "seconds", lambda timed, repeats: timed.run() / repeats)
    sides = {OURS: lambda: Timed(lambda: 12.0), WITHOUT: lambda: Timed(lambda: 4.0)}
    monkeypatch.setitem(WORKLOADS, "stub", Workload(lambda sizes: sides, 2, lambda sizes: 8))
    baseline = SimpleNamespace(start=lambda *_: None, sample=lambda: {OURS: 10.0, WITHOUT: 2.0})
    row = cpu.measure("stub", TINY, 5, 0.0, baseline)
    assert {side: found["median_ms"] for side, found in row["sides"].items()} == {OURS: 500.0, cpu.BASELINE: 1000.0}
    assert row["sides"][cpu.BASELINE]["ours_over_this"] == 0.5


def test_our_own_failure_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Timed:
        raise ValueError("broken")

    monkeypatch.setitem(WORKLOADS, "stub", Workload(lambda sizes: {OURS: fail}))
    with pytest.raises(RuntimeError, match="stub: ValueError: broken"):
        cpu.measure("stub", TINY, 1, 0.0)


def test_what_is_prepared_is_not_timed(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(cpu_workloads.time, "perf_counter", lambda: clock[0])

    def spend(seconds: float) -> None:
        clock[0] += seconds

    assert cpu_workloads.seconds(Timed(lambda: spend(1.0), lambda: spend(100.0)), 3) == 1.0


def test_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a folder that has adax_triton in it"):
        cpu_processes.Baseline(tmp_path)


def test_another_copy_steps_in_its_own_process(tmp_path: Path) -> None:
    root = ROOT
    package = shutil.copytree(root / "adax_triton", tmp_path / "adax_triton", ignore=shutil.ignore_patterns("__py*"))
    for folder in ("kernels", "bench", "integrations"):  # as installed
        (package / folder).symlink_to(root / folder)
    baseline = cpu_processes.Baseline(tmp_path)
    try:
        assert baseline.start("gradient release, per parameter", TINY) is None
        assert baseline.sample().keys() == {OURS, WITHOUT}
        assert baseline.start("fp32, one tensor of 1,000", TINY) is None
        assert baseline.sample()[OURS] > 0
    finally:
        baseline.close()


def test_first_steps_find_an_empty_cache_and_then_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(arguments: list[str], environment: dict[str, str]) -> dict[str, float]:
        cache = Path(environment["XDG_CACHE_HOME"])
        filled = list(cache.iterdir())
        seen.append((arguments[1], environment.get("PYTHONPATH"), bool(filled)))
        (cache / "kernel").touch()
        return {"seconds": 1.0}

    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(cpu_processes, "_run", run)
    found = cpu_processes.first_steps(TINY, 2, tmp_path)
    sides = [(OURS, None), (cpu_workloads.FUSED, None), (OURS, str(tmp_path))]
    assert seen == 2 * [(*side, filled) for side in sides for filled in (False, True)]
    times = {side: [1.0, 1.0] for side in (OURS, cpu_workloads.FUSED, cpu.BASELINE)}
    assert found == {"empty": times, "filled": times}


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
