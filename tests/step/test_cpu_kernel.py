"""The native CPU kernel. Oracle: the PyTorch reference, bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

import numpy
import pytest
import torch
from adax_triton.kernels import tables
from torch import Tensor

from adax_triton.step import cpu_kernel as module
from adax_triton.step.cpu_kernel import CHUNK_SIZE, KernelVariant, build_problem, cpu_kernel
from adax_triton.step.gradient_handling import DEFAULT_DECISION
from adax_triton.step.reference_steps import ReferenceLaunch
from adax_triton.step.tensor_step import TensorStep
from adax_triton.update import reference
from adax_triton.update.coefficients import StepScalars
from adax_triton.update.quantized_update import load_master

pytestmark = pytest.mark.skipif(build_problem() is not None, reason="no C++ compiler")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
PLAIN = KernelVariant(F32, F32)
# Every dtype, every states and master pair, and both roundings; not the full product.
VARIANTS = [
    *(KernelVariant(param, grad) for param in (F32, F64) for grad in (F32, BF16, F16, F64)),
    *(KernelVariant(BF16, grad) for grad in (BF16, F32, F64)),
    *(KernelVariant(F16, grad) for grad in (F16, F32)),
    *(KernelVariant(F32, F32, states) for states in ("bfloat16", "8bit_v16", "8bit")),
    *(KernelVariant(BF16, BF16, states, stochastic=True) for states in ("float32", "bfloat16", "8bit_v16", "8bit")),
    *(KernelVariant(BF16, BF16, states, "int16") for states in ("float32", "bfloat16", "8bit_v16", "8bit")),
    *(KernelVariant(BF16, F32, states, "int8") for states in ("float32", "bfloat16", "8bit_v16", "8bit")),
    *(KernelVariant(F16, F16, states, "float32") for states in ("float32", "bfloat16", "8bit_v16", "8bit")),
    *(KernelVariant(param, BF16, "float32", "float32", param_is_copy=True) for param in (F32, BF16, F16)),
    KernelVariant(BF16, BF16, "8bit", "float32", param_is_copy=True),
]
WITH_TELEMETRY = [
    variant._replace(telemetry=True)
    for variant in (
        PLAIN,
        KernelVariant(F64, F32),
        KernelVariant(BF16, BF16, "bfloat16", stochastic=True),
        KernelVariant(BF16, BF16, "8bit", "int8"),
        KernelVariant(F16, F16, "8bit_v16", "float32"),
        KernelVariant(BF16, BF16, "float32", "float32", param_is_copy=True),
        KernelVariant(BF16, F32, "8bit_v16", "int16"),
    )
]
SIZES = (0, 1, 31, 32, 33, 511, 512, 1001, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE + 77)
ROWS = [
    StepScalars(1e-3, 0.1, 0.01, 1e-8, 1e-5, 0.0, 1.0),
    StepScalars(1e-2, 0.2, 1.0, 2.0**-63, 0.0, 0.1, -1.0),
    StepScalars(3e-3, 0.0123, 3e-4, 0.0, 0.0, 0.0, 0.37),
    StepScalars(1e-3, 1.0, 1e-7, 1e-6, 0.1, 1e-3, 1e-3),
]
KEYS = [(0x12345678, 0x9ABCDEF0), (0, 0xFFFFFFFF), (0xFFFFFFFF, 1), (7, 11)]
FIRST_ELEMENTS = (0, 1, 2**32 - 100, 2**32 + 5, 2**40 + 3)
SPECIAL = (
    *(0.0, -0.0, 1e-45, -1e-45, 1e-40, 2.0**-126, 6e-8, -3e-8, 6.1e-5, 65504.0, 65519.99, 65520.0, 1e20, -3e38),
    *(3.4028235e38, float("inf"), float("-inf"), float("nan"), 1.00390625, 1.01171875, 1.00048828125, 2049.0),
)
CANARY = 0xA5
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-command-line-argument")


def variant_id(variant: KernelVariant) -> str:
    return "-".join(str(field).removeprefix("torch.") for field in variant)


each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
each_telemetry = pytest.mark.parametrize("variant", WITH_TELEMETRY, ids=variant_id)


@pytest.fixture(autouse=True)
def exact_roots_and_restored_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # torch.sqrt is sometimes off by one ulp. The reference corrects that for float32 only.
    monkeypatch.setattr(reference, "_root", lambda values: torch.from_numpy(numpy.sqrt(values.numpy())))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def mixed_values(numel: int, generator: torch.Generator) -> Tensor:
    """Return float64 values of many magnitudes; one in eight is special."""
    scale = 10 ** (8 * torch.rand(-(-numel // 32), 1, generator=generator) - 5)
    values = (torch.randn(scale.numel(), 32, generator=generator) * scale).flatten()[:numel].double()
    special = torch.tensor(SPECIAL, dtype=F64)[torch.randint(len(SPECIAL), (numel,), generator=generator)]
    return torch.where(torch.rand(numel, generator=generator) < 0.125, special, values)


def random_words(numel: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, (numel,), generator=generator).to(dtype)


def new_step(variant: KernelVariant, numel: int, index: int) -> TensorStep:
    generator = torch.Generator().manual_seed(numel + index)
    param = mixed_values(numel, generator).to(variant.param_dtype)
    exp_avg, exp_avg_sq = mixed_values(numel, generator) * 0.1, mixed_values(numel, generator).abs()
    exponents = master = None
    if variant.states in ("8bit_v16", "8bit"):
        # Fill states with random bits, but give most groups exponents that a step could have written.
        second, groups = (torch.int16, torch.uint8) if variant.states == "8bit_v16" else (torch.uint8, torch.int16)
        exp_avg, exp_avg_sq = random_words(numel, torch.int8, generator), random_words(numel, second, generator)
        exponents = random_words(-(-numel // 32), groups, generator)
        if groups == torch.int16:
            exponents = torch.where(torch.rand(exponents.shape, generator=generator) < 0.7, 0x487E, exponents)
            exponents = exponents.to(groups)
        else:
            exponents = torch.where(torch.rand(exponents.shape, generator=generator) < 0.7, 3, exponents).to(groups)
            exp_avg_sq[numel // 4 :] = exp_avg_sq[numel // 4 :] & 0x3FFF
    else:
        dtype = BF16 if variant.states == "bfloat16" else F64 if variant.param_dtype == F64 else F32
        exp_avg, exp_avg_sq = exp_avg.to(dtype), exp_avg_sq.to(dtype)
    if variant.master in ("int16", "int8"):
        master = random_words(numel, getattr(torch, variant.master), generator)
    elif variant.master == "float32":
        master = param.float()
        master *= 1 + 1e-4 * torch.randn(numel, generator=generator)  # some masters still round to the parameter
    return TensorStep(
        *(param, mixed_values(numel, generator).to(variant.grad_dtype), exp_avg, exp_avg_sq, index % len(ROWS)),
        *(variant.states, master, exponents, variant.stochastic, FIRST_ELEMENTS[index % len(FIRST_ELEMENTS)]),
        param_is_copy=variant.param_is_copy,
    )


class Placed(NamedTuple):
    """A copy of a tensor at a byte offset among canaries."""

    memory: Tensor
    start: int
    original: Tensor

    @property
    def address(self) -> int:
        return self.memory.data_ptr() + self.start

    def content(self) -> Tensor:
        end = self.start + self.original.nbytes
        around = torch.cat([self.memory[: self.start], self.memory[end:]])
        assert (around == CANARY).all()
        return self.memory[self.start : end].clone().view(self.original.dtype)


def placed(tensor: Tensor, shift: int) -> Placed:
    memory = torch.full((tensor.nbytes + 192,), CANARY, dtype=torch.uint8)
    memory[64 + shift : 64 + shift + tensor.nbytes] = tensor.view(torch.uint8)
    return Placed(memory, 64 + shift, tensor)


def arrays(step: TensorStep) -> list[Tensor | None]:
    return [*step.tensors, step.master, step.group_exponents]


class Launched(NamedTuple):
    tensors: list[list[Tensor | None]]
    sums: Tensor
    chunks: Tensor


def launched(variant: KernelVariant, steps: list[TensorStep], shift: int = 0, skip: bool = False) -> Launched:
    """Run the kernel on copies, `shift` bytes past a multiple of 64."""
    copies = [[None if array is None else placed(array, shift) for array in arrays(step)] for step in steps]
    rows = [
        [
            *(0 if copy is None else copy.address for copy in tensors),
            step.first_element,
            step.param.numel(),
            step.scalar_row,
        ]
        for tensors, step in zip(copies, steps, strict=True)
    ]
    chunks = torch.tensor(
        [index << 32 | k for index, step in enumerate(steps) for k in range(-(-step.param.numel() // CHUNK_SIZE))],
        dtype=torch.int64,
    )
    float64 = variant.param_dtype == F64
    packed = b"".join(tables.scalar_row(row, key, skip, float64) for row, key in zip(ROWS, KEYS, strict=True))
    scalars = torch.frombuffer(bytearray(packed), dtype=F64 if float64 else F32)
    sums = torch.full((chunks.numel(), len(tables.SUM_COLUMNS)), float("nan"), dtype=scalars.dtype)
    table = torch.tensor(rows, dtype=torch.int64)
    cpu_kernel(variant).step(table, chunks, scalars, sums if variant.telemetry else None)
    tensors = [[None if copy is None else copy.content() for copy in row] for row in copies]
    return Launched(tensors, sums, chunks)


def cloned(steps: list[TensorStep]) -> list[TensorStep]:
    return [
        step.map_tensors(Tensor.clone)._replace(
            group_exponents=None if step.group_exponents is None else step.group_exponents.clone()
        )
        for step in steps
    ]


def reference_result(steps: list[TensorStep]) -> list[TensorStep]:
    steps = cloned(steps)
    ReferenceLaunch(steps, ()).run(ROWS, KEYS, DEFAULT_DECISION, None)
    return steps


def assert_same_bits(actual: Tensor | None, expected: Tensor | None) -> None:
    if actual is None or expected is None:
        assert actual is expected
        return
    assert actual.dtype == expected.dtype
    if actual.is_floating_point():
        signed = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.itemsize]
        nan = actual.isnan() & expected.isnan()
        actual, expected = (tensor.view(signed).masked_fill(nan, 0) for tensor in (actual, expected))
    wrong = (actual != expected).nonzero().flatten()
    assert wrong.numel() == 0, (wrong[:8], actual[wrong[:8]], expected[wrong[:8]], wrong.numel())


def assert_is_reference(result: Launched, steps: list[TensorStep]) -> None:
    for actual, expected in zip(result.tensors, reference_result(steps), strict=True):
        for found, wanted in zip(actual, arrays(expected), strict=True):
            assert_same_bits(found, wanted)


def steps_of(variant: KernelVariant, sizes: tuple[int, ...] = SIZES) -> list[TensorStep]:
    return [new_step(variant, numel, index) for index, numel in enumerate(sizes)]


@each_variant
@pytest.mark.parametrize("shift", [0, 1])
def test_equals_the_reference_bit_for_bit(variant: KernelVariant, shift: int) -> None:
    steps = steps_of(variant)
    assert_is_reference(launched(variant, steps, shift), steps)


@pytest.mark.parametrize("variant", [VARIANTS[0], *WITH_TELEMETRY], ids=variant_id)
def test_telemetry_and_threads_change_no_bits(variant: KernelVariant) -> None:
    steps = steps_of(variant, (*SIZES, 5 * CHUNK_SIZE + 3))
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        results.append(launched(variant, steps))
    assert_is_reference(results[0], steps)
    for result in results[1:]:
        assert_same_bits(result.sums, results[0].sums)
        for actual, expected in zip(result.tensors, results[0].tensors, strict=True):
            for found, wanted in zip(actual, expected, strict=True):
                assert_same_bits(found, wanted)


def finite_steps(variant: KernelVariant) -> list[TensorStep]:
    """Return steps on moderate numbers, so that their sums do not overflow."""
    steps = steps_of(variant)
    generator = torch.Generator().manual_seed(1)
    for step in steps:
        for tensor in (step.param, step.grad):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        if step.group_exponents is None:
            step.exp_avg.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
            step.exp_avg_sq.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        else:
            step.exp_avg.zero_()
            step.exp_avg_sq.zero_()
            step.group_exponents.zero_()
        if step.master is not None and step.master.dtype == F32:
            step.master.copy_(step.param)
    return steps


def expected_sums(steps: list[TensorStep], after: list[TensorStep]) -> Tensor:
    """Return the telemetry sums of each tensor, (tensors, 5) float64."""
    rows = []
    for old, new in zip(steps, after, strict=True):
        plain = old.param.dtype == F64
        before, weights = (
            step.param if plain else load_master(step.param, step.master, step.param_is_copy) for step in (old, new)
        )
        update = (weights - before).double()
        grad = old.grad.to(before.dtype).double()
        rows.append(
            [
                *(grad.square().sum(), update.square().sum(), weights.double().square().sum()),
                *((update == 0).sum(), (~grad.isfinite()).sum()),
            ]
        )
    return torch.tensor(rows, dtype=F64)


def per_tensor(result: Launched, count: int) -> Tensor:
    sums = torch.zeros(count, len(tables.SUM_COLUMNS), dtype=F64)
    return sums.index_add_(0, result.chunks >> tables.CHUNK_BITS, result.sums.double())


@each_telemetry
def test_telemetry_sums(variant: KernelVariant) -> None:
    steps = finite_steps(variant)
    steps[-1].grad[5:8] = torch.tensor([float("inf"), float("nan"), float("-inf")])
    sums = per_tensor(launched(variant, steps), len(steps))
    expected = expected_sums(steps, reference_result(steps))
    torch.testing.assert_close(sums[:, 3:], expected[:, 3:], rtol=0, atol=0)
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=0, equal_nan=True)


@each_telemetry
def test_skip_writes_nothing_but_sums(variant: KernelVariant) -> None:
    steps = finite_steps(variant)
    result = launched(variant, steps, skip=True)
    for actual, step in zip(result.tensors, steps, strict=True):
        for found, wanted in zip(actual, arrays(step), strict=True):
            assert_same_bits(found, wanted)
    sums = per_tensor(result, len(steps))
    torch.testing.assert_close(sums, expected_sums(steps, steps), rtol=1e-5, atol=0)
    assert (sums[:, 1] == 0).all()
    assert sums[:, 3].tolist() == [step.param.numel() for step in steps]


@each_variant
def test_skip_without_telemetry_writes_nothing(variant: KernelVariant) -> None:
    steps = steps_of(variant, (0, 33, 2 * CHUNK_SIZE + 5))
    for actual, step in zip(launched(variant, steps, skip=True).tensors, steps, strict=True):
        for found, wanted in zip(actual, arrays(step), strict=True):
            assert_same_bits(found, wanted)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_sum_of_squares(dtype: torch.dtype) -> None:
    variant = KernelVariant(F64 if dtype == F64 else F32, dtype)
    grads = [torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype) for numel in SIZES]
    if dtype != F16:
        grads[-1][3] = 3e38  # its square overflows float32
    table = torch.tensor([[0, grad.data_ptr(), *[0] * 5, grad.numel(), 0] for grad in grads])
    chunks = torch.tensor(
        [index << 32 | k for index, grad in enumerate(grads) for k in range(-(-grad.numel() // CHUNK_SIZE))]
    )
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        partials = torch.full((chunks.numel(),), float("nan"), dtype=F64)
        cpu_kernel(variant).sum_of_squares(table, chunks, partials)
        results.append(partials)
    for partials in results[1:]:
        assert_same_bits(partials, results[0])
    expected = torch.stack(
        [part.double().square().sum() for grad in grads for part in grad.split(CHUNK_SIZE) if len(part)]
    )
    torch.testing.assert_close(results[0], expected, rtol=1e-14, atol=0)


def one_step(variant: KernelVariant, param: Tensor, grad: Tensor, master: Tensor | None) -> list[Tensor | None]:
    zeros = torch.zeros(param.numel())
    step = TensorStep(param, grad, zeros, zeros, 0, master=master, param_is_copy=variant.param_is_copy)
    copies = [None if array is None else placed(array, 0) for array in arrays(step)]
    addresses = [0 if copy is None else copy.address for copy in copies]
    table = torch.tensor([[*addresses, 0, param.numel(), 0]])
    # These scalars set m to the gradient and leave the weight unchanged.
    row = tables.scalar_row((0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0))
    scalars = torch.frombuffer(bytearray(row), dtype=F32)
    cpu_kernel(variant).step(table, torch.arange(-(-param.numel() // CHUNK_SIZE)), scalars)
    return [None if copy is None else copy.content() for copy in copies]


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_all_16_bit_gradients(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    variant = KernelVariant(F32, dtype)
    exp_avg = one_step(variant, torch.ones(patterns.numel()), patterns, None)[2]
    assert exp_avg is not None
    assert_same_bits(exp_avg, torch.zeros(1) + (patterns.float() - 0.0) * 1.0)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_rounding_to_nearest_even(dtype: torch.dtype) -> None:
    words = torch.arange(1 << 16).to(torch.int16).view(dtype).float()
    words = words[words.isfinite()].sort().values
    between = (words[1:].double() + words[:-1].double()) / 2
    ties = between.float()
    bits = torch.cat([words, ties, torch.tensor(SPECIAL, dtype=F32)]).view(torch.int32)
    weights = torch.cat([bits - 1, bits, bits + 1]).view(F32)
    variant = KernelVariant(dtype, BF16, "float32", "float32", param_is_copy=True)
    zeros = torch.zeros(weights.numel())
    param = one_step(variant, zeros.to(dtype), zeros.bfloat16(), weights)[0]
    finite = weights.isfinite()  # the update of an infinite weight is NaN
    assert param is not None
    # A zero weight loses its sign in the update, as it does in the reference.
    assert_same_bits(param[finite] + 0.0, weights[finite].to(dtype) + 0.0)
    assert param[~finite].isnan().all()


@each_variant
def test_several_steps_of_moderate_numbers(variant: KernelVariant) -> None:
    steps = finite_steps(variant)
    for _ in range(3):
        result = launched(variant, steps)
        assert_is_reference(result, steps)
        for step, tensors in zip(steps, result.tensors, strict=True):
            for own, updated in zip(arrays(step), tensors, strict=True):
                if own is not None and updated is not None:
                    own.copy_(updated)


@pytest.mark.skipif(shutil.which("clang++") is None, reason="no Clang")
def test_clang_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [*WITH_TELEMETRY, PLAIN, KernelVariant(F32, F32, "8bit"), KernelVariant(F32, BF16, "bfloat16")]
    expected = [launched(variant, finite_steps(variant)).sums for variant in variants]
    module.cpu_kernel.cache_clear()
    monkeypatch.setenv("CXX", "clang++")
    try:
        for variant, sums in zip(variants, expected, strict=True):
            steps = steps_of(variant)
            assert_is_reference(launched(variant, steps), steps)
            assert_same_bits(launched(variant, finite_steps(variant)).sums, sums)
    finally:
        module.cpu_kernel.cache_clear()


@pytest.mark.parametrize("compiler", ["g++", "clang++", "aarch64-linux-gnu-g++"])
def test_compiles_without_warnings(compiler: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    for variant in (*VARIANTS, *WITH_TELEMETRY):
        definitions = [f"-D{name}={value}" for name, value in variant.definitions().items()]
        # The other tests build all variants with a native compiler.
        depth = "-O0" if compiler.startswith("aarch64") else "-fsyntax-only"
        command = [compiler, *module._FLAGS, depth, *WARNINGS, *definitions]
        done = subprocess.run([*command, str(module._SOURCES[0]), "-o", os.devnull], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
