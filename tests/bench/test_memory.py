"""The memory table: AdaXW matches real tensors, other optimizers match their formats."""

from pathlib import Path

import pytest
import torch
from adax_triton.bench.memory import per_parameter as memory
from torch import nn

from adax_triton import AdaXW
from adax_triton.cli.main import main

NUMEL = 128 * 64
OURS = {
    "adax_triton, float32, 32-bit masters": ("float32", "float32"),
    "adax_triton, bfloat16, 32-bit masters": ("bfloat16", "float32"),
    "adax_triton, bfloat16, 24-bit masters": ("bfloat16", "24bit"),
    "adax_triton, 8bit_v16, 24-bit masters": ("8bit_v16", "24bit"),
    "adax_triton, 8bit, 24-bit masters": ("8bit", "24bit"),
    "adax_triton, 8bit_v16, no masters": ("8bit_v16", None),
    "adax_triton, 8bit, no masters": ("8bit", None),
}
OTHERS = {
    "AdamW, float32 master copy": 2 + 2 + 4 + 4 + 4,
    "FlashOptim, 24-bit masters": 7.125,
    "bitsandbytes 8-bit, no masters": 6.03125,
    "torchao 8-bit, no masters": 6.03125,
}


@pytest.mark.parametrize("setup", memory.SETUPS, ids=[setup.name for setup in memory.SETUPS])
def test_bytes_match_real_tensors(setup: memory.Setup, native_cpu: torch.device) -> None:
    if setup.name in OTHERS:
        assert setup.total == OTHERS[setup.name]
        return
    states, master_weights = OURS[setup.name]
    param = nn.Parameter(torch.ones(128, 64, device=native_cpu, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    optimizer = AdaXW([param], states=states, master_weights=master_weights)
    optimizer.step()
    state = [tensor for tensor in optimizer.state[param].values() if isinstance(tensor, torch.Tensor)]
    assert setup.total == sum(tensor.nbytes for tensor in (param, param.grad, *state)) / NUMEL


def test_command_prints_and_draws_every_setup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    figure = tmp_path / "memory.png"
    assert main(["bench", "memory", "--figure", str(figure)]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {setup.name} |" in printed for setup in memory.SETUPS)
    assert "| 8.03 | 56 | 562 |" in printed  # 7e9 and 70e9 parameters at 8.03125 bytes
    assert figure.read_bytes().startswith(b"\x89PNG")
