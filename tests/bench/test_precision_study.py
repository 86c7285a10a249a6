"""The precision study: its measure, its goals, and that it sees rounding to nearest freeze where ours does not."""

import json
from pathlib import Path

import pytest
import torch
from adax_triton.bench.precision import gradients, long_run
from adax_triton.bench.precision import study as precision_study
from adax_triton.bench.precision.error_stats import Tally

from adax_triton.update.rounding import random_bits, random_key

NEAREST = "bfloat16, v to nearest"
ROOTS = "8-bit root of v, to nearest"
FIGURES = {
    *("update_error", "update_bias", "largest_update_ratio", "m_error", "m_error_end"),
    *("v_bias", "v_bias_median", "v_bias_mean", "v_bias_end", "zero_codes", "unseen_largest_update"),
}


def test_short_study_leaves_all_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "precision.json"
    arguments = ["--steps", "60", "--numel", "256", "--kinds", "multi-scale", "sparse", "--eager", "--out", str(out)]
    code = precision_study.main(arguments)
    result = json.loads(out.read_text())
    assert {"commit", "torch", "date"} <= result["environment"].keys()
    assert (result["steps"], result["numel"], result["seed"]) == (60, 256, 0)
    met = []
    for rows in result["kinds"].values():
        assert list(rows) == list(precision_study.MODES)
        for name, figures in rows.items():
            judged = name in precision_study.MOST_ERROR
            assert figures.keys() == FIGURES | ({"goals"} if judged else set())
            met += figures["goals"].values() if judged else []
        assert rows["float32"]["update_error"] < 1e-5
        assert rows["8bit_v16"]["zero_codes"] == rows["8bit"]["zero_codes"] == 0
        assert rows["8bit"]["unseen_largest_update"] == 0
    assert code == (0 if all(met) else 1)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 2 * len(precision_study.MODES)
    assert {line.count("|") for line in table} == {table[0].count("|")}


def test_group_of_many_scales_has_zeros_to_nearest_and_none_of_ours() -> None:
    rows = precision_study.study("multi-scale", 30, 256, 0, eager=True)
    assert rows[ROOTS]["zero_codes"] > 50
    assert rows[ROOTS]["largest_update_ratio"] > 10
    for name in precision_study.MOST_ERROR:
        assert rows[name]["zero_codes"] == 0
        assert rows[name]["largest_update_ratio"] < 2


@pytest.mark.parametrize(("large", "steps"), [(0.5, 300), (1.2, 300)])
def test_nearest_freezes_late_in_a_run_and_ours_is_unbiased(large: float, steps: int) -> None:
    numel, start = 2048, 10_000
    stored = {}
    for name, mode in precision_study.MODES.items():
        stored[name] = precision_study.new_moments(mode, numel)
        precision_study.store(torch.zeros(numel), torch.ones(numel), stored[name], None)
    exact = torch.zeros(numel, dtype=torch.float64), torch.ones(numel, dtype=torch.float64)
    grad, index = torch.full((numel,), large), torch.arange(numel, dtype=torch.int32)
    for step in range(start, start + steps):
        scalars = precision_study.scalars_of(step)
        random = random_bits(index, random_key(0, step))
        precision_study.advance_exact(grad.double(), *exact, scalars)
        for name in ("bfloat16", "8bit_v16", "8bit", NEAREST, ROOTS):
            bits = random if precision_study.MODES[name].stochastic else None
            precision_study.advance(grad, stored[name], scalars.float(), bits)
    moved = exact[1].mean().item() - 1
    assert abs(moved) > 5e-3
    change = {name: precision_study.load(moments)[1].double().mean().item() - 1 for name, moments in stored.items()}
    assert change[NEAREST] == 0.0
    # Standard errors of the mean over the elements: root of (a bfloat16's, low's and lowest's spacing) * moved / numel.
    for name, spacing in (("bfloat16", 2.0**-7), ("8bit_v16", 2.0**-8), ("8bit", 2.0**-3)):
        assert abs(change[name] - moved) < 4 * (spacing * abs(moved) / numel) ** 0.5


def test_roots_of_v_come_back_within_half_a_code() -> None:
    stored = precision_study.new_moments(precision_study.MODES[ROOTS], 64)
    second = torch.cat((torch.linspace(0, 4, 32), torch.zeros(32)))
    precision_study.store(torch.ones(64), second, stored, None)
    first, loaded = precision_study.load(stored)
    assert torch.equal(first, torch.ones(64))
    assert (loaded.sqrt() - second.sqrt()).abs().max() <= 2 / 255 / 2 * 1.001
    assert torch.equal(loaded[32:], torch.zeros(32))


def test_tally_of_known_updates() -> None:
    exact = torch.tensor([3.0, 4.0, 0.0, 0.0], dtype=torch.float64)
    tally = Tally(2, 4, 2, lambda function: function)
    updates = torch.stack((exact.float() * 2, torch.tensor([3.0, 4.0, 5.0, 7.0])))
    for step, grad in ((1, torch.tensor([1.0, 1.0, 1.0, 0.0])), (2, torch.zeros(4))):
        tally.add_updates(step, grad, updates, exact)
    v = torch.tensor([1.0, 1.0, 1.0, 0.0])
    tally.add_moments([(v, v * 4), (v, torch.tensor([1.0, 0.0, 1.0, 0.0]))], (v.double(), v.double()))
    tally.count_zeros([v, torch.tensor([1.0, 0.0, 1.0, 0.0])])
    doubled, stray = tally.figures()
    assert (doubled["update_error"], doubled["update_bias"], doubled["largest_update_ratio"]) == (1.0, 1.0, 2.0)
    assert doubled["v_bias_median"] == doubled["v_bias_mean"] == pytest.approx(3) == doubled["v_bias"]
    assert stray["update_error"] == pytest.approx((74 / 25) ** 0.5)
    assert (stray["update_bias"], stray["zero_codes"], stray["unseen_largest_update"]) == (0.0, 1, 7.0)


def test_goals_name_what_failed() -> None:
    good = dict.fromkeys(FIGURES, 0)
    assert all(precision_study.goals("8bit", good).values())
    bad = precision_study.goals("8bit_v16", {**good, "update_error": 0.031, "v_bias": -0.011, "zero_codes": 1})
    assert [name for name, met in bad.items() if not met] == ["update_error", "v_bias", "zero_codes"]


@pytest.mark.parametrize("kind", gradients.KINDS)
def test_gradients_repeat_with_their_seed(kind: str) -> None:
    first, again = (gradients.KINDS[kind](64, 9, torch.Generator().manual_seed(1)) for _ in range(2))
    for step in range(1, 10):
        grad = first(step)
        assert grad.dtype == torch.float32 and grad.shape == (64,)
        assert torch.equal(grad, again(step))


def test_long_run_compares_modes_on_the_same_batches(native_cpu: torch.device, tmp_path: Path) -> None:
    out = tmp_path / "long.json"
    assert long_run.main(["--steps", "40", "--lr", "0.01", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    final = result["final"]
    assert list(final) == [*long_run.MODES, "float64"]
    assert final["float32"]["v_ratio"] == 1.0
    assert final["float64"]["risk"] == pytest.approx(final["float32"]["risk"], rel=1e-3)
    assert final["8bit_v16"]["risk"] == pytest.approx(final["float32"]["risk"], rel=2e-2)
    rates = {row["lr"]: row for row in result["learning_rates"]}
    assert rates[0.01]["float32"] == pytest.approx(final["float32"]["risk"], rel=1e-3)
    assert rates[0.01][long_run.CONTROL] == pytest.approx(final[long_run.CONTROL]["risk"], rel=1e-3)
