"""Steps without a kernel, in chunks. Oracle: `adax_update` on full tensors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from adax_triton import AdaXW
from adax_triton.step.reference_steps import CHUNK_SIZE
from adax_triton.step.scalars import scalars_of
from adax_triton.update.reference import adax_update


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("numel", [0, 1, CHUNK_SIZE, 2 * CHUNK_SIZE + 5])
def test_chunks_equal_one_full_update(numel: int, dtype: torch.dtype, reference_cpu: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(numel, generator=generator).to(dtype))
    expected = param.detach().clone()
    exp_avg, exp_avg_sq = (torch.zeros(numel, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))
    optimizer = AdaXW([param], lr=0.1)
    for step in (1, 2):
        param.grad = torch.randn(numel, generator=generator).to(dtype)
        optimizer.step()
        adax_update(expected, param.grad, exp_avg, exp_avg_sq, **scalars_of(optimizer.param_groups[0], step)._asdict())
    assert torch.equal(param, expected)
    assert torch.equal(optimizer.state[param]["exp_avg_sq"], exp_avg_sq)


def test_a_missing_compiler_warns_once_and_steps_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    program = (
        "import torch, warnings\n"
        "from adax_triton import AdaXW\n"
        "params = [torch.ones(7, dtype=d, requires_grad=True) for d in (torch.float32, torch.bfloat16)]\n"
        "for p in params: p.grad = torch.ones_like(p)\n"
        "o = AdaXW(params, weight_decay=0.0)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    o.step(); o.step(); o.step()\n"
        "ours = [str(w.message) for w in caught if 'adax_triton' in str(w.message)]\n"
        "print(len(ours), 'no-such-compiler' in ours[0], float(params[0][0]))\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    count, names_compiler, weight = done.stdout.split()
    assert (count, names_compiler) == ("1", "True")
    # m after one, two and three equal gradients: 0.1, 0.19, 0.271. v is always 1.
    assert float(weight) == pytest.approx(1 - 5e-3 * (0.1 + 0.19 + 0.271), rel=1e-6)
