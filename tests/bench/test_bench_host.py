"""The host-time benchmark: timed calls and table."""

import json

import pytest
import torch
from adax_triton.bench import host
from adax_triton.kernels import adax_step as step_module

from adax_triton import AdaXW

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are real on a GPU")
def test_launches_are_disabled_and_restored() -> None:
    param = torch.zeros(5, requires_grad=True)
    param.grad = torch.ones(5)
    optimizer = AdaXW([param], max_grad_norm=1.0, telemetry=True)
    original = step_module.adax_step
    with host.launching(CPU):
        optimizer.step()
        assert torch.equal(param, torch.zeros(5))
    assert step_module.adax_step is original


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors take another path on a GPU machine")
def test_table_has_every_optimizer_count_and_goal() -> None:
    result = json.loads(json.dumps(host.run([1, 3], CPU, rounds=5)))
    lines = host.table(result).splitlines()
    names = host.builders(CPU)
    assert len(lines) == 5 + 2 * len(names)
    assert "replaced by nothing" in lines[0]
    assert lines[2] == "| step | gradients | 1 tensors | 3 tensors |"
    assert lines[-1] == "| goal |  | 60 | 60 |"
    assert all(row["p20_us"] <= row["median_us"] <= row["p80_us"] for row in result["rows"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graph_replay_is_timed_and_updates_weights() -> None:
    device = torch.device("cuda")
    params = [torch.zeros(5, device=device, requires_grad=True) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(5, device=device)
    step = host.replay(params)
    before = params[0].detach().clone()
    step()
    assert not torch.equal(params[0], before)
    rows = host.run([1], device, rounds=5)["rows"]
    assert [row["fresh"] for row in rows if row["name"] == host.REPLAY] == [False]
    assert all(row["median_us"] <= row["done_us"] for row in rows)
