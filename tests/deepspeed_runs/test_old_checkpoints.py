"""Checkpoints with old state names load, and training continues bit for bit.

`old_checkpoint_worker.py` names the version that wrote the files, and the command.
"""

from pathlib import Path

import pytest
import torch
from paths import SUPPORT
from ranks import run_ranks

from adax_triton import AdaXW
from adax_triton.convert.files import convert_precision

pytest.importorskip("deepspeed")
CHECKPOINTS = SUPPORT / "old_checkpoints"
NEW_NAMES = {"low": "8bit_v16", "lowest": "8bit"}


@pytest.mark.deepspeed
@pytest.mark.parametrize("old", NEW_NAMES)
def test_state_dict_and_deepspeed_checkpoint_load(old: str, tmp_path: Path) -> None:
    worker = SUPPORT / "old_checkpoint_worker.py"
    arguments = ["load", str(CHECKPOINTS / old), NEW_NAMES[old]]
    run_ranks(worker, arguments, 1, tmp_path, {"TRITON_INTERPRET": "0"}, tmp_path / "log")


@pytest.mark.parametrize("old", NEW_NAMES)
def test_converter_reads_old_names(old: str) -> None:
    saved = torch.load(CHECKPOINTS / old / "state_dict.pt")["optimizer"]
    assert saved["param_groups"][0]["states"] == old
    converted = convert_precision(saved, master_weights="24bit")
    assert converted["param_groups"][0]["states"] == NEW_NAMES[old]
    for name, value in saved["state"][0].items():
        found = converted["state"][0][name]
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value


@pytest.mark.parametrize("old", NEW_NAMES)
def test_old_names_given_by_a_user_raise_with_the_new_one(old: str) -> None:
    with pytest.raises(ValueError, match=f"'{old}'; it was renamed, use '{NEW_NAMES[old]}'"):
        AdaXW([torch.nn.Parameter(torch.ones(3))], states=old)
