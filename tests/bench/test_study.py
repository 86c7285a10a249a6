"""Test the study: rules, search, resume, statistics and page."""

import argparse
import concurrent.futures
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adax_triton.bench.study import analysis, command, problems, records, report, rules, scheduler, text
from adax_triton.bench.study.run import POINTS, Run, train
from adax_triton.bench.study.search import LARGEST_EXPONENT, Cell, search
from paths import ROOT

from adax_triton import AdaXW

pytestmark = pytest.mark.usefixtures("native_cpu", "one_thread")

STEPS = 200
# w_t of a rule at step t, and whether the equation corrects m.
WEIGHTS: dict[str, tuple[Callable[[int], float], bool]] = {
    "adax-1e-4": (lambda t: 1e-4 / ((1 + 1e-4) ** t - 1), True),
    "adax-1/T": (lambda t: 0.005 / (1.005**t - 1), True),
    "adax-3/T": (lambda t: 0.015 / (1.015**t - 1), True),
    "adax-10/T": (lambda t: 0.05 / (1.05**t - 1), True),
    "average": (lambda t: 1 / t, True),
    "adafactor-0.8": (lambda t: t**-0.8, True),
    "adafactor-0.5": (lambda t: t**-0.5, True),
    "adam-0.95": (lambda t: 0.05 / (1 - 0.95**t), True),
    "adam-0.99": (lambda t: 0.01 / (1 - 0.99**t), True),
    "adam-0.999": (lambda t: 0.001 / (1 - 0.999**t), True),
    "adam-10/T": (lambda t: 0.05 / (1 - 0.95**t), True),
    "fraction-1/4": (lambda t: 4 / (t + 3), True),
    "fraction-1/16": (lambda t: 16 / (t + 15), True),
    "adax-1e-4-uncorrected": (lambda t: 1e-4 / ((1 + 1e-4) ** t - 1), False),
    "adam-0.999-uncorrected": (lambda t: 0.001 / (1 - 0.999**t), False),
}


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(33, generator=generator) for _ in range(STEPS)]


@pytest.mark.parametrize("name", rules.RULES)
def test_rule_steps_its_equation(name: str) -> None:
    weight, corrected = WEIGHTS[name]
    lr, decay = 1e-2, 0.1
    expected, m, v = torch.ones(33, dtype=torch.float64), *torch.zeros(2, 33, dtype=torch.float64)
    for step, grad in enumerate(gradients(), 1):
        m += 0.1 * (grad.double() - m)
        v += weight(step) * (grad.double().square() - v)
        expected -= lr * (decay * expected + m / (1 - 0.9**step if corrected else 1.0) / (v.sqrt() + 1e-8))
    rule, param = rules.RULES[name], torch.ones(33, requires_grad=True)
    optimizer = AdaXW([param], lr=lr, betas=(0.9, rule.beta2(1, STEPS)), eps=1e-8, second_moment=rule.second_moment)
    for step, grad in enumerate(gradients(), 1):
        param.grad = grad
        optimizer.param_groups[0].update(rules.step_settings(rule, step, STEPS, lr, decay))
        optimizer.step()
    assert (param.double() - expected).abs().max() < 5e-6


def drive(
    losses: Callable[[float, int], float | None], start: int = 0, seeds: int = 3, reach: int = 1
) -> tuple[int, list[Run]]:
    """Run a search; return the best exponent and all runs."""
    found: dict[Run, float | None] = {}
    searched = search(Cell("gpt", "average", 10), 1.0, seeds, start, reach)
    try:
        wanted = next(searched)
        while True:
            for run in wanted:
                found.setdefault(run, losses(math.log2(run.lr), run.seed))
            wanted = searched.send(found)
    except StopIteration as stop:
        return stop.value, list(found)


@pytest.mark.parametrize(("optimum", "start"), list(itertools.product((-6, -1, 0, 1, 5), (-3, 0, 4))))
def test_search_ends_with_all_seeds_on_both_sides_of_the_optimum(optimum: int, start: int) -> None:
    best, runs = drive(lambda exponent, seed: (exponent - optimum) ** 2 + seed, start)
    assert best == optimum
    for exponent, seed in itertools.product((optimum - 1, optimum, optimum + 1), range(3)):
        assert Run("gpt", "average", 10, "float32", 2.0**exponent, seed) in runs


def test_search_decides_by_the_mean_of_the_seeds() -> None:
    # Seed 0 prefers 0, the mean prefers 2.
    best, runs = drive(lambda exponent, seed: (exponent - (0 if seed == 0 else 3)) ** 2)
    assert best == 2
    assert {run.seed for run in runs if run.lr == 2.0**3} == {0, 1, 2}


def test_search_avoids_diverged_rates_and_stops_at_the_end_of_the_grid() -> None:
    assert drive(lambda exponent, seed: None if exponent > -2 else -exponent)[0] == -2
    assert drive(lambda exponent, seed: exponent)[0] == -LARGEST_EXPONENT
    assert drive(lambda exponent, seed: -exponent)[0] == LARGEST_EXPONENT


def test_one_diverged_seed_rejects_a_rate() -> None:
    assert drive(lambda exponent, seed: None if exponent == 0 and seed == 2 else exponent**2)[0] == -1


def test_run_depends_on_its_settings_only() -> None:
    run = Run("drift", "adam-0.95", 300, "float32", 0.03, 2)
    first, again = train(run), train(run)
    for record in (first, again):
        record.pop("seconds")
    assert first == again
    assert records.run_of(first) == run
    assert len(first["curve"]) == len(first["update"]) == POINTS
    assert first["loss"] == pytest.approx(statistics.fmean(first["curve"][POINTS // 2 :]), abs=1e-5)
    assert first["area"] == pytest.approx(statistics.fmean(first["curve"]), abs=1e-5)
    assert train(run._replace(seed=3))["loss"] != first["loss"]


def test_diverged_run_has_no_loss() -> None:
    record = train(Run("images", "average", 20, "float32", 1e38, 0))
    assert record["loss"] is record["area"] is None
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("name", problems.STUDIED)
def test_data_depends_on_the_seed_only(name: str) -> None:
    def losses(seed: int) -> list[float]:
        task = problems.PROBLEMS[name].build(seed, torch.device("cpu"))
        with torch.no_grad():
            for param in task.params:
                param.add_(0.01)  # the loss of "rare" is 0 at its start
            return [task.loss(step).item() for step in (1, 2, 40, 251)]

    assert losses(3) == losses(3) != losses(4)


@pytest.mark.parametrize("name", ["gpt", "words", "images"])
def test_networks_learn(name: str) -> None:
    curve = train(Run(name, "average", 64, "float32", problems.PROBLEMS[name].lr, 0))["curve"]
    assert curve[-1] < curve[0]


def test_held_out_text_is_not_trained_on() -> None:
    tokens = torch.arange(text.BLOCK * 45 + 7)
    train_part, held_out = text.split(tokens)
    assert torch.equal(torch.cat([train_part, held_out]).sort().values, tokens)
    assert len(held_out) == 2 * text.BLOCK


def test_words_are_numbered_by_frequency() -> None:
    train_part, held_out = text.split_words(64)
    counts = torch.cat([train_part, held_out]).long().bincount(minlength=64)
    assert len(counts) == 64
    assert (counts[:62] >= counts[1:63]).all()


def test_wide_search_finds_the_lower_of_two_minima() -> None:
    def losses(exponent: float, seed: int) -> float:
        return min(abs(exponent + 1), abs(exponent - 7) - 0.5)

    assert drive(losses)[0] == -1
    for start in (0, -9, 9):
        assert drive(losses, start, reach=18)[0] == 7


def test_best_point_of_the_rare_problem_is_minus_one() -> None:
    task = problems.Rare(0, torch.device("cpu"))
    assert task.validate() == pytest.approx(10 / 101)
    for value, loss in ((-1.0, 0.0), (1.0, 20 / 101), (5.0, 20 / 101)):
        with torch.no_grad():
            task.x.fill_(value)
        assert task.validate() == pytest.approx(loss)
    slopes = []
    for step in range(1, 102):
        task.x.grad = None
        task.loss(step).backward()
        slopes.append(task.x.grad.clone())
    assert torch.equal(torch.stack(slopes).sum(0), torch.full((64,), 10.0))
    assert torch.equal(torch.stack(slopes).amax(0), torch.full((64,), 1010.0))


def test_drift_has_quiet_and_noisy_phases_around_a_moving_target() -> None:
    task = problems.Drift(0, torch.device("cpu"))
    noise, targets = [], []
    for phase in range(4):
        task.loss(phase * task.PERIOD + 1)
        noise.append((task.labels - task.exact).std().item())
        targets.append(
            torch.linalg.lstsq(task.inputs[-50:].flatten(0, 1), task.exact[-50:].flatten()[:, None]).solution
        )
    assert noise == pytest.approx([1.0, 30.0, 1.0, 30.0], rel=0.1)
    moved = (targets[1] - targets[0]).square().mean().sqrt().item()
    assert moved == pytest.approx(task.WALK * math.sqrt(task.PERIOD), rel=0.3)
    # The mean error of the weights 0 is the squared norm of the target, and labels do not enter it.
    task = problems.Drift(0, torch.device("cpu"))
    task.loss(1)
    assert task.validate() == pytest.approx(task.exact[0].square().mean().item())


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.1), ("constant", 1.0)])
def test_schedule_warms_up_then_decays(schedule: str, last: float) -> None:
    factors = [problems.learning_rate_factor(schedule, step, 100) for step in range(1, 101)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[-1] == pytest.approx(last)
    assert sorted(factors[4:], reverse=True) == factors[4:]


ARGUMENTS = ("--problems", "drift", "--rules", "adax-1e-4", "adam-0.999", "--steps", "60", "--seeds", "2")


def comparable(path: Path) -> dict[Run, tuple[Any, ...]]:
    return {records.run_of(record): (record["loss"], record["curve"]) for record in records.read(path).records.values()}


def test_killed_study_continues_where_it_was(tmp_path: Path) -> None:
    """Three launches of worker processes take about 10 s."""
    psutil = pytest.importorskip("psutil")
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    code = "import sys; from adax_triton.cli.main import main; sys.exit(main(sys.argv[1:]))"
    start = [sys.executable, "-c", code, "bench", "study", *ARGUMENTS, "--out"]
    process = subprocess.Popen([*start, str(killed)], stderr=subprocess.DEVNULL)
    workers = []
    while not (killed.exists() and killed.read_text().count("\n") > 3):
        assert process.poll() is None
        workers = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(workers, timeout=20)[1], "a worker outlived its parent"
    before = comparable(killed)
    with killed.open("a") as file:
        file.write('{"problem": "drift", "ru')  # a line that a kill or a full disk cut off
    assert comparable(killed) == before
    for out in (killed, whole):
        subprocess.run([*start, str(out)], check=True, stderr=subprocess.DEVNULL)
    assert 0 < len(before) < len(comparable(whole))
    assert comparable(killed) == comparable(whole)
    lines = [json.loads(line) for line in killed.read_text().splitlines()]
    assert len(lines) == len(comparable(whole)) + 2  # no run was repeated; two starts


def test_file_accepts_one_writer_and_one_environment(tmp_path: Path) -> None:
    path, environment = tmp_path / "runs" / "study.jsonl", {"torch": "2.13", "device": "A CPU", "text": "ab"}
    with records.writer(path, environment) as file:
        file.append({**Run("gpt", "average", 600, "float32", 1.0, 0)._asdict(), "loss": 1.0})
        with pytest.raises(ValueError, match="another process writes"), records.writer(path, environment):
            pass
    for key in environment:
        with (
            pytest.raises(ValueError, match=f"has runs with {key}=.*, but this is {key}='other'; pass another --out"),
            records.writer(path, environment | {key: "other"}),
        ):
            pass
    with records.writer(path, environment):
        assert [record["loss"] for record in records.read(path).records.values()] == [1.0]
    assert records.read(path).starts == [environment, environment]


def test_records_of_finished_runs_survive_a_failed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed run ends the study after the others are written."""

    def failing(run: Run, device: torch.device) -> dict[str, Any]:
        if run.lr == 0.03:
            raise RuntimeError("out of memory")
        return {**run._asdict(), "loss": 1.0}

    monkeypatch.setattr(scheduler, "train", failing)
    with concurrent.futures.ThreadPoolExecutor(1) as pool, records.writer(tmp_path / "runs.jsonl", {}) as file:
        monkeypatch.setattr(scheduler.concurrent.futures, "ProcessPoolExecutor", lambda *args: pool)
        monkeypatch.setattr(scheduler.concurrent.futures, "wait", lambda futures, **when: ([*futures], []))
        searches = scheduler.Scheduler(file, seeds=2, device=torch.device("cpu"), advance=lambda count, name: None)
        with pytest.raises(RuntimeError, match="out of memory"):
            searches.run([Cell("drift", "average", 60)], workers=1)
    assert [run.lr for run in records.read(tmp_path / "runs.jsonl").records] == [0.015, 0.06]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--seeds", "1"], "--seeds must be at least 2 for an interval, got 1"),
        (["--steps", "600", "7"], "--steps must be at least 8, got 7"),
        (["--quick", "--rules", "average"], "--quick sets --rules; remove --quick"),
        (["--page", "{folder}/page.md", "--out", "{folder}/none.jsonl"], "expected runs of 5 seeds; got 0 runs"),
        (["--page", "{folder}/plain.md"], "expected <!-- study:begin --> and then <!-- study:end -->, once each"),
    ],
)
def test_invalid_arguments_are_named(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    (tmp_path / "page.md").write_text(page)
    (tmp_path / "plain.md").write_text("no markers")
    given = [argument.format(folder=tmp_path) for argument in given]
    assert command.main(command_arguments(given)) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == page


def test_plan_has_short_horizons_first_and_partial_rules_once() -> None:
    arguments = command_arguments([])
    plan = list(command.cells(arguments))
    assert len(plan) == len(set(plan))
    for name in problems.STUDIED:
        steps = [cell.steps for cell in plan if cell.problem == name]
        assert steps == sorted(steps)
        assert sum(cell.rule == "fraction-1/4" for cell in plan if cell.problem == name) == 1
        assert sum(cell.rule == "average" for cell in plan if cell.problem == name) == 3
    assert list(command.cells(command_arguments(["--problems", "gpt", "--rules", "average", "--steps", "7"]))) == [
        Cell("gpt", "average", 7)
    ]
    chosen = command.cells(command_arguments(["--problems", "gpt", "--steps", "600", "2400"]))
    assert {(cell.rule, cell.steps) for cell in chosen} == set(itertools.product(rules.RULES, (600, 2400)))


def command_arguments(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(given)


def made_records(losses: dict[float, list[float | None]], rule: str = "average") -> list[dict[str, Any]]:
    return [
        {**Run("gpt", rule, 600, "float32", lr, seed)._asdict(), "loss": loss, "area": loss, "update": [], "seconds": 1}
        for lr, by_seed in losses.items()
        for seed, loss in enumerate(by_seed)
    ]


def test_result_takes_each_seed_at_the_rate_of_the_others() -> None:
    given = {0.5: [3.0, 3.0], 1.0: [1.0, 2.1], 2.0: [2.0, 1.5], 4.0: [0.1], 8.0: [None, 0.0]}
    (result,) = analysis.results(made_records(given), seeds=2).values()
    assert result.lr == 1.0
    # Seed 1 is best at 2.0, so seed 0 runs there; seed 0 is best at 1.0, so seed 1 runs there.
    assert [record["loss"] for record in result.records] == [2.0, 2.1]
    assert result.loss == pytest.approx(2.05)
    assert (result.change(0.5), result.change(2.0)) == pytest.approx((1.45, 0.2))
    assert result.is_inside
    assert result.first_seed == {0.5: 3.0, 1.0: 1.0, 2.0: 2.0, 4.0: 0.1, 8.0: math.inf}
    (edge,) = analysis.results(made_records({1.0: [1.0, 2.0], 2.0: [2.0, 2.5]}), seeds=2).values()
    assert not edge.is_inside


def test_cell_that_diverged_has_no_result_and_a_line() -> None:
    cell = Cell("gpt", "average", 600)
    assert analysis.results(made_records({1.0: [None, None]}), seeds=2) == {}
    assert "| gpt | average | 600 | float32 | diverged |" in report.cells_table([cell], {})


def test_difference_is_paired_by_seed() -> None:
    ours = analysis.results(made_records({1.0: [1.0, 5.0, 9.0]}), seeds=3)
    others = analysis.results(made_records({2.0: [0.0, 3.0, 6.0]}, "adam-0.999"), seeds=3)
    ((_, one),), ((_, other),) = ours.items(), others.items()
    found = analysis.difference(one, other)
    assert found.mean == pytest.approx(2.0)
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3))  # t_2 = 4.302653, s = 1
    assert not found.excludes_zero
    assert str(found) == "+2.0 ± 2.5"


def test_memory_is_the_mean_age() -> None:
    assert analysis.memory("average", 400) == pytest.approx(399 / 800)
    # Weights 0.05 * 0.95^i of age i, normalised.
    ages = [0.95**age for age in range(2000)]
    expected = sum(age * weight for age, weight in enumerate(ages)) / sum(ages) / 2000
    assert analysis.memory("adam-0.95", 2000) == pytest.approx(expected)
    assert analysis.memory("adax-10/T", 1000) > 0.5


def test_tables_compare_with_the_reference() -> None:
    ours = made_records({0.5: [4.0, 4.0], 1.0: [3.0, 3.1], 2.0: [5.0, 5.1]})
    theirs = made_records({1.0: [3.0, 3.0], 2.0: [2.0, 2.0], 4.0: [3.0, 3.0]}, "adam-0.999")
    found = analysis.results([*ours, *theirs], seeds=2)
    change = analysis.interval([1.0, 1.1])
    assert report.table(found).splitlines() == [
        "| rule | GPT, 600 steps, nats per byte | rate |",
        "|---|---|---|",
        "| `adam-0.999`, loss | 2 | 1 |",
        f"| `average` | **{change}** | 0.5 |",
    ]
    assert report.sensitivity_table(found, ["gpt", "words"]).splitlines()[2:] == [
        f"| `average` | **{change}** | +0.95 | +2 |",
        "| `adam-0.999` |  | +1 | +1 |",
    ]


COMMITTED = ROOT / "bench" / "results" / "study.jsonl"


def test_page_shows_the_committed_runs() -> None:
    page = (ROOT / "docs" / "study.md").read_text()
    shown = page[page.index(report.BEGIN) + len(report.BEGIN) + 1 : page.index(report.END)]
    runs, starts = records.read(COMMITTED)
    found = analysis.results(runs.values())
    assert shown == report.section(runs.values(), starts[-1], found, "bench/results/study.jsonl")
    for name in report.pictures(found):
        assert f"({name}.png)" in page
        assert (ROOT / "docs" / f"{name}.png").exists()


# The differences that docs/study.md names: cell, and the rule that it is compared with.
NAMED = [
    (Cell("words", "adax-1e-4", 3200), "adafactor-0.8"),
    (Cell("words", "adax-1e-4", 200), "adam-0.95"),
    (Cell("words", "adax-1e-4", 800), "adam-0.95"),
    (Cell("words", "adax-1e-4", 3200), "adam-0.95"),
    (Cell("words", "adax-1e-4", 3200), "adam-0.999"),
    (Cell("words", "adax-1e-4", 3200), "adax-10/T"),
    (Cell("rare", "adax-1e-4", 16000), "adam-0.999"),
    (Cell("gpt", "adax-1e-4-uncorrected", 2400), "adax-1e-4"),
    (Cell("words", "adax-1e-4-uncorrected", 3200), "adax-1e-4"),
    (Cell("gpt", "fraction-1/4", 150), "adafactor-0.8"),
    (Cell("gpt", "fraction-1/16", 150), "adafactor-0.8"),
]


def test_page_names_the_committed_differences() -> None:
    page = " ".join((ROOT / "docs" / "study.md").read_text().split())
    found = analysis.results(records.read(COMMITTED).records.values())
    for cell, other in NAMED:
        assert str(analysis.difference(found[cell], found[cell._replace(rule=other)])) in page, (cell, other)
    for problem, steps in (("gpt", 600), ("words", 800)):
        cell = Cell(problem, "adax-1e-4", steps)
        for states in ("8bit_v16", "8bit"):
            assert str(analysis.difference(found[cell._replace(states=states)], found[cell])) in page, (cell, states)


def test_gpt_and_images_do_not_separate_the_rules() -> None:
    """The limits of the first sentence of docs/study.md's answer."""
    found = analysis.results(records.read(COMMITTED).records.values())
    for problem, steps in (("gpt", 2400), ("images", 4800)):
        for one, other in itertools.combinations(["adax-1e-4", "adafactor-0.8", "adam-0.95", "adam-0.999"], 2):
            change = analysis.difference(found[Cell(problem, one, steps)], found[Cell(problem, other, steps)])
            assert abs(change.mean) < 0.01
            assert change.half_width < 0.03
