"""Checks of memory layout, and zeros with a layout.

Oracle of `is_dense`: a list of every address.
"""

import itertools

import pytest
import torch
from torch import Tensor

from adax_triton.state.memory_layout import flat_view, is_dense, zeros_with_strides_of


def channels_last() -> Tensor:
    return torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)


LAYOUTS = {
    "contiguous": torch.empty(3, 4, 5),
    "scalar": torch.empty(()),
    "empty": torch.empty(3, 0, 5),
    "empty-expanded": torch.empty(1, 0).expand(7, 0),
    "transposed": torch.empty(3, 4).T,
    "permuted": torch.empty(3, 4, 5).permute(2, 0, 1),
    "channels-last": channels_last(),
    "offset": torch.empty(20)[3:15],
    "rows-with-gaps": torch.empty(4, 8)[:, :5],
    "every-second": torch.empty(10)[::2],
    "every-second-row": torch.empty(6, 3)[::2],
    "one-element-stride-7": torch.empty(1).as_strided((1,), (7,)),
    "one-row-any-stride": torch.empty(5).as_strided((1, 5), (99, 1)),
    "one-column-of-wide": torch.empty(4, 8)[:, :1],
    "expanded": torch.empty(1, 4).expand(3, 4),
    "overlapping-windows": torch.empty(6).as_strided((3, 4), (1, 1)),
    "overlap-and-gap-of-right-size": torch.empty(8).as_strided((2, 2, 2), (1, 1, 3)),
    "diagonal": torch.empty(4, 4).diagonal(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_dense_equals_a_check_of_every_address(layout: str) -> None:
    tensor = LAYOUTS[layout]
    indices = itertools.product(*map(range, tensor.shape))
    addresses = sorted(sum(i * stride for i, stride in zip(index, tensor.stride(), strict=True)) for index in indices)
    assert is_dense(tensor) == (addresses == list(range(tensor.numel())))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=lambda order: "".join(map(str, order)))
def test_flat_view_is_in_memory_order(order: tuple[int, ...]) -> None:
    flat = torch.arange(2 + 24)[2:]
    assert torch.equal(flat_view(flat.view(2, 3, 4).permute(order)), flat)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zeros_have_the_strides_of_a_dense_tensor_and_no_gaps(layout: str) -> None:
    tensor = LAYOUTS[layout]
    zeros = zeros_with_strides_of(tensor, torch.bfloat16)
    assert (zeros.shape, zeros.dtype) == (tensor.shape, torch.bfloat16)
    assert not zeros.any() and zeros.untyped_storage().nbytes() == 2 * tensor.numel()
    expected = tensor if is_dense(tensor) else tensor.contiguous()
    pairs = zip(zeros.stride(), expected.stride(), tensor.shape, strict=True)
    assert all(stride == wanted for stride, wanted, size in pairs if size > 1 and tensor.numel())
