"""Errors of GradientRelease, and its behaviour under FSDP2 and DDP."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from paths import SUPPORT
from ranks import run_ranks
from torch import nn
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from adax_triton import AdaX, AdaXW
from adax_triton.gradient_release import GradientRelease


def test_backward_raises_for_a_bad_state(backend: torch.device) -> None:
    param = Parameter(torch.ones(5, device=backend))
    optimizer = AdaXW([param])
    GradientRelease(optimizer)
    param.sum().backward()
    state, before = optimizer.state[param], param.detach().clone()
    kept, state["exp_avg"] = state["exp_avg"], torch.zeros(3, device=backend)
    with pytest.raises(ValueError, match="exp_avg"):
        param.sum().backward()
    assert torch.equal(param, before)
    param.grad, state["exp_avg"] = None, kept
    param.sum().backward()
    assert state["step"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_grad_norm": 1.0}, "max_grad_norm: 1.0"), ({"telemetry": True}, "telemetry=True")],
)
def test_clipping_and_telemetry_raise(options: dict[str, Any], message: str) -> None:
    param = Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=message):
        GradientRelease(AdaX([param], **options))
    param.sum().backward()
    assert param.grad is not None  # no hook was installed


def test_torch_optimizers_and_fsdp1_parameters_raise() -> None:
    param = Parameter(torch.ones(3))
    with pytest.raises(TypeError, match=r"got torch\.optim\.sgd\.SGD"):
        GradientRelease(torch.optim.SGD([param]))  # type: ignore[arg-type]
    param._fsdp_flattened = True  # FSDP1 sets this attribute
    with pytest.raises(ValueError, match="FSDP1"):
        GradientRelease(AdaX([param]))


def test_offloaded_shards_raise_before_torch_2_13(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    mesh = DeviceMesh("cuda", [0], _init_backend=False, _rank=0)
    local = torch.ones(4, 3)
    meta = TensorMeta(local.shape, local.stride(), local.dtype)
    param = DTensor(local, DTensorSpec(mesh, (Replicate(),), tensor_meta=meta), requires_grad=True)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.12.1+cu130"))
    with pytest.raises(ValueError, match="offloads"):
        GradientRelease(AdaX([param]))
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.13.0"))
    GradientRelease(AdaX([param])).remove()


def test_partial_gradient_raises(native_cpu: torch.device) -> None:
    shared, last = nn.Linear(4, 4), nn.Linear(4, 4)
    GradientRelease(AdaX([*shared.parameters(), *last.parameters()]))
    x = torch.ones(2, 4, requires_grad=True)
    for _ in range(2):
        x = checkpoint(shared, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="part of its gradient"):
        last(x).sum().backward()


def test_clipping_set_later_raises(native_cpu: torch.device) -> None:
    param = Parameter(torch.ones(3))
    optimizer = AdaX([param])
    GradientRelease(optimizer)
    optimizer.max_grad_norm = 1.0
    with pytest.raises(ValueError, match="does not support clipping"):
        param.sum().backward()
    assert torch.equal(param, torch.ones(3))


def test_grad_scaler_raises(backend: torch.device) -> None:
    param = Parameter(torch.ones(3, device=backend))
    optimizer = AdaX([param])
    GradientRelease(optimizer)
    scaler = torch.amp.GradScaler(backend.type)
    scaler.scale(param.sum()).backward()
    with pytest.raises(RuntimeError, match="bfloat16 without a scaler"):
        scaler.step(optimizer)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Return {check: error or ""} of each of two gloo ranks."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    worker = SUPPORT / "gradient_release_worker.py"
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(worker, [str(folder)], 2, folder, {"TRITON_INTERPRET": "0"}, folder / "log")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("check", ["fsdp2", "accumulation", "twice", "ddp"])
def test_fsdp2_equals_step_and_ddp_raises(check: str, ranks: list[dict[str, str]]) -> None:
    assert [found[check] for found in ranks] == ["", ""]
