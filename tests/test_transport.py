"""State dicts hold no dtype that collectives do not send, alias the optimizer's memory, and come back as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adax_triton import AdaXW
from adax_triton.transport import with_bytes, with_words

SHAPES = ((4096,), (64, 96), (67, 100), (2, 64, 64), (5000, 2), (3, 5), ())


def trained(states: str, master_weights: str | None) -> AdaXW:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in SHAPES]
    params.append(Parameter(torch.randn(2, 64, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)))
    optimizer = AdaXW(params, states=states, master_weights=master_weights)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).bfloat16()
    optimizer.step()
    return optimizer


def tensors(states: dict[Any, dict[str, Any]]) -> dict[tuple[Any, str], Tensor]:
    return {
        (key, name): value
        for key, state in states.items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


@pytest.mark.parametrize("master_weights", [None, "24bit", "float32"])
@pytest.mark.parametrize("states", ["float32", "bfloat16", "low", "lowest"])
def test_words_travel_as_bytes(states: str, master_weights: str | None, compiled_cpu: torch.device) -> None:
    optimizer = trained(states, master_weights)
    own = tensors({index: optimizer.state[param] for index, param in enumerate(optimizer.param_groups[0]["params"])})
    carried = optimizer.state_dict()
    for key, tensor in tensors(carried["state"]).items():
        words = own[key]
        if words.dtype == torch.int16:
            assert tensor.dtype == torch.uint8
            low, high = tensor.to(torch.int32).unbind(-1)
            assert torch.equal((high << 8) + low, words.to(torch.int32) & 0xFFFF)
        else:
            assert tensor.dtype == words.dtype
        assert tensor.data_ptr() == words.data_ptr()
    for key, tensor in tensors(with_words(carried)["state"]).items():
        assert (tensor.dtype, tensor.stride()) == (own[key].dtype, own[key].stride())
        assert torch.equal(tensor, own[key])
    assert with_words(with_words(carried))["state"].keys() == carried["state"].keys()


def test_state_dicts_of_words_load_as_well(compiled_cpu: torch.device) -> None:
    optimizer, twin = trained("lowest", "float32"), trained("low", None)
    twin.load_state_dict(with_words(optimizer.state_dict()))
    other = trained("low", None)
    other.load_state_dict(optimizer.state_dict())
    left, right = tensors(twin.state_dict()["state"]), tensors(other.state_dict()["state"])
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_what_is_no_state_dict_passes() -> None:
    for given in (
        {},
        {"state": None},
        {"state": {0: 7}},
        {"state": {0: {"exp_avg_sq": torch.zeros((), dtype=torch.uint8)}}},
    ):
        assert with_bytes(given) == given
        assert with_words(given) == given
