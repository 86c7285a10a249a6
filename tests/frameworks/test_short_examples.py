"""Resumed short examples equal uninterrupted ones, bit for bit, on a CPU.

The first test takes more than 5 s, because rank_server.py imports torch and DeepSpeed.
"""

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from paths import ROOT
from ranks import run_ranks
from torch.utils._pytree import tree_flatten_with_path

STEPS = 20
TINY = ["--steps", str(STEPS), "--layers", "1", "--width", "32"]
LOSS_OF_UNIFORM_BYTES = math.log(256)

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)
needs_lightning = pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="needs lightning")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"line {number} of a text\n" for number in range(600)))
    return file


def run(script: str, text: Path, *arguments: str, ranks: int = 1) -> list[float]:
    """Run an example; return the losses that it prints."""
    log = text.with_suffix(".log")
    # "0": the native CPU kernel instead of Triton's interpreter.
    interpret = {"TRITON_INTERPRET": "0"}
    arguments = (*TINY, "--data", str(text), *arguments)
    run_ranks(ROOT / "examples" / script, arguments, ranks, text.parent, interpret, log)
    return [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)", log.read_text(), flags=re.MULTILINE)]


def differing(saved: Any, other: Any) -> list[str]:
    """Return the keys of two checkpoints whose values differ."""
    leaves, others = ({str(key): value for key, value in tree_flatten_with_path(tree)[0]} for tree in (saved, other))
    assert len(leaves) > 20
    same = {key for key in leaves.keys() & others.keys() if torch.as_tensor(leaves[key] == others[key]).all()}
    return sorted((leaves.keys() | others.keys()) - same)


def test_plain_pytorch_resumes_bit_for_bit(text: Path) -> None:
    losses = run("train_gpu.py", text, "--checkpoint", "whole.pt")
    assert LOSS_OF_UNIFORM_BYTES - 0.5 > losses[0] > losses[1] + 0.2

    first = run("train_gpu.py", text, "--stop", "10")
    second = run("train_gpu.py", text, "--resume")

    assert [*first, *second] == losses
    whole, resumed = (torch.load(text.parent / name) for name in ("whole.pt", "runs/train_gpu.pt"))
    assert whole["step"] == whole["optimizer"]["state"][0]["step"] == STEPS
    assert {"master", "group_exponents"} <= whole["optimizer"]["state"][0].keys()
    assert differing(whole, resumed) == []


@pytest.mark.parametrize("stop", ["1", str(STEPS + 1)])
def test_a_stop_outside_the_run_overwrites_no_checkpoint(
    stop: str, text: Path, native_cpu: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    import train_gpu

    arguments = [*TINY, "--data", str(text), "--checkpoint", str(text.parent / "two.pt")]
    train_gpu.main([*arguments, "--stop", "2"])
    with pytest.raises(SystemExit):
        train_gpu.main([*arguments, "--stop", stop, "--resume"])
    assert f"--stop {stop}: expected 2 (the steps done) to {STEPS} (--steps)" in capsys.readouterr().err
    assert torch.load(text.parent / "two.pt")["step"] == 2


# May take more than 5 s: four launches, three of them with two ranks.
@needs_gloo
def test_fsdp2_resumes_bit_for_bit_and_on_another_number_of_ranks(text: Path) -> None:
    losses = run("train_fsdp2.py", text, "--out", "whole", ranks=2)
    assert LOSS_OF_UNIFORM_BYTES - 0.5 > losses[0] > losses[1] + 0.2

    first = run("train_fsdp2.py", text, "--stop", "10", ranks=2)
    alone = run("train_fsdp2.py", text, "--resume", "runs/fsdp2/step10", "--out", "alone")
    second = run("train_fsdp2.py", text, "--resume", "runs/fsdp2/step10", ranks=2)

    assert [*first, *second] == losses
    # One rank adds the gradients of a batch in another order.
    assert alone == pytest.approx(second, abs=0.02)
    whole, resumed = (read_sharded(text.parent / name / f"step{STEPS}") for name in ("whole", "runs/fsdp2"))
    assert whole["step"] == whole["optimizer"]["state"]["bytes.weight"]["step"] == STEPS
    assert "group_exponents" in whole["optimizer"]["state"]["bytes.weight"]
    assert differing(whole, resumed) == []


def read_sharded(folder: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder, folder / "whole.pt")
    return torch.load(folder / "whole.pt")


# Takes more than 5 s: three processes import lightning.
@needs_lightning
def test_lightning_resumes_bit_for_bit(text: Path) -> None:
    (loss,) = run("train_lightning.py", text, "--checkpoint", "whole.ckpt")
    assert loss < LOSS_OF_UNIFORM_BYTES - 0.7

    run("train_lightning.py", text, "--stop", "10", "--checkpoint", "half.ckpt")
    assert run("train_lightning.py", text, "--resume", "half.ckpt") == [loss]

    parts = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    whole, resumed = (
        {part: torch.load(text.parent / name)[part] for part in parts}
        for name in ("whole.ckpt", "runs/train_lightning.ckpt")
    )
    assert whole["global_step"] == whole["optimizer_states"][0]["state"][0]["step"] == STEPS
    assert differing(whole, resumed) == []
