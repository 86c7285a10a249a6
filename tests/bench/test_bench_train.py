"""The training benchmark: cases, hand-computed statistics, and small runs in real processes."""

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from adax_triton.bench.training import cases as train_cases
from adax_triton.bench.training import command as train
from adax_triton.bench.training import gpt, worker
from adax_triton.bench.training.command import COLUMNS, table

# A small model: nothing is compiled.
TINY = {"layers": 1, "width": 32, "heads": 2, "context": 16, "batch": 4, "steps": 25, "warmup": 2}
FLAGS = [f"--{name}={value}" for name, value in TINY.items()]


def job(**changes: Any) -> worker.Job:
    settings = {**TINY, "ranks": 1, "lr": 1e-2, "dtype": "float32", "device": "cpu", "threads": 1}
    return worker.Job(**(settings | changes))


def case(name: str) -> train_cases.Case:
    return train_cases.cases("float32")[name]


def rank_figures(**changes: Any) -> dict[str, Any]:
    figures = {"steps_s": [0.1, 0.2, 0.3], "optimizer_s": [0.05, 0.02, 0.04], "loss": 2.0, "weights": 10}
    figures["gpu_busy_s"] = None
    memory = {"peak_bytes": 7, "host_peak_bytes": 7, "host_before_bytes": 5, "state_bytes": 3}
    return {**figures, **memory, "optimizer_class": "torch.optim.AdamW", **changes}


def run_command(folder: Path, *flags: str) -> dict[str, Any]:
    program = "import sys; from adax_triton.cli.main import main; sys.exit(main())"
    file = folder / "train.json"
    command = [sys.executable, "-P", "-c", program, "bench", "train", "--device=cpu"]
    command += [*FLAGS, *flags, "--rounds=1", "--budget=280", f"--json={file}"]
    # Do not use the interpreter, which is slow.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(file.read_text())
    assert all(f"| {name} | " in done.stdout for name in result["cases"])
    return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_framework_compares_adaxw_with_its_own_optimizer(dtype: str) -> None:
    found = list(train_cases.cases(dtype).values())
    zero = [f"ZeRO-{stage}" for stage in range(4)] + [f"ZeRO-{stage} offload" for stage in (1, 2, 3)]
    for framework in ["plain", *zero]:
        assert {case.optimizer for case in found if case.framework == framework} == {"AdaXW", "AdamW"}
    assert {case.states for case in found if case.stage is None} >= {"8bit_v16", "8bit"}
    of_bfloat16_weights = [case for case in found if case.bfloat16_weights]
    assert of_bfloat16_weights == [case for case in found if "bfloat16 weights" in case.name]
    compared = {"AdaXW", "AdamW"} if dtype == "bfloat16" else set()
    assert {case.optimizer for case in of_bfloat16_weights} == compared
    assert all((case.master_weights is not None) == ("masters" in case.name) for case in found)


def test_configurations_of_a_framework_differ_only_in_the_optimizer() -> None:
    ours, theirs = (
        train_cases.deepspeed_config(case(f"ZeRO-2 offload / {name}"), 4, "bfloat16", 1e-3, "cuda")
        for name in ("AdaXW", "DeepSpeed AdamW")
    )
    assert [section.pop("optimizer")["type"] for section in (ours, theirs)] == ["AdaXW", "AdamW"]
    assert ours == theirs
    assert ours["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    quantized = train_cases.deepspeed_config(case("ZeRO-2 / AdaXW 8bit_v16"), 4, "bfloat16", 1e-3, "cuda")
    assert quantized["optimizer"]["params"]["states"] == "8bit_v16"


def test_times_and_memory_are_the_maximum_over_ranks() -> None:
    slow = rank_figures(steps_s=[0.4, 0.2, 0.2], peak_bytes=9, loss=3.0)
    row = train.summarize([[rank_figures(), slow]], tokens=90)
    assert row["median_ms"] == pytest.approx(300)  # of 0.4, 0.2, 0.3
    assert row["tokens_per_s"] == pytest.approx(300)
    assert row["optimizer_share"] == pytest.approx(0.04 / 0.3)
    assert (row["peak_bytes"], row["state_bytes"], row["loss"]) == (9, 3, 2.5)


def test_median_is_over_the_steps_of_all_rounds() -> None:
    second = rank_figures(steps_s=[0.3, 0.5, 0.6], peak_bytes=9, loss=3.0)
    rounds = [[rank_figures() | {"gpu_busy_s": 0.01}], [second | {"gpu_busy_s": 0.03}]]
    row = train.summarize(rounds, tokens=90)
    assert row["median_ms"] == pytest.approx(300)  # of 0.1, 0.2, 0.3, 0.3, 0.5, 0.6
    assert row["tokens_per_s"] == pytest.approx(300)
    assert row["rounds_tokens_per_s"] == pytest.approx([450, 180])
    assert row["gpu_busy_ms"] == pytest.approx(20)
    assert (row["peak_bytes"], row["loss"]) == (9, 2.5)


def test_cases_run_in_turn_and_a_failure_in_any_round_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["plain / torch AdamW", "plain / AdaXW", "ZeRO-2 / AdaXW"]
    done = [rank_figures()]
    outcomes: list[Any] = [done, done, done, done, "it broke", train.NOT_REACHED, done, done]
    order = []

    def run_case(one: train_cases.Case, *_: Any) -> Any:
        order.append(one.name)
        return outcomes[len(order) - 1]

    monkeypatch.setattr(train, "run_case", run_case)
    *_, result = train.run([case(name) for name in names], job(), 3, math.inf)
    assert order == [*names, *names, names[0], names[2]]  # not again after a failure
    rounds = [len(row.get("rounds_tokens_per_s", ())) for row in result["cases"].values()]
    assert rounds == [3, 0, 2]  # the second round of the last case was not reached
    assert result["cases"][names[1]] == {"absent": "it broke"}
    assert result["cases"][names[2]]["loss"] == 2.0
    assert "loss_over_plain" not in result["cases"][names[2]]  # there is no plain loss any more
    assert "in each of at most 3 rounds" in table(result)


def test_failure_of_adaxw_fails_the_command() -> None:
    chosen = [case("ZeRO-2 / AdaXW"), case("ZeRO-2 / DeepSpeed AdamW")]
    absent, there = {"absent": "why"}, {"loss": 1.0}
    assert train.ours_failed(chosen, {chosen[0].name: absent, chosen[1].name: there})
    assert not train.ours_failed(chosen, {chosen[0].name: absent, chosen[1].name: absent})
    assert not train.ours_failed(chosen, {chosen[0].name: there, chosen[1].name: absent})
    assert not train.ours_failed(chosen, {chosen[0].name: {"absent": train.NOT_REACHED}, chosen[1].name: there})
    assert train.ours_failed([case("plain / AdaXW")], {"plain / AdaXW": absent})


def test_batches_of_ranks_make_up_the_global_batch() -> None:
    batches = gpt.Batches(context=9, seed=3)
    inputs, targets = batches.batch(step=5, rank=0, ranks=1, size=6)
    parts = [batches.batch(step=5, rank=rank, ranks=3, size=2)[0] for rank in range(3)]
    assert torch.equal(inputs, torch.cat(parts))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert not torch.equal(inputs, batches.batch(step=5, rank=0, ranks=1, size=6, held_out=True)[0])


def test_tokens_match_the_markov_chain() -> None:
    inputs, targets = gpt.Batches(context=999, seed=0).batch(step=0, rank=0, ranks=1, size=64)
    pairs = torch.stack([inputs.flatten(), targets.flatten()], dim=1)
    distinct, counts = torch.unique(pairs, dim=0, return_counts=True)
    assert torch.bincount(distinct[:, 0]).max() == 4
    share = counts.double() / counts.sum()
    tokens = torch.bincount(inputs.flatten(), minlength=gpt.VOCABULARY).double()
    of_tokens = tokens / tokens.sum()
    entropy = torch.xlogy(of_tokens, of_tokens).sum() - torch.xlogy(share, share).sum()
    assert entropy.item() == pytest.approx(gpt.ENTROPY, abs=0.02)
    assert pytest.approx(1.75 * math.log(2)) == gpt.ENTROPY


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--width=30", "heads=4"),
        ("--ranks=0", "ranks"),
        ("--steps=0", "steps"),
    ],
)
def test_bad_options_are_named(flag: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    try:
        code: Any = train.main(parser.parse_args(["--device=cpu", flag]))
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_cases_are_chosen_by_name_or_part(capsys: pytest.CaptureFixture[str]) -> None:
    found = train_cases.cases("float32")
    assert [case.name for case in train_cases.choose(found, ["plain / AdaXW"])] == ["plain / AdaXW"]
    assert train_cases.choose(found, ["ZeRO-3 /"])[0].name == "ZeRO-3 / DeepSpeed AdamW"
    found = train_cases.cases("bfloat16")
    names = ["plain / torch AdamW", "plain / torch AdamW, bfloat16 weights"]
    assert [[case.name for case in train_cases.choose(found, [name])] for name in names] == [names[:1], names[1:]]
    assert [case.name for case in train_cases.choose(found, ["torch AdamW"])] == names
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    assert train.main(parser.parse_args(["--device=cpu", "--only", "nothing"])) == 2
    assert "ZeRO-3 / DeepSpeed AdamW" in capsys.readouterr().err


def test_skipped_case_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = job(width=33)  # not a multiple of the number of heads
    assert "RuntimeError: shape" in train.run_case(case("plain / AdaXW"), broken, time.monotonic() + 60)
    monkeypatch.setattr(train, "TIMEOUT_S", 0.01)
    (result,) = train.run([case("plain / AdaXW")], job(), rounds=1, budget_s=math.inf)
    assert result["cases"]["plain / AdaXW"] == {"absent": "no result after 0.01 s"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (result,) = train.run([case("ZeRO-1 / AdaXW")], job(ranks=2), rounds=1, budget_s=60)
    assert "deepspeed" in result["cases"]["ZeRO-1 / AdaXW"]["absent"]
    assert f"| ZeRO-1 / AdaXW | absent: {result['cases']['ZeRO-1 / AdaXW']['absent']} |" in table(result)


def test_budget_is_respected_and_every_case_is_listed() -> None:
    names = ["plain / torch AdamW", "plain / AdaXW"]
    *_, result = train.run([case(name) for name in names], job(steps=10**6), rounds=2, budget_s=0.5)
    assert result["cases"] == {name: {"absent": train.NOT_REACHED} for name in names}


def test_peak_memory_excludes_the_parent_process() -> None:
    held = bytearray(300_000_000)  # allocated in this process, not in its child
    program = "from adax_triton.bench.training.worker import host_peak_bytes; print(host_peak_bytes())"
    command = [sys.executable, "-P", "-c", program]
    small = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True)
    assert worker.host_peak_bytes() > len(held)
    if Path("/proc/self/status").exists():
        assert int(small.stdout) < worker.host_peak_bytes() - 100_000_000


def test_plain_training_learns_and_reports_its_measurements(tmp_path: Path) -> None:
    result = run_command(tmp_path, "--ranks=1", "--lr=1e-2", "--only", "plain / AdaXW")
    (row,) = result["cases"].values()
    assert result["benchmark"] == "train"
    assert gpt.ENTROPY < row["loss"] < math.log(gpt.VOCABULARY) - 0.3
    assert row["tokens_per_s"] == pytest.approx(4 * 16 / (row["median_ms"] / 1e3))
    assert 0 < row["optimizer_share"] < 1
    assert row["state_bytes"] == 8 * row["weights"]
    assert row["peak_bytes"] >= row["host_before_bytes"] > 0
    assert row["loss_over_plain"] == 0
    assert len(table(result).splitlines()[-1].split(" | ")) == len(COLUMNS) + 1


def test_states_match_the_mode(native_cpu: torch.device) -> None:
    figures = worker.train(case("plain / AdaXW 8bit_v16"), job(steps=1), 0)
    # States take 3 + 1/32 bytes per element in tensors of at least 4096 elements, else 8 bytes.
    with torch.device("meta"):
        model = gpt.GPT(layers=1, width=32, heads=2, context=16)
    large = sum(param.numel() for param in model.parameters() if param.numel() >= 4096)
    assert figures["state_bytes"] == large * (3 + 1 / 32) + 8 * (figures["weights"] - large)
    assert len(figures["steps_s"]) == 1


def test_bfloat16_weights_of_torch_have_bfloat16_states_and_no_masters() -> None:
    chosen = train_cases.cases("bfloat16")["plain / torch AdamW, bfloat16 weights"]
    with torch.device("meta"):
        model = gpt.GPT(layers=1, width=32, heads=2, context=16)
    tensors = len(list(model.parameters()))
    figures = worker.train(chosen, job(steps=1, dtype="bfloat16"), 0)
    assert figures["optimizer_class"] == "torch.optim.adamw.AdamW"
    assert figures["state_bytes"] == 2 * 2 * figures["weights"] + 4 * tensors  # a step count per tensor
    assert math.isfinite(figures["loss"])


def test_only_losses_of_float32_weights_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter((3.0, 2.0, 2.5, 1.5))
    monkeypatch.setattr(train, "run_case", lambda *_: [rank_figures(loss=next(losses))])
    chosen = [case for case in train_cases.cases("bfloat16").values() if case.stage is None][:4]
    *_, result = train.run(chosen, job(dtype="bfloat16"), 1, math.inf)
    assert [(name, row.get("loss_over_plain")) for name, row in result["cases"].items()] == [
        ("plain / torch AdamW", 0.0),
        ("plain / AdaXW", 0.0),
        ("plain / torch AdamW, bfloat16 weights", None),
        ("plain / AdaXW float32, bfloat16 weights, 32-bit masters", None),
    ]


@pytest.mark.parametrize("name", ["plain / torch AdamW", "plain / AdaXW"])
def test_plain_step_clips_once(name: str, native_cpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = mock.Mock(wraps=torch.nn.utils.clip_grad_norm_)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", passes)
    engine = worker.plain_engine(case(name), job(), torch.nn.Linear(3, 2), native_cpu)
    for param in engine.module.parameters():
        param.grad = torch.full_like(param, 100.0)
    engine.step()
    # After one step the first moment is 0.1 times the clipped gradient.
    moments = [engine.optimizer.state[param]["exp_avg"] for param in engine.module.parameters()]
    assert torch.nn.utils.get_total_norm(moments).item() == pytest.approx(0.1 * train_cases.CLIPPING)
    assert passes.call_count == (0 if case(name).optimizer == "AdaXW" else 1)  # AdaXW clips within its step


@pytest.mark.deepspeed
@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs deepspeed")
def test_zero_2_on_two_ranks_equals_plain_training(native_cpu: torch.device, tmp_path: Path) -> None:
    (sharded,) = run_command(tmp_path, "--ranks=2", "--lr=1e-2", "--only", "ZeRO-2 / AdaXW")["cases"].values()
    # One process trains on the batches of both ranks.
    plain = worker.train(case("plain / AdaXW"), job(batch=8), 0)
    assert sharded["optimizer_class"] == "adax_triton.optimizers.AdaXW"
    assert sharded["loss"] == pytest.approx(plain["loss"], abs=1e-4)
    assert sharded["loss"] < math.log(gpt.VOCABULARY) - 0.3
    assert sharded["state_bytes"] == pytest.approx(plain["state_bytes"] / 2, rel=0.01)
