"""The Triton step kernel. Oracles: float64 and plain torch."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from adax_triton.kernels.tables import scalar_row
from torch import Tensor, nn

from adax_triton import AdaX
from adax_triton.step.device_tables import chunk_table
from adax_triton.step.launch import LaunchCache
from adax_triton.step.tensor_step import TensorStep
from adax_triton.update.coefficients import StepScalars, effective_eps, step_scalars
from adax_triton.update.reference import adax_update

pytest.importorskip("triton")

from adax_triton.kernels import adax_step as step_module
from adax_triton.kernels.launch import current_backend, is_interpreted, launch_shape
from adax_triton.kernels.variants import StepVariant

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
MIXES = list(itertools.product(("fp32", "bf16", "fp16"), ("fp32", "bf16", "fp16", "fp64")))
CHUNK = launch_shape(current_backend()).chunk_size
SIZES = [0, 1, 2, 3, 5, 255, 256, 257, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 6]
CANARY = 77.0
# Every term of the update has an effect.
SCALARS = StepScalars(0.5, one_minus_beta1=0.1, exp_avg_sq_weight=0.3, eps=1e-3, decay=0.01, l2=0.02, grad_factor=-1.0)


def gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


class UpdateTensors(NamedTuple):
    """The tensors of one update."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def clone(self) -> "UpdateTensors":
        return UpdateTensors(*(tensor.clone() for tensor in self))


def random_tensors(
    numel: int, device: torch.device, param: str = "fp32", grad: str = "fp32", seed: int = 0
) -> UpdateTensors:
    generator = torch.Generator().manual_seed(1000 * seed + numel)
    p, g, m, v = (torch.randn(numel, generator=generator, dtype=torch.float64) for _ in range(4))
    dtypes = (DTYPES[param], DTYPES[grad], torch.float32, torch.float32)
    return UpdateTensors(*(t.to(device, dtype) for t, dtype in zip((p, g, 0.3 * m, v * v), dtypes, strict=True)))


def launch(
    updates: Sequence[UpdateTensors],
    scalars: Sequence[StepScalars] = (SCALARS,),
    rows: Sequence[int] | None = None,
    aligned: bool = True,
) -> None:
    """Update all in one launch; `rows` holds the scalar row of each."""
    device = updates[0].param.device
    rows = [0] * len(updates) if rows is None else rows
    table = [
        (*(tensor.data_ptr() for tensor in update), 0, 0, 0, update.param.numel(), row)
        for update, row in zip(updates, rows, strict=True)
    ]
    step_module.adax_step(
        torch.tensor(table, device=device),
        chunk_table([update.param.numel() for update in updates], CHUNK).to(device),
        torch.tensor([(*row, 0.0, 0.0, 0.0) for row in scalars], dtype=torch.float32, device=device),
        StepVariant(updates[0].param.dtype, updates[0].grad.dtype, aligned=aligned),
    )


def assert_as_accurate_as_torch(found: UpdateTensors, before: UpdateTensors, scalars: StepScalars = SCALARS) -> None:
    """Assert error <= 2x the error of `adax_update` + 1 ulp.

    An error is the largest difference from `adax_update` in float64 over the tensor.
    """
    working, exact = before.clone(), UpdateTensors(*(tensor.double() for tensor in before.clone()))
    adax_update(*working, **scalars._asdict())
    adax_update(*exact, **scalars._asdict())
    for name in ("param", "exp_avg", "exp_avg_sq"):
        value, reference, truth = (getattr(update, name) for update in (found, working, exact))
        if truth.numel() == 0:
            continue
        units = 1
        if is_interpreted() and value.dtype == torch.bfloat16:
            units = 2  # the interpreter truncates; a GPU rounds to nearest
        unit = torch.finfo(value.dtype).eps * truth.abs().max()
        error, reference_error = ((tensor.double() - truth).abs().max() for tensor in (value, reference))
        bound = 2 * reference_error + units * unit
        if name == "param" and not is_interpreted():  # a GPU's square roots and divisions are approximate
            step = exact.exp_avg / (exact.exp_avg_sq.sqrt() + scalars.eps) * scalars.step_size
            bound += 4 * torch.finfo(torch.float32).eps * step.abs().max()
        assert error <= bound, name


def among_canaries(updates: Sequence[UpdateTensors], odd: bool) -> tuple[list[UpdateTensors], list[Tensor]]:
    """Return copies in one buffer per kind of tensor, and the buffers.

    The copies start at odd or at aligned elements. The elements between them are CANARY.
    """
    copies, buffers = [], []
    for tensors in zip(*updates, strict=True):
        room = [-(-(tensor.numel() + 2) // 64) * 64 for tensor in tensors]
        starts = [64 + odd + end for end in itertools.accumulate(room, initial=0)]
        buffer = tensors[0].new_full((starts[-1],), CANARY)
        buffers.append(buffer)
        copies.append([buffer[a : a + tensor.numel()] for a, tensor in zip(starts, tensors, strict=False)])
        for view, tensor in zip(copies[-1], tensors, strict=True):
            view.copy_(tensor)
    return [UpdateTensors(*views) for views in zip(*copies, strict=True)], buffers


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[StepVariant]:
    """Record the variant of every launch."""
    seen: list[StepVariant] = []
    original = step_module.adax_step

    def counting(tensors: Tensor, chunks: Tensor, scalars: Tensor, variant: StepVariant) -> None:
        seen.append(variant)
        original(tensors, chunks, scalars, variant)

    monkeypatch.setattr(step_module, "adax_step", counting)
    return seen


@pytest.mark.parametrize(("param", "grad"), MIXES, ids=[f"{param}-{grad}" for param, grad in MIXES])
def test_steps_are_as_accurate_as_torch(param: str, grad: str, device: torch.device) -> None:
    update = random_tensors(1001, device, param, grad)
    for step in range(1, 6):
        update.grad.copy_(random_tensors(1001, device, param, grad, seed=step).grad)
        before = update.clone()
        scalars = SCALARS._replace(exp_avg_sq_weight=1 / step)
        launch([update], [scalars])
        assert_as_accurate_as_torch(update, before, scalars)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("numel", SIZES, ids=[f"n{numel}" for numel in SIZES])
def test_step_of_any_size_is_as_accurate_as_torch(numel: int, dtype: str, device: torch.device) -> None:
    update = random_tensors(numel, device, dtype, dtype)
    before = update.clone()
    launch([update])
    assert_as_accurate_as_torch(update, before)


@pytest.mark.parametrize("odd", [False, True], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_many_tensors_in_one_launch_are_as_accurate_as_torch(dtype: str, odd: bool, device: torch.device) -> None:
    updates = [random_tensors(numel, device, dtype, dtype) for numel in SIZES]
    stepped, _ = among_canaries(updates, odd)
    launch(stepped, aligned=not odd)
    for found, before in zip(stepped, updates, strict=True):
        assert_as_accurate_as_torch(found, before)


@pytest.mark.parametrize("odd", [False, True], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_between_tensors_is_untouched(dtype: str, odd: bool, device: torch.device) -> None:
    stepped, buffers = among_canaries([random_tensors(numel, device, dtype, dtype) for numel in SIZES], odd)
    launch(stepped, aligned=not odd)
    for tensor in itertools.chain(*stepped):
        tensor.fill_(CANARY)
    assert [bool((buffer == CANARY).all()) for buffer in buffers] == [True] * 4


def test_gradients_are_untouched(device: torch.device) -> None:
    update = random_tensors(CHUNK + 7, device, "bf16", "bf16")
    before = update.clone()
    launch([update])
    assert torch.equal(update.grad, before.grad)


def test_each_tensor_gets_the_scalars_of_its_row(device: torch.device) -> None:
    groups = [dict(lr=0.1, maximize=False), dict(lr=0.5, maximize=True)]
    scalars = [
        step_scalars(
            **group,
            step=step,
            betas=(0.9, 1e-2),
            eps=1e-6,
            weight_decay=0.1,
            decoupled_weight_decay=True,
            second_moment="adax",
            eps_placement="normalized",
        )
        for group, step in itertools.product(groups, (1, 2, 50))
    ]
    rows = [5, 0, 3, 3, 1, 4, 2]
    updates = [random_tensors(numel, device) for numel in (1, CHUNK + 1, 8, 300, 2 * CHUNK, 31, 7)]
    before = [update.clone() for update in updates]
    launch(updates, scalars, rows)
    for found, old, row in zip(updates, before, rows, strict=True):
        assert_as_accurate_as_torch(found, old, scalars[row])


@pytest.mark.parametrize("grad", ["fp32", "bf16", "fp16"])
def test_v_after_step_1_is_the_squared_gradient(grad: str, device: torch.device) -> None:
    update = random_tensors(CHUNK + 3, device, "fp32", grad)
    update.exp_avg_sq.zero_()
    launch([update], [SCALARS._replace(exp_avg_sq_weight=1.0, l2=0.0)])
    assert torch.equal(update.exp_avg_sq, update.grad.float().square())


@pytest.mark.parametrize("param", ["fp32", "bf16", "fp16"])
def test_zero_lr_leaves_parameters_unchanged(param: str, device: torch.device) -> None:
    update = random_tensors(CHUNK + 3, device, param)
    before = update.clone()
    launch([update], [SCALARS._replace(step_size=0.0, decay=0.0)])
    assert torch.equal(update.param, before.param)


def test_a_zero_weight_without_gradients_stays_zero_with_the_smallest_eps(device: torch.device) -> None:
    update = UpdateTensors(*(torch.zeros(9, device=device) for _ in range(4)))
    launch([update], [SCALARS._replace(eps=effective_eps(1e-300, "normalized", "adax", 1e-4, 1))])
    assert torch.equal(update.param, torch.zeros(9, device=device))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("exponent", [31, 32, 33], ids=["2^31", "2^32", "2^33"])
def test_elements_past_a_power_of_two_are_addressed(exponent: int, dtype: str, device: torch.device) -> None:
    chunk = 2**exponent // CHUNK + 3
    update = random_tensors(1001, device, dtype, dtype)
    before = update.clone()
    start = chunk * CHUNK  # of the only launched chunk; the kernel does not access lower addresses
    addresses = [tensor.data_ptr() - start * tensor.element_size() for tensor in update]
    step_module.adax_step(
        torch.tensor([[0] * 9, [*addresses, 0, 0, 0, start + 1001, 0]], device=device),
        torch.tensor([(1 << 32) + chunk], device=device),
        torch.tensor([(*SCALARS, 0.0, 0.0, 0.0)], device=device),
        StepVariant(DTYPES[dtype], DTYPES[dtype]),
    )
    assert_as_accurate_as_torch(update, before)


@gpu
def test_each_element_of_a_tensor_past_2_31_is_updated_once(device: torch.device) -> None:
    numel = 2**31 + 1001
    if torch.cuda.mem_get_info(device)[0] < 30e9:
        pytest.skip("needs 30 GB of device memory")
    param, grad = (torch.full((numel,), value, dtype=torch.bfloat16, device=device) for value in (1.0, 0.5))
    update = UpdateTensors(param, grad, *(torch.zeros(numel, device=device) for _ in range(2)))
    expected = UpdateTensors(*(tensor[:1].clone() for tensor in update))
    launch([update])
    launch([expected])
    assert all(bool((found == value).all()) for found, value in zip(update, expected, strict=True))


def test_optimizer_launches_once_per_set_of_dtypes(device: torch.device, launches: list[StepVariant]) -> None:
    names = ["fp32", "bf16", "fp16"] * 50
    params = [nn.Parameter(random_tensors(i % 7 + 1, device, name).param) for i, name in enumerate(names)]
    optimizer = AdaX([{"params": params[:70]}, {"params": params[70:], "lr": 1e-2}])
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert sorted(str(variant.param_dtype) for variant in launches) == sorted(str(DTYPES[n]) for n in names[:3])


@pytest.mark.parametrize("unaligned", [None, *UpdateTensors._fields], ids=lambda name: name or "none")
def test_an_unaligned_address_selects_the_unaligned_variant(
    unaligned: str | None, device: torch.device, launches: list[StepVariant]
) -> None:
    update = random_tensors(10, device)
    if unaligned:
        update = update._replace(**{unaligned: getattr(update, unaligned)[1:]})
    ((kernel_launch, _),) = LaunchCache().launches(
        [TensorStep(*(tensor[:9] for tensor in update), 0)], [SCALARS], telemetry=False
    )
    row = bytearray(scalar_row(SCALARS))
    kernel_launch.run(torch.frombuffer(row, dtype=torch.float32).view(1, -1).to(device), None)
    assert [variant.aligned for variant in launches] == [unaligned is None]


@gpu
def test_step_does_not_make_the_host_wait(device: torch.device) -> None:
    params = [nn.Parameter(random_tensors(numel, device, "bf16").param) for numel in (5, 1000, 70_000)]
    optimizer = AdaX(params)
    for mode in ("default", "error"):  # the first step compiles
        for param in params:
            param.grad = torch.ones_like(param)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert optimizer.state[params[0]]["step"] == 2


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_tensors_on_a_non_current_device_are_updated() -> None:
    update = random_tensors(CHUNK + 1, torch.device("cuda", 1))
    before = update.clone()
    with torch.cuda.device(0):
        launch([update])
    torch.cuda.synchronize(1)
    assert_as_accurate_as_torch(update, before)
