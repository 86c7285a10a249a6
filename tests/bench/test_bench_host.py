"""The host-time benchmark: timed calls and table."""

import itertools
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
def test_table_has_every_method_and_count() -> None:
    result = json.loads(json.dumps(host.run([1, 3], CPU, rounds=5)))
    lines = host.table(result).splitlines()
    names = sorted(host.methods(CPU))
    assert len(lines) == 4 + 2 * len(names)
    assert "replaced by nothing" in lines[0]
    assert lines[2] == "| step | gradients | 1 tensors | 3 tensors |"
    cells = [line.split(" | ")[:2] for line in lines[4:]]
    assert cells == [[f"| {name}", gradients] for name in names for gradients in ("same", "fresh")]
    assert all(row["p20_us"] <= row["median_us"] <= row["p80_us"] for row in result["rows"])


def test_methods_are_timed_in_turn() -> None:
    names, called = ["b", "a", "c"], []

    def recording(name: str) -> host.Method:
        return host.Method(lambda params: lambda: called.append(name))

    with host.one_rank(CPU) as mesh:
        rows = host.measure({name: recording(name) for name in names}, 2, False, CPU, mesh, rounds=5)
    rounds = len(called) // len(names)
    assert rounds >= 5 and called == names * rounds
    assert [row["name"] for row in rows] == names


@pytest.mark.parametrize("fresh", [False, True])
def test_fresh_gradients_change_their_addresses(fresh: bool) -> None:
    addresses: list[int] = []

    def recording(params: list[torch.Tensor]) -> host.Step:
        return lambda: addresses.append(params[0].grad.data_ptr())

    with host.one_rank(CPU) as mesh:
        host.measure({"recording": host.Method(recording)}, 1, fresh, CPU, mesh, rounds=5)
    assert all((before != after) == fresh for before, after in itertools.pairwise(addresses))


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
