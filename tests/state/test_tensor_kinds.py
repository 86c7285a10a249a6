"""Test tensors of every layout, size and kind.

Oracles: their contiguous copies, and torch's Adam.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adax_triton import Adam, AdamW, AdaX, AdaXW

CLASSES = (AdaX, AdaXW, Adam, AdamW)
every_class = pytest.mark.parametrize("optimizer_class", CLASSES, ids=lambda each: each.__name__)
GUARD = -7.0


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def leaf(data: Tensor) -> Tensor:
    """Return a leaf on the same memory with the same strides.

    Parameter() and .to() may change strides.
    """
    return data.detach().requires_grad_()


def step_with_plain_copy(optimizer_class: type, param: Tensor, seeds: tuple[int, ...] = (1, 2, 3)) -> Tensor:
    """Step `param` and a contiguous copy with the same gradients.

    The gradients of `param` have its strides. Return the copy.
    """
    plain = leaf(param.detach().clone(memory_format=torch.contiguous_format))
    optimizers = [optimizer_class([each], lr=0.1) for each in (param, plain)]
    for seed in seeds:
        plain.grad = normal(*param.shape, seed=seed).to(param)
        strided = torch.empty_strided(param.size(), param.stride(), device=param.device)
        param.grad = strided.copy_(plain.grad)
        for optimizer in optimizers:
            optimizer.step()
    return plain


LAYOUTS: dict[str, Callable[[torch.device], Tensor]] = {
    "transposed": lambda device: normal(5, 3).to(device).t(),
    "permuted": lambda device: normal(2, 3, 4).to(device).permute(2, 0, 1),
    "channels_last": lambda device: normal(2, 3, 4, 5).to(device).contiguous(memory_format=torch.channels_last),
    "columns with gaps": lambda device: normal(6, 10).to(device)[:, ::2],
    "rows with gaps": lambda device: normal(6, 10).to(device)[1::3],
    "one column": lambda device: normal(9, 3).to(device)[:, 1],
    "unaligned": lambda device: normal(100).to(device)[1:],
}
SIZES = [(), (1,), (0,), (3, 0, 2), (7,), (1, 1, 1), (2049,), (5, 411)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameter_of_any_layout_equals_its_contiguous_copy(layout: str, backend: torch.device) -> None:
    param = leaf(LAYOUTS[layout](backend))
    strides = param.stride()
    plain = step_with_plain_copy(AdaXW, param)
    torch.testing.assert_close(param, plain, rtol=1e-6, atol=0)
    assert param.stride() == strides


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_parameter_of_any_size_equals_torch(shape: tuple[int, ...], backend: torch.device) -> None:
    params, by_torch = (leaf(normal(*shape).to(backend)) for _ in range(2))
    optimizers = Adam([params], lr=0.1), torch.optim.Adam([by_torch], lr=0.1)
    for seed in (1, 2, 3):
        params.grad, by_torch.grad = (normal(*shape, seed=seed).to(backend) for _ in range(2))
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(params, by_torch, rtol=1e-5, atol=1e-6)


def test_memory_between_the_elements_does_not_change(backend: torch.device) -> None:
    storage = torch.full((8, 12), GUARD, device=backend)
    inside = torch.zeros_like(storage, dtype=torch.bool)
    inside[2:6:2, 1:11:3] = True
    param = leaf(storage[2:6:2, 1:11:3])
    with torch.no_grad():
        param.copy_(normal(2, 4))
    step_with_plain_copy(AdaXW, param)
    assert (storage[~inside] == GUARD).all()
    assert (storage[inside] != GUARD).all()


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda grad: grad.t().contiguous().t(),
    "with gaps": lambda grad: torch.stack([grad, grad + 1], dim=-1)[..., 0],
    "sparse": lambda grad: grad.to_sparse(),
    "uncoalesced": lambda grad: torch.sparse_coo_tensor(
        torch.ones_like(grad).nonzero().repeat(2, 1).t(),
        (grad / 2).flatten().repeat(2),
        grad.shape,
        check_invariants=True,
    ),
    "negated": lambda grad: torch._neg_view(-grad),
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradient_of_any_kind_equals_its_plain_copy(kind: str, backend: torch.device) -> None:
    param, plain = (leaf(normal(4, 6).to(backend)) for _ in range(2))
    plain.grad = normal(4, 6, seed=1).to(backend)
    param.grad = GRADIENTS[kind](plain.grad)
    for each in (param, plain):
        AdaXW([each], lr=0.1).step()
    assert torch.equal(param, plain)


@pytest.mark.parametrize("expanded", [False, True], ids=["own", "expanded"])
def test_gradient_is_only_read(expanded: bool, backend: torch.device) -> None:
    param = leaf(normal(4, 6).to(backend))
    grad = normal(4, 1, seed=1).to(backend).expand(4, 6) if expanded else normal(4, 6, seed=1).to(backend)
    param.grad, before, version = grad, grad.clone(), grad._version
    AdaXW([param], maximize=True, weight_decay=0.5).step()
    assert param.grad is grad and torch.equal(grad, before) and grad._version == version


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_adam_equals_torch(dtype: torch.dtype, backend: torch.device) -> None:
    params, by_torch = (leaf(normal(5, 3, dtype=dtype).to(backend)) for _ in range(2))
    optimizers = Adam([params], weight_decay=0.1), torch.optim.Adam([by_torch], weight_decay=0.1)
    for seed in (1, 2, 3):
        params.grad, by_torch.grad = (normal(5, 3, seed=seed, dtype=dtype).to(backend) for _ in range(2))
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(params, by_torch, rtol=1e-6, atol=1e-6)


@every_class
@pytest.mark.parametrize("conjugated", [False, True], ids=["plain", "conjugated"])
def test_complex_parameter_equals_its_real_view(optimizer_class: type, conjugated: bool, backend: torch.device) -> None:
    param = leaf(normal(5, 3, dtype=torch.complex64).to(backend))
    real = leaf(torch.view_as_real(param.detach()).clone())
    grad = normal(5, 3, seed=1, dtype=torch.complex64).to(backend)
    param.grad = grad.conj() if conjugated else grad
    real.grad = torch.view_as_real(param.grad.resolve_conj()).clone()
    for each in (param, real):
        optimizer_class([each], lr=0.1).step()
    assert torch.equal(torch.view_as_real(param.detach()), real)


@pytest.mark.filterwarnings("ignore:invalid value")  # from numpy, in Triton's interpreter
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_poisoned_gradient_spreads_as_in_torch(poison: float, backend: torch.device) -> None:
    params, by_torch = (leaf(normal(9).to(backend)) for _ in range(2))
    optimizers = Adam([params]), torch.optim.Adam([by_torch])
    for seed in (1, 2):
        for param, optimizer in zip((params, by_torch), optimizers, strict=True):
            param.grad = normal(9, seed=seed).to(backend)
            if seed == 1:
                param.grad[4] = poison
            optimizer.step()
    assert params.isfinite().tolist() == by_torch.isfinite().tolist() == [index != 4 for index in range(9)]


def test_poisoned_gradient_stays_in_its_tensor(backend: torch.device) -> None:
    runs = []
    for value in (1.0, torch.nan):
        params = [leaf(normal(300, seed=index).to(backend)) for index in range(3)]
        for index, param in enumerate(params):
            param.grad = torch.full_like(param, value if index == 1 else 0.5)
        AdaXW(params).step()
        runs.append(params)
    assert runs[1][1].isnan().all()
    for index in (0, 2):
        assert torch.equal(runs[0][index], runs[1][index])


@pytest.mark.parametrize("layout", ["plain", "with gaps"])
def test_backward_that_needs_the_old_values_raises(layout: str, backend: torch.device) -> None:
    param = leaf(normal(6, 2).to(backend)[:, 0] if layout == "with gaps" else normal(6).to(backend))
    loss = param.square().sum()
    param.grad = torch.ones_like(param)
    AdaXW([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_class
def test_mixed_dtypes_equal_separate_optimizers(optimizer_class: type, backend: torch.device) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)
    params = [Parameter(normal(40, dtype=torch.float32).to(backend, dtype)) for dtype in dtypes]
    alone = [Parameter(param.detach().clone()) for param in params]
    for param in (*params, *alone):
        param.grad = torch.ones_like(param)
    optimizer_class(params).step()
    for param in alone:
        optimizer_class([param]).step()
    assert all(torch.equal(param, other) for param, other in zip(params, alone, strict=True))
