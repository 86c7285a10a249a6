"""Reuse of step plans for DTensor parameters.

Oracle: the same optimizer on plain parameters. The mesh has one real rank, so a shard is the whole tensor.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from adax_triton import AdaXW

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

# Enough elements for quantized states, and an odd number.
SHAPES = ((128, 32), (33,), (0, 4))
MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "8bit": {"states": "8bit", "keep_float32": lambda param: param.ndim < 2},
    "masters": {"states": "bfloat16", "master_weights": "24bit"},
    "stochastic": {"weight_rounding": "stochastic"},
    "clipped": {"max_grad_norm": 0.5},
    "telemetry": {"telemetry": True},
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shard(tensor: Tensor, mesh: DeviceMesh, placement: Any = None) -> DTensor:
    return DTensor.from_local(tensor, mesh, [placement or Shard(0)], run_check=False)


def local(tensor: Any) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(tensor.to_local() if isinstance(tensor, DTensor) else tensor)


class Pair:
    """An optimizer of DTensors and one of plain tensors."""

    def __init__(self, mesh: DeviceMesh, mode: str) -> None:
        dtype = torch.bfloat16 if mode in ("masters", "stochastic") else torch.float32
        torch.manual_seed(0)
        weights = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
        self.mesh = mesh
        self.params = [nn.Parameter(shard(weight.clone(), mesh)) for weight in weights]
        self.twins = [nn.Parameter(weight.clone()) for weight in weights]
        self.optimizer, self.twin = (AdaXW(params, 0.01, **MODES[mode]) for params in (self.params, self.twins))

    def step(self, number: int, placement: Any = None) -> bool:
        """Step both. Return whether the first reused its plan."""
        for index, (param, twin) in enumerate(zip(self.params, self.twins, strict=True)):
            generator = torch.Generator().manual_seed(100 * number + index)
            twin.grad = torch.randn(twin.shape, generator=generator).to(twin.dtype)
            param.grad = shard(twin.grad.clone(), self.mesh, placement)
        planned = []
        original = self.optimizer._new_plan
        self.optimizer._new_plan = lambda *given: planned.append(given) or original(*given)  # type: ignore[method-assign]
        self.optimizer.step()
        self.twin.step()
        del self.optimizer._new_plan
        self.check()
        return not planned

    def check(self) -> None:
        for param, twin in zip(self.params, self.twins, strict=True):
            assert torch.equal(local(param), twin)
            found, expected = self.optimizer.state[param], self.twin.state[twin]
            assert found.keys() == expected.keys()
            assert all(torch.equal(local(found[name]), local(expected[name])) for name in expected)


@pytest.mark.parametrize("mode", MODES)
def test_steady_steps_reuse_their_plan(mode: str, mesh: DeviceMesh, native_cpu: torch.device) -> None:
    pair = Pair(mesh, mode)
    assert [pair.step(number) for number in range(4)] == [False, True, True, True]
    if mode == "telemetry":
        assert pair.optimizer.read_telemetry().groups == pair.twin.read_telemetry().groups


def test_interpreted_kernel_reuses_its_plan(mesh: DeviceMesh, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("the mesh is on the CPU")
    pair = Pair(mesh, "stochastic")
    assert [pair.step(number) for number in range(3)] == [False, True, True]


@pytest.mark.parametrize("placement", [Replicate(), Partial()], ids=str)
def test_gradient_with_other_placements_needs_a_new_plan(
    placement: Any, mesh: DeviceMesh, native_cpu: torch.device
) -> None:
    pair = Pair(mesh, "float32")
    reused = [pair.step(0), pair.step(1), pair.step(2, placement), pair.step(3), pair.step(4)]
    assert reused[:3] == [False, True, False] and reused[4]


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "DTensor"])
def test_gradient_may_be_a_pending_collective(sharded: bool, mesh: DeviceMesh, native_cpu: torch.device) -> None:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce

    weight, grad = torch.ones(5), torch.arange(5.0)
    param, twin = nn.Parameter(shard(weight.clone(), mesh) if sharded else weight.clone()), nn.Parameter(weight)
    optimizers = AdaXW([param]), AdaXW([twin])
    for _ in range(2):
        pending = all_reduce(grad, "sum", mesh)
        assert isinstance(pending, AsyncCollectiveTensor)
        param.grad, twin.grad = shard(pending, mesh) if sharded else pending, grad
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(local(param), twin)


def move_shard(pair: Pair) -> None:  # as FSDP2 does when a model moves
    pair.params[0]._local_tensor = local(pair.params[0]).clone()


def replace_state(pair: Pair) -> None:
    state = pair.optimizer.state[pair.params[0]]
    state["exp_avg"] = shard(local(state["exp_avg"]).clone(), pair.mesh)


@pytest.mark.parametrize("change", [move_shard, replace_state])
def test_each_change_needs_a_new_plan(
    change: Callable[[Pair], None], mesh: DeviceMesh, native_cpu: torch.device
) -> None:
    pair = Pair(mesh, "float32")
    assert [pair.step(0), pair.step(1)] == [False, True]
    change(pair)
    assert [pair.step(2), pair.step(3)] == [False, True]


def test_plain_gradient_raises_after_a_reused_plan(mesh: DeviceMesh, native_cpu: torch.device) -> None:
    pair = Pair(mesh, "float32")
    assert [pair.step(0), pair.step(1)] == [False, True]
    pair.params[0].grad = torch.ones(SHAPES[0])
    with pytest.raises(TypeError, match="grad is a "):
        pair.optimizer.step()
    pair.check()
