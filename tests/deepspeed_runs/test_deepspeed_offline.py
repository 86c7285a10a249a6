"""`adax-triton convert` on DeepSpeed folders that it cannot convert; test_deepspeed_checkpoints.py converts others.

Each test expects an error and an unchanged folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adax_triton import AdaX
from adax_triton.cli.main import main

pytest.importorskip("deepspeed")

FILES = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]


def state_dict(optimizer_class: type, **options: Any) -> dict[str, Any]:
    param = torch.nn.Parameter(torch.ones(5))
    optimizer = optimizer_class([param], **options)
    param.grad = torch.ones(5)
    optimizer.step()
    found: dict[str, Any] = optimizer.state_dict()
    return found


def checkpoint(tmp_path: Path, *state_dicts: Any) -> Path:
    """Return a folder as DeepSpeed saves it at ZeRO 2.

    It has the optimizer's state dict of each rank.
    """
    folder = tmp_path / "saved" / "tag"
    folder.mkdir(parents=True)
    for name, states in zip(FILES, state_dicts, strict=False):
        torch.save({"optimizer_state_dict": {"base_optimizer_state": states}}, folder / name)
    torch.save({"module": {}}, folder / "mp_rank_00_model_states.pt")
    (tmp_path / "saved" / "latest").write_text("tag")
    return folder


def assert_error(source: Path, words: list[str], capsys: pytest.CaptureFixture[str], *options: str) -> None:
    root = source.parents[1]
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert main(["convert", str(source), str(root / "target"), *options]) == 1
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("adax-triton convert: ")]
    for word in words:
        assert word in message
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


ADAM = state_dict(torch.optim.Adam)
STATE_8BIT_V16 = state_dict(AdaX)
STATE_8BIT_V16["state"][0]["exp_avg"] = torch.zeros(5, 1, dtype=torch.uint8)
STATE_8BIT_V16["state"][0]["exp_avg_sq"] = torch.zeros(5, 2, dtype=torch.uint8)
STATE_8BIT_V16["state"][0]["group_exponents"] = torch.zeros(1, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("saved", "options", "words"),
    [
        ([ADAM, state_dict(AdaX)], ["--to", "adax"], [FILES[1], "was saved by adax_triton"]),
        ([ADAM, ADAM], ["--to", "adamw"], [FILES[0], "was not saved by adax_triton"]),
        ([state_dict(torch.optim.Adam, amsgrad=True)], ["--to", "adax"], [FILES[0], "amsgrad"]),
        ([ADAM], ["--to", "adax", "--beta2", "0.9"], [FILES[0], "beta2=0.9"]),
        ([STATE_8BIT_V16], ["--to", "adam"], [FILES[0], "states='float32'"]),
        ([[ADAM]], ["--to", "adax"], ["elastic_checkpoint=false"]),
        ([{**ADAM, "more": Path}], ["--to", "adax"], ["weights_only=True"]),
        ([], ["--to", "adax"], ["no optimizer files of ZeRO", "--key optimizer"]),
        ([ADAM], [], ["adax, adaxw, adam, adamw"]),
        ([ADAM], ["--to", "torch-adam"], ["adax, adaxw, adam, adamw"]),
        ([ADAM], ["--to", "adax", "--states", "8bit_v16"], ["--states is for files"]),
    ],
)
def test_checkpoint_that_cannot_be_converted_leaves_no_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], saved: list[Any], options: list[str], words: list[str]
) -> None:
    assert_error(checkpoint(tmp_path, *saved), words, capsys, *options)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("zero", ["universal checkpoint"]),
        ("offloaded_tensors", ["NVMe"]),
        ("expp_rank_0_mp_rank_00_optim_states.pt", ["no optimizer files of ZeRO", "expp_rank_0"]),
    ],
)
def test_checkpoint_of_another_kind_raises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: list[str]
) -> None:
    folder = checkpoint(tmp_path, ADAM, ADAM)
    (folder / name).mkdir()
    assert_error(folder, words, capsys, "--to", "adax")


def test_incomplete_checkpoint_raises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path, ADAM, ADAM)
    (folder / "complete.json").write_text('{"saved": 0, "files": {"absent": 1}}')
    assert_error(folder, ["tag is not a complete checkpoint"], capsys, "--to", "adax")
    assert main(["convert", str(folder.parent), str(tmp_path / "target"), "--to", "adax"]) == 1
    assert "tag is not a complete checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_result_is_complete_whether_a_tag_or_its_folder_is_given(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, ADAM, ADAM)
    (folder.parent / "zero_to_fp32.py").write_text("script")
    for name, source in (("of-tag", folder), ("of-folder", folder.parent)):
        assert main(["convert", str(source), str(tmp_path / name), "--to", "adax"]) == 0
        found = sorted(path.relative_to(tmp_path / name).as_posix() for path in (tmp_path / name).rglob("*"))
        files = ["complete.json", "mp_rank_00_model_states.pt", *FILES]
        assert found == sorted(["latest", "tag", "zero_to_fp32.py", *(f"tag/{file}" for file in files)])
        assert (tmp_path / name / "latest").read_text() == "tag"
