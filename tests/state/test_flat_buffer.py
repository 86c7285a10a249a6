"""FlatBuffer: offsets and strides of its views, and zero padding.

Oracle of `is_dense`: a list of every address.
"""

import itertools

import pytest
import torch
from torch import Tensor

from adax_triton.state.flat_buffer import ALIGNMENT, FlatBuffer, flat_view, is_dense

SHAPES = [(1,), (), (127,), (128,), (129,), (0,), (3, 5, 7), (2, 0, 4), (1000,)]


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_every_view_starts_at_an_aligned_element(dtype: torch.dtype) -> None:
    buffer = FlatBuffer(tensors(), dtype=dtype)
    assert [view.storage_offset() % ALIGNMENT for view in buffer.views] == [0] * len(SHAPES)


def test_views_do_not_overlap() -> None:
    buffer = FlatBuffer(tensors())
    for number, view in enumerate(buffer.views, start=1):
        view += number
    expected = [torch.full(shape, float(number)) for number, shape in enumerate(SHAPES, start=1)]
    assert all(map(torch.equal, buffer.views, expected))


def test_padding_stays_zero_when_views_are_written() -> None:
    buffer = FlatBuffer(tensors())
    in_views = torch.zeros(buffer.data.numel(), dtype=torch.bool)
    for view in buffer.views:
        view.fill_(float("nan"))
        in_views[view.storage_offset() : view.storage_offset() + view.numel()] = True
    assert torch.equal(buffer.data.nan_to_num(nan=1.0), in_views.float())


def test_padding_is_less_than_one_alignment_per_tensor() -> None:
    buffer = FlatBuffer(tensors())
    numels = [torch.Size(shape).numel() for shape in SHAPES]
    assert buffer.data.numel() == sum(-(-numel // ALIGNMENT) * ALIGNMENT for numel in numels)


def test_numel_counts_elements_without_padding() -> None:
    assert FlatBuffer(tensors()).numel == 1 + 1 + 127 + 128 + 129 + 0 + 105 + 0 + 1000


def test_empty_list_gives_an_empty_buffer() -> None:
    assert FlatBuffer([]).data.numel() == 0


@pytest.mark.parametrize(
    "layout", [name for name, tensor in LAYOUTS.items() if is_dense(tensor) and tensor.numel() > 1]
)
def test_view_of_a_dense_tensor_has_its_strides(layout: str) -> None:
    tensor = LAYOUTS[layout]
    assert FlatBuffer([torch.empty(3), tensor]).views[1].stride() == tensor.stride()


@pytest.mark.parametrize("layout", ["rows-with-gaps", "every-second", "expanded"])
def test_view_of_a_tensor_with_gaps_is_contiguous(layout: str) -> None:
    assert FlatBuffer([LAYOUTS[layout]]).views[0].is_contiguous()


def test_dtype_argument_overrides_tensor_dtypes() -> None:
    assert FlatBuffer([*tensors(torch.bfloat16), *tensors()], dtype=torch.float32).data.dtype == torch.float32


def test_tensors_on_two_devices_raise() -> None:
    with pytest.raises(ValueError, match=r"one device, got \['cpu', 'meta'\]"):
        FlatBuffer([torch.empty(3), torch.empty(3, device="meta")])


def test_tensors_of_two_dtypes_raise() -> None:
    with pytest.raises(ValueError, match=r"one dtype, got \['torch.bfloat16', 'torch.float32'\]; pass dtype="):
        FlatBuffer([torch.empty(3), torch.empty(3, dtype=torch.bfloat16)])
