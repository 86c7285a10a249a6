"""The demo with two CPU processes; resumed runs equal uninterrupted ones."""

import importlib.util
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from paths import ROOT

EXAMPLES = ROOT / "examples"
STEPS = 60
TINY: list[object] = ["--steps", STEPS, "--warmup", 5, "--layers", 1, "--width", 16, "--heads", 2, "--context", 16]
TINY += ["--save-every", 10, "--validate-every", 20, "--processes", 2]

needs_deepspeed = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("deepspeed", "matplotlib", "tqdm", "psutil")),
        reason="needs deepspeed, matplotlib, tqdm and psutil",
    ),
]


def demo(*arguments: object) -> list[str]:
    return [sys.executable, str(EXAMPLES / "demo.py"), *map(str, arguments)]


def environment() -> dict[str, str]:
    # On a CPU, with the native kernel instead of Triton's interpreter.
    dropped = {"TRITON_INTERPRET", "WORLD_SIZE", "RANK", "LOCAL_RANK", "OMP_NUM_THREADS"}
    return {name: value for name, value in os.environ.items() if name not in dropped} | {"CUDA_VISIBLE_DEVICES": ""}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(demo(*arguments), env=environment(), capture_output=True, text=True, timeout=240)


def write_text(file: Path, lines: range) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"line {number} of a text\n" for number in lines))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the text of `<folder>.txt`, plus hidden and binary files."""
    folder = tmp_path_factory.mktemp("corpus") / "text"
    write_text(folder / "a.txt", range(300))
    write_text(folder / "b" / "c.txt", range(300, 600))
    write_text(folder / ".hidden" / "d.txt", range(5))
    (folder / "binary").write_bytes(b"text\0binary")
    write_text(folder.with_suffix(".txt"), range(600))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and stdout of an uninterrupted demo."""
    out = tmp_path_factory.mktemp("uninterrupted")
    finished = run(*TINY, "--data", corpus, "--out", out)
    assert finished.returncode == 0, finished.stderr
    return out, finished.stdout


class TestDemo:
    pytestmark = needs_deepspeed

    def test_both_optimizers_learn_from_the_same_start(self, uninterrupted: tuple[Path, str]) -> None:
        out, printed = uninterrupted
        adax, adamw = (read_log(out / name) for name in ("adax", "adamw"))
        assert [record["step"] for record in adax] == [record["step"] for record in adamw] == list(range(1, STEPS + 1))
        assert adax[0]["loss"] == adamw[0]["loss"]
        assert adax[-1] != adamw[-1]
        for name, log in (("AdaX", adax), ("AdamW", adamw)):
            assert log[-1]["validation_loss"] < adax[0]["loss"] - 0.5
            assert f"\n{name:8}{log[-1]['validation_loss']:16.4f}" in printed
        assert "adax_triton.optimizers.AdaX inside DeepSpeedZeroOptimizer, 2 processes" in printed

    def test_conclusion_names_the_lower_loss_and_its_limits(self, uninterrupted: tuple[Path, str]) -> None:
        out, printed = uninterrupted
        losses = {name: read_log(out / name.lower())[-1]["validation_loss"] for name in ("AdaX", "AdamW")}
        better = min(losses, key=losses.__getitem__)
        gap = max(losses.values()) - losses[better]
        assert f"\n{better} is lower by {gap:.4f} nats per byte after {STEPS} steps with seed 0.\n" in printed
        assert "\nNo spread over seeds is recorded for these settings" in printed
        assert f"\n{STEPS} steps of a small model do not predict" in printed

    def test_picture_shows_two_curves(self, uninterrupted: tuple[Path, str]) -> None:
        import matplotlib.image

        picture = matplotlib.image.imread(uninterrupted[0] / "loss.png")[..., :3]
        assert picture.shape[0] >= 500 and picture.shape[1] >= 800
        for colour in ("#c2410c", "#1d4ed8"):
            curve = abs(picture - matplotlib.colors.to_rgb(colour)).max(axis=-1) < 0.02
            assert curve.any(axis=0).mean() > 0.5, f"{colour} spans too little of the picture"

    def test_sweep_keeps_finished_runs_and_pairs_the_seeds(
        self, uninterrupted: tuple[Path, str], corpus: Path, tmp_path: Path
    ) -> None:
        """Seed 0 is copied from the demo; seed 1 takes two launches."""
        rates = {"AdaX": default_rate("adax"), "AdamW": default_rate("adamw")}
        for name, rate in rates.items():
            shutil.copytree(uninterrupted[0] / name.lower(), tmp_path / f"{name.lower()}-{rate}-seed0")
        given = [argument for name, rate in rates.items() for argument in ("--lr", name, rate)]
        command = [sys.executable, str(EXAMPLES / "sweep.py"), *map(str, TINY), "--data", str(corpus), *given]
        command += ["--seeds", "2", "--out", str(tmp_path), "--json", str(tmp_path / "sweep.json")]
        finished = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
        assert finished.returncode == 0, finished.stderr
        assert "seed0" not in finished.stdout
        result = json.loads((tmp_path / "sweep.json").read_text())
        for name, rate in rates.items():
            logs = [read_log(tmp_path / f"{name.lower()}-{rate}-seed{seed}") for seed in (0, 1)]
            assert result["losses"][name] == {rate: [log[-1]["validation_loss"] for log in logs]}
            assert result["configs"][name]["optimizer"]["params"]["lr"] == float(rate)
        assert result["losses"]["AdaX"] != result["losses"]["AdamW"]
        assert result["settings"]["steps"] == STEPS

    def test_killed_run_resumes_as_if_uninterrupted(
        self, uninterrupted: tuple[Path, str], corpus: Path, tmp_path: Path
    ) -> None:
        # The file has the same bytes as the folder of the uninterrupted run.
        arguments = [*TINY, "--data", corpus.with_suffix(".txt"), "--against", "AdaX", "--out", tmp_path]
        kill_after_checkpoint(arguments, tmp_path / "adax")
        killed = read_log(tmp_path / "adax")
        assert 10 <= len(killed) < STEPS, "the run finished before the kill"
        add_partial_checkpoint_and_log_line(tmp_path / "adax")

        resumed = run(*arguments)

        assert resumed.returncode == 0, resumed.stderr
        assert "AdaX: resuming after step" in resumed.stdout
        assert (tmp_path / "adax" / "loss.jsonl").read_text() == (uninterrupted[0] / "adax" / "loss.jsonl").read_text()
        assert [folder.name for folder in (tmp_path / "adax" / "checkpoints").glob("step*")] == [f"step{STEPS:07d}"]


def default_rate(name: str) -> str:
    return str(json.loads((EXAMPLES / f"zero2_{name}.json").read_text())["optimizer"]["params"]["lr"])


@pytest.fixture
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.mark.usefixtures("examples_on_path")
class TestInvalidArguments:
    pytestmark = needs_deepspeed

    @pytest.mark.parametrize("flag", ["--optimizer", "--against"])
    def test_unknown_optimizer_is_named(self, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "unknown optimizer 'AdaZ'; expected one of ['adamw', 'adax', 'adaxw']" in error_message(
            capsys, flag, "AdaZ", "--out", tmp_path
        )
        assert not any(tmp_path.iterdir())

    def test_other_settings_are_not_mixed_into_a_run(
        self, uninterrupted: tuple[Path, str], corpus: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        message = error_message(capsys, *TINY, "--data", corpus, "--out", uninterrupted[0], "--seed", 1)
        assert "holds a run with seed=0, but this run has seed=1; pass --fresh to replace it" in message

    def test_data_must_exist_and_be_long_enough(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        missing, short = tmp_path / "missing", tmp_path / "short.txt"
        assert f"--data {str(missing)!r}: no such file or folder" in error_message(capsys, "--data", missing)
        short.write_text("too short")
        assert "--data has 9 bytes" in error_message(capsys, "--data", short)


@pytest.mark.usefixtures("examples_on_path")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--lr", "AdamW"], "--lr AdamW has no learning rate"),
        (["--lr", "AdaX", "fast"], "could not convert string to float: 'fast'"),
        (["--lr", "AdaZ", "1e-3"], "unknown optimizer 'AdaZ'"),
        (["--lr", "AdaX", "1e-3", "--seeds", "1"], "--seeds must be at least 2, got 1"),
        (["--lr", "AdaX", "1e-3", "--processes", "0"], "--processes must be at least 1, got 0"),
    ],
)
def test_sweep_names_invalid_arguments_before_it_trains(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import sweep

    with pytest.raises(SystemExit) as stopped:
        sweep.main([*given, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def error_message(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the error message of a demo with invalid arguments."""
    import demo as demo_module

    with pytest.raises(SystemExit) as stopped:
        demo_module.main(list(map(str, arguments)))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_configs_differ_only_in_the_optimizer() -> None:
    configs = [json.loads(file.read_text()) for file in EXAMPLES.glob("zero2_*.json")]
    assert len(configs) >= 3
    types = {config.pop("optimizer")["type"] for config in configs}
    assert {"AdaX", "AdaXW", "AdamW"} <= types
    assert all(config == configs[0] for config in configs)
    assert configs[0]["zero_optimization"]["stage"] == 2


@pytest.mark.usefixtures("examples_on_path")
def test_sweep_result_takes_each_optimizer_at_its_best_rate() -> None:
    from sweep_result import best_rate, paired, table

    adax = {"1e-3": [3.0, 3.0, 3.0], "2e-3": [1.0, 2.5, 2.0]}
    result = {"losses": {"AdaX": adax, "AdamW": {"2e-3": [0.0, 1.0, 1.0]}}}
    assert best_rate(adax) == "2e-3"
    assert best_rate({"1": [math.nan, math.nan], "2": [1.0, 1.0]}) == "2"
    found = paired(result, "AdaX", "AdamW")
    assert found.mean == pytest.approx(3.5 / 3)
    assert found.half_width == pytest.approx(4.302653 * statistics.stdev([1.0, 1.5, 1.0]) / math.sqrt(3))
    assert table(result).splitlines() == [
        "| learning rate | 1e-3 | 2e-3 |",
        "|---|---|---|",
        "| AdaX | 3.000 | **1.833** |",
        "| AdamW |  | **0.667** |",
        "",
        f"AdaX - AdamW: {found}",
    ]


@pytest.mark.usefixtures("examples_on_path")
def test_recorded_spread_belongs_to_the_defaults_of_the_demo(tmp_path: Path) -> None:
    """`make demo` shows the spread only with the settings that were recorded."""
    import demo as demo_module
    from sweep_result import COMMITTED, paired, spread

    def plans(*arguments: str) -> list[Any]:
        args, _ = demo_module.parse_arguments([*arguments, "--out", str(tmp_path), "--processes", "2"])
        return [plan for _, plan in demo_module.plan_runs(args)]

    found = spread(plans())
    assert found == (5, paired(json.loads(COMMITTED.read_text()), "AdaX", "AdamW"))
    assert spread(plans("--steps", "401")) is None
    assert spread(plans("--optimizer", "AdamW")) is None
    for page in ("README.md", "docs/study.md", "docs/coming-from-adamw.md"):
        assert f"{found[1]}".removeprefix("+") in (ROOT / page).read_text(), page
    curves = [Curve("AdaX", 2.0), Curve("AdamW", 2.1)]
    printed = demo_module.conclusion(curves, plans(), is_default_text=True)
    assert f"Over 5 seeds AdaX - AdamW is {found[1]} (95 % interval, examples/sweep.json)." in printed
    assert "Over 5 seeds" not in "".join(demo_module.conclusion(curves, plans(), is_default_text=False))


class Curve(NamedTuple):
    """What `conclusion` reads of a curve."""

    label: str
    final_validation_loss: float


@pytest.mark.usefixtures("examples_on_path")
def test_batches_depend_only_on_seed_step_and_rank() -> None:
    from text_data import TextData

    text = bytes(range(256)) * 400
    data, again, other = TextData(text, 16, seed=0), TextData(text, 16, seed=0), TextData(text, 16, seed=1)
    again.batch(0, rank=0, ranks=1, size=8)
    whole = data.batch(3, rank=0, ranks=1, size=8)[0]
    halves = [again.batch(3, rank=rank, ranks=2, size=4)[0] for rank in (0, 1)]
    assert whole.equal(torch.cat(halves))
    assert not whole.equal(data.batch(4, rank=0, ranks=1, size=8)[0])
    assert not whole.equal(other.batch(3, rank=0, ranks=1, size=8)[0])


@pytest.mark.usefixtures("examples_on_path")
def test_held_out_text_is_a_twentieth_and_excluded_from_training() -> None:
    from text_data import TextData

    text = b"".join(bytes([block]) * 100 for block in range(20))
    data = TextData(text, 16, seed=0)
    assert data.validation.unique().tolist() == [19]
    assert data.train.unique().tolist() == list(range(19))
    inputs, targets = zip(*data.held_out(rank=1, ranks=2, size=4, batches=3), strict=True)
    assert len(inputs) == len(targets) == 3
    assert all(batch.shape == (4, 16) for batch in (*inputs, *targets))


def read_log(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "loss.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def kill_after_checkpoint(arguments: list[object], folder: Path) -> None:
    """Start the demo; kill its processes after the first complete checkpoint."""
    import psutil

    process = subprocess.Popen(
        demo(*arguments), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoints" / "latest").exists():
            assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.005)
    finally:
        # Workers have their own process groups, so signal each process.
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            member.send_signal(signal.SIGKILL)
        process.wait()
        psutil.wait_procs(family, timeout=30)


def add_partial_checkpoint_and_log_line(folder: Path) -> None:
    """Add an incomplete checkpoint and log line after the last complete checkpoint."""
    half = folder / "checkpoints" / f"step{STEPS - 1:07d}"
    half.mkdir()
    (half / "mp_rank_00_model_states.pt").write_bytes(b"PK")
    with (folder / "loss.jsonl").open("a") as log:
        log.write('{"step": 11, "lo')
