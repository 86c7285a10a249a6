"""The Triton kernel of the gradient norm. Oracles: float64 and torch."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from adax_triton.step.device_tables import chunk_table

pytest.importorskip("triton")

from adax_triton.kernels.grad_norm import MAX_PARTIALS, grad_norm_partials, partial_count
from adax_triton.kernels.launch import current_backend, launch_shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
CHUNK = launch_shape(current_backend()).chunk_size
SIZES = [0, 1, 2, 3, 7, 8, 9, 257, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 6]
CANARY = 77.0


def random_grads(numels: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(numels))
    return [torch.randn(numel, generator=generator, dtype=torch.float64).to(device, dtype) for numel in numels]


def surrounded(grads: Sequence[Tensor], fill: float, odd: bool) -> tuple[list[Tensor], Tensor]:
    """Return gradient copies inside a buffer filled with `fill`, and the buffer."""
    room = [-(-(grad.numel() + 2) // 64) * 64 for grad in grads]
    starts = [64 + odd + end for end in itertools.accumulate(room, initial=0)]
    buffer = grads[0].new_full((starts[-1] + 64,), fill)
    copies = [buffer[start : start + grad.numel()] for start, grad in zip(starts, grads, strict=False)]
    for copy, grad in zip(copies, grads, strict=True):
        copy.copy_(grad)
    return copies, buffer


def canaries(count: int, device: torch.device) -> Tensor:
    return torch.full((count,), CANARY, dtype=torch.float64, device=device)


def launch(grads: Sequence[Tensor], count: int | None = None, aligned: bool = True) -> Tensor:
    """Return the partial sums. Partials that are not written stay CANARY."""
    numels = [grad.numel() for grad in grads]
    chunks = chunk_table(numels, CHUNK).to(grads[0].device)
    rows = [(0, grad.data_ptr(), 0, 0, 0, 0, 0, grad.numel(), 0) for grad in grads]
    partials = canaries(partial_count(chunks.numel()) if count is None else count, chunks.device)
    grad_norm_partials(torch.tensor(rows, device=chunks.device), chunks, partials, grads[0].dtype, aligned)
    return partials


def assert_as_accurate_as_torch(partials: Tensor, grads: Sequence[Tensor]) -> None:
    """Assert error <= 2x torch's float32 error + 1 ulp, against float64."""
    grad = torch.cat([grad.flatten() for grad in grads])
    exact = grad.double().square().sum()
    reference_error = (grad.float().square().sum().double() - exact).abs()
    error = (partials.sum() - exact).abs()
    assert error <= 2 * reference_error + torch.finfo(torch.float32).eps * exact, f"{grad.numel()} elements"


@pytest.mark.parametrize("odd", [False, True], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_over_any_size_is_as_accurate_as_torch(dtype: str, odd: bool, device: torch.device) -> None:
    for numel in SIZES:
        grads, _ = surrounded(random_grads([numel], DTYPES[dtype], device), fill=CANARY, odd=odd)
        assert_as_accurate_as_torch(launch(grads, aligned=not odd), grads)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_over_many_tensors_is_as_accurate_as_torch(dtype: str, count: int, device: torch.device) -> None:
    grads = random_grads(3 * SIZES, DTYPES[dtype], device)
    assert_as_accurate_as_torch(launch(grads, count), grads)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_each_partial_sums_every_kth_chunk(count: int, device: torch.device) -> None:
    grads = random_grads([CHUNK + 5, 3, 4 * CHUNK, 0, 2 * CHUNK + 1], torch.float32, device)
    chunks = [chunk for grad in grads for chunk in grad.split(CHUNK) if chunk.numel()]
    partials = launch(grads, count)
    for program in range(count):
        assert_as_accurate_as_torch(partials[program], chunks[program::count] or [torch.zeros(0, device=device)])


@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("tensors", [0, 1, 2])
def test_without_chunks_every_partial_is_zero(tensors: int, count: int, device: torch.device) -> None:
    partials = canaries(count, device)
    tables = torch.zeros(tensors, 9, dtype=torch.int64, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    grad_norm_partials(*tables, partials, torch.float32, aligned=True)
    assert torch.equal(partials, torch.zeros_like(partials))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nonfinite_gradient_makes_the_sum_nonfinite(dtype: str, value: float, device: torch.device) -> None:
    grads = random_grads([5, 3 * CHUNK + 6, 1, CHUNK], DTYPES[dtype], device)
    positions = [
        (0, 0),
        (0, 4),
        (1, 0),
        (1, CHUNK - 1),
        (1, CHUNK),
        (1, 3 * CHUNK),
        (1, 3 * CHUNK + 5),
        (2, 0),
        (3, -1),
    ]
    for tensor, element in positions:
        kept = grads[tensor][element].clone()
        grads[tensor][element] = value
        assert not launch(grads, 3).sum().isfinite(), (tensor, element)
        grads[tensor][element] = kept
    assert launch(grads, 3).sum().isfinite()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("grad", [3e19, -3e38])
def test_a_square_past_float32_makes_the_sum_infinite(grad: float, device: torch.device) -> None:
    assert launch([torch.tensor([1.0, grad, 2.0], device=device)]).tolist() == [float("inf")]


@pytest.mark.parametrize("odd", [False, True], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_between_gradients_is_ignored(dtype: str, odd: bool, device: torch.device) -> None:
    given = random_grads(SIZES, DTYPES[dtype], device)
    grads, _ = surrounded(given, fill=float("nan"), odd=odd)
    assert_as_accurate_as_torch(launch(grads, aligned=not odd), given)


@pytest.mark.parametrize("odd", [False, True], ids=["aligned", "unaligned"])
def test_only_the_partials_are_written(odd: bool, device: torch.device) -> None:
    grads, buffer = surrounded(random_grads(SIZES, torch.bfloat16, device), fill=CANARY, odd=odd)
    around = canaries(48, device)
    rows = torch.tensor([(0, grad.data_ptr(), 0, 0, 0, 0, 0, grad.numel(), 0) for grad in grads], device=device)
    chunks = chunk_table(SIZES, CHUNK).to(device)
    kept = [tensor.clone() for tensor in (buffer, rows, chunks)]
    grad_norm_partials(rows, chunks, around[16:23], torch.bfloat16, aligned=not odd)
    assert all(torch.equal(tensor, old) for tensor, old in zip((buffer, rows, chunks), kept, strict=True))
    assert (around == CANARY).tolist() == [True] * 16 + [False] * 7 + [True] * 25


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_gradients_give_the_same_bits(dtype: str, device: torch.device) -> None:
    grads = random_grads([*SIZES, 40 * CHUNK], DTYPES[dtype], device)
    first = launch(grads, 5)
    assert all(torch.equal(launch([grad.clone() for grad in grads], 5), first) for _ in range(3))


@pytest.mark.parametrize("exponent", [31, 32, 33], ids=["2^31", "2^32", "2^33"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_past_a_power_of_two_are_addressed(exponent: int, dtype: str, device: torch.device) -> None:
    chunk = 2**exponent // CHUNK + 3
    (grad,) = random_grads([1001], DTYPES[dtype], device)
    start = chunk * CHUNK  # of the only launched chunk; the kernel does not access lower addresses
    row = [0, grad.data_ptr() - start * grad.element_size(), 0, 0, 0, 0, 0, start + 1001, 0]
    partials = canaries(2, device)
    tables = torch.tensor([[0] * 9, row], device=device), torch.tensor([(1 << 32) + chunk], device=device)
    grad_norm_partials(*tables, partials, grad.dtype, aligned=True)
    assert_as_accurate_as_torch(partials, [grad])


def test_partial_count_is_bounded() -> None:
    counts = {chunks: partial_count(chunks) for chunks in (0, 1, 5, MAX_PARTIALS, MAX_PARTIALS + 1, 10**6)}
    assert counts == {0: 1, 1: 1, 5: 5, MAX_PARTIALS: 1024, MAX_PARTIALS + 1: 1024, 10**6: 1024}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_gradients_on_a_non_current_device_are_summed() -> None:
    grads = random_grads([CHUNK + 1], torch.float32, torch.device("cuda", 1))
    with torch.cuda.device(0):
        partials = launch(grads)
    assert_as_accurate_as_torch(partials, grads)
