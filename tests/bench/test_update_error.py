"""Test the measurement of update errors: statistics and goals.

v freezes with rounding to nearest but not in our modes.
"""

import json
from pathlib import Path

import pytest
import torch
from adax_triton.bench.precision import long_run, update_error
from adax_triton.bench.precision.comparison import Comparison

NEAREST = "bfloat16, v to nearest"
ROOTS = "8-bit root of v, to nearest"
FIGURES = {
    *("update_error", "update_bias", "largest_update_ratio", "m_error", "m_error_end"),
    *("v_bias", "v_bias_median", "v_bias_mean", "v_bias_end", "zero_codes", "unseen_largest_update"),
}


def test_short_run_writes_all_figures(
    native_cpu: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "precision.json"
    arguments = ["--steps", "60", "--kinds", "multi-scale", "sparse", "--out", str(out)]
    code = update_error.main(arguments)
    result = json.loads(out.read_text())
    assert {"commit", "torch", "date"} <= result["environment"].keys()
    assert (result["steps"], result["numel"], result["seed"]) == (60, 4096, 0)
    met = []
    for rows in result["kinds"].values():
        assert list(rows) == list(update_error.MODES)
        for name, figures in rows.items():
            judged = name in update_error.MAX_ERROR
            assert figures.keys() == FIGURES | ({"goals"} if judged else set())
            met += figures["goals"].values() if judged else []
        assert rows["float32"]["update_error"] < 1e-5
        assert rows["8bit_v16"]["zero_codes"] == rows["8bit"]["zero_codes"] == 0
        assert rows["8bit"]["unseen_largest_update"] == 0
    assert code == (0 if all(met) else 1)
    _, _, *table = capsys.readouterr().out.splitlines()  # after the machine and an empty line
    assert len(table) == 2 + 2 * len(update_error.MODES)
    assert {line.count("|") for line in table} == {table[0].count("|")}


def test_nearest_rounding_zeroes_v_in_mixed_groups_but_our_modes_do_not(native_cpu: torch.device) -> None:
    rows = update_error.compare("multi-scale", 30)
    assert rows[ROOTS]["zero_codes"] > 50
    assert rows[ROOTS]["largest_update_ratio"] > 10
    for name in update_error.MAX_ERROR:
        assert rows[name]["zero_codes"] == 0
        assert rows[name]["largest_update_ratio"] < 2


@pytest.mark.parametrize(("large", "steps"), [(0.5, 300), (1.2, 300)])
def test_nearest_rounding_freezes_v_late_but_our_modes_are_unbiased(
    native_cpu: torch.device, large: float, steps: int
) -> None:
    numel = 4096
    comparison = Comparison(update_error.MODES, (numel,), update_error.BETAS, seed=0)
    ones = [torch.ones(numel)] * (len(update_error.MODES) + 1)
    comparison.step(ones, lr=1.0)  # v is 1 after the first step
    state = comparison.optimizer.state_dict()
    for of_param in state["state"].values():
        of_param["step"] = comparison.steps = 9_999
    comparison.optimizer.load_state_dict(state)
    for _ in range(steps):
        comparison.step([large * one for one in ones], lr=1.0)
    moved = comparison.exact_moments[1].mean().item() - 1
    assert abs(moved) > 5e-3
    moments = dict(zip(update_error.MODES, comparison.moments(), strict=True))
    change = {name: v.double().mean().item() - 1 for name, (_, v) in moments.items()}
    assert change[NEAREST] == 0.0
    # Standard error of the mean over elements: sqrt(spacing * moved / numel), with the spacing of the format.
    for name, spacing in (("bfloat16", 2.0**-7), ("8bit_v16", 2.0**-8), ("8bit", 2.0**-3)):
        assert abs(change[name] - moved) < 4 * (spacing * abs(moved) / numel) ** 0.5


def test_roots_of_v_are_rounded_to_half_a_code() -> None:
    first, second = torch.ones(64), torch.cat((torch.linspace(0, 4, 32), torch.zeros(32)))
    exact = second.clone()
    update_error.to_8bit_roots(first, second)
    assert torch.equal(first, torch.ones(64))
    assert (second.sqrt() - exact.sqrt()).abs().max() <= 2 / 255 / 2 * 1.001
    assert torch.equal(second[32:], torch.zeros(32))


def test_error_stats_of_known_updates() -> None:
    exact = torch.tensor([3.0, 4.0, 0.0, 0.0], dtype=torch.float64)
    stats = update_error.ErrorStats(2, 4, 2)
    updates = torch.stack((exact.float() * 2, torch.tensor([3.0, 4.0, 5.0, 7.0])))
    for step, grad in ((1, torch.tensor([1.0, 1.0, 1.0, 0.0])), (2, torch.zeros(4))):
        stats.add_updates(step, grad, updates, exact)
    v = torch.tensor([1.0, 1.0, 1.0, 0.0])
    stats.add_moments([(v, v * 4), (v, torch.tensor([1.0, 0.0, 1.0, 0.0]))], [v.double(), v.double()])
    doubled, stray = stats.figures()
    assert (doubled["update_error"], doubled["update_bias"], doubled["largest_update_ratio"]) == (1.0, 1.0, 2.0)
    assert doubled["v_bias_median"] == doubled["v_bias_mean"] == pytest.approx(3) == doubled["v_bias"]
    assert stray["update_error"] == pytest.approx((74 / 25) ** 0.5)
    assert (stray["update_bias"], stray["zero_codes"], stray["unseen_largest_update"]) == (0.0, 1, 7.0)


def test_goals_name_what_failed() -> None:
    good = dict.fromkeys(FIGURES, 0)
    assert all(update_error.goals("8bit", good).values())
    bad = update_error.goals("8bit_v16", {**good, "update_error": 0.031, "v_bias": -0.011, "zero_codes": 1})
    assert [name for name, met in bad.items() if not met] == ["update_error", "v_bias", "zero_codes"]


@pytest.mark.parametrize("kind", update_error.KINDS)
def test_gradients_repeat_with_their_seed(kind: str) -> None:
    first, again = (update_error.gradients(kind, 64, 9, torch.Generator().manual_seed(1)) for _ in range(2))
    for step in range(1, 10):
        grad = first(step)
        assert grad.dtype == torch.float32 and grad.shape == (64,)
        assert torch.equal(grad, again(step))


def test_long_run_compares_modes_on_the_same_batches(native_cpu: torch.device, tmp_path: Path) -> None:
    out = tmp_path / "long.json"
    assert long_run.main(["--steps", "40", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    final = result["final"]
    assert list(final) == [*long_run.MODES, "float64"]
    assert final["float32"]["v_ratio"] == 1.0
    assert final["float64"]["risk"] == pytest.approx(final["float32"]["risk"], rel=1e-3)
    assert final["8bit_v16"]["risk"] == pytest.approx(final["float32"]["risk"], rel=2e-2)
    rates = {row["lr"]: row for row in result["learning_rates"]}
    assert rates[long_run.LR]["float32"] == pytest.approx(final["float32"]["risk"], rel=1e-3)
    assert rates[long_run.LR][long_run.CONTROL] == pytest.approx(final[long_run.CONTROL]["risk"], rel=1e-3)
