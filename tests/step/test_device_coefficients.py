"""Scalars computed on the device. Oracles: `step_scalars`, `random_key` and torch's `clip_grad_norm_`."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from adax_triton.update.coefficients import DeviceCoefficients, StepScalars, device_coefficients, step_scalars
from adax_triton.update.rounding import random_key

pytest.importorskip("triton")

from adax_triton.kernels.adax_step import SCALAR_COLUMNS
from adax_triton.kernels.prepare_step import BLOCK_SIZE, COEFFICIENT_COLUMNS, prepare_step

SPACED = [round(10 ** (3 + index / 25)) for index in range(151)]  # to 1e9
NEIGHBOURS = [power + offset for power in (2**24, 2**31, 2**32) for offset in (-1, 0, 1)]
STEPS = [*range(1, 1001), *SPACED, *NEIGHBOURS, 2**32 + 5]

ADAX = [("adax", beta2, "normalized") for beta2 in (0.0, 1e-12, 1e-8, 1e-4, 0.1)]
ADAX += [("adax", beta2, "unnormalized") for beta2 in (1e-12, 1e-8, 1e-4, 0.1)]
BETAS2 = (0.0, 0.9, 0.999, 1 - 1e-12)
ADAM = [("adam", beta2, placement) for beta2 in BETAS2 for placement in ("normalized", "unnormalized")]
ADAFACTOR = [("adafactor", beta2, "normalized") for beta2 in (0.8, 1.0)]

GROUP = {
    "lr": 0.3,
    "betas": (0.9, 1e-4),
    "eps": 1e-12,
    "weight_decay": 0.07,
    "decoupled_weight_decay": True,
    "second_moment": "adax",
    "eps_placement": "normalized",
    "maximize": False,
}
FACTOR, KEY, SKIP = StepScalars._fields.index("grad_factor"), 7, 9
CANARY = 1234.5


class Prepared(NamedTuple):
    """The output of one launch, on the CPU."""

    counts: list[int]
    scalars: Tensor  # (n, 10)
    report: list[float]

    def column(self, name: str) -> Tensor:
        return self.scalars[:, StepScalars._fields.index(name)]


def prepare(
    device: torch.device,
    steps: Sequence[int],
    groups: Sequence[dict[str, Any]] = (GROUP,),
    *,
    rows_of_groups: Sequence[int] | None = None,
    lr_addresses: Sequence[int] | None = None,
    grad_scale: float | None = None,
    found_inf: float | None = None,
    squares: Sequence[float] | None = None,
    max_grad_norm: float = math.inf,
    flag_dtype: torch.dtype = torch.float32,
) -> Prepared:
    """Run `prepare_step` with the counts `steps - 1`."""
    counts = torch.tensor([*steps, 8], dtype=torch.int64, device=device) - 1
    addresses = [counts.data_ptr() + 8 * index for index in range(len(steps))]
    table = [addresses, rows_of_groups or [0] * len(steps), lr_addresses or [0] * len(steps)]
    rows = torch.tensor(table, dtype=torch.int64, device=device).T.contiguous()
    schedules = [device_coefficients(**{"seed": 0, **group}) for group in groups]
    scalars = torch.full((len(steps) + 1, SCALAR_COLUMNS.value), CANARY, device=device)
    report = torch.full((3,), CANARY, device=device)
    flags = [
        None if flag is None else torch.tensor([flag], dtype=flag_dtype, device=device)
        for flag in (grad_scale, found_inf)
    ]
    prepare_step(
        rows,
        torch.tensor(schedules, dtype=torch.float64, device=device),
        scalars[:-1],
        report,
        *flags,
        None if squares is None else torch.tensor(squares, dtype=torch.float64, device=device),
        max_grad_norm,
    )
    assert counts[-1] == 7 and torch.all(scalars[-1] == CANARY), "prepare_step wrote past the last row"
    return Prepared(counts[:-1].tolist(), scalars[:-1].cpu(), report.tolist())


def ulp_distance(found: Tensor, expected: Tensor) -> Tensor:
    """Return the distance in float32 ulps; 2^32 if the signs differ."""
    words, others = (values.contiguous().view(torch.int32).to(torch.int64) for values in (found, expected))
    return torch.where((words < 0) == (others < 0), words - others, 2**32).abs()


def test_table_has_a_column_for_each_field() -> None:
    assert len(DeviceCoefficients._fields) == COEFFICIENT_COLUMNS.value
    assert len(StepScalars._fields) + 3 == SCALAR_COLUMNS.value


@pytest.mark.parametrize(("rule", "beta2", "placement"), [*ADAX, *ADAM, *ADAFACTOR])
def test_scalars_equal_those_of_the_host(device: torch.device, rule: str, beta2: float, placement: str) -> None:
    group = {**GROUP, "betas": (0.9, beta2), "second_moment": rule, "eps_placement": placement}
    prepared = prepare(device, STEPS, [group])
    expected = torch.tensor([step_scalars(step=step, **group) for step in STEPS], dtype=torch.float64)
    distance = ulp_distance(prepared.scalars[:, :7], expected.to(torch.float32))
    assert distance.max() <= 1, f"step {STEPS[int(distance.max(dim=1).values.argmax())]}"
    assert prepared.column("exp_avg_sq_weight")[0] == 1.0
    assert prepared.counts == STEPS
    assert torch.all(prepared.scalars[:, SKIP] == 0.0)


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9, 1 - 1e-12])
def test_bias_correction_of_the_first_moment_equals_that_of_the_host(device: torch.device, beta1: float) -> None:
    group = {**GROUP, "betas": (beta1, 0.999), "second_moment": "adam"}
    expected = torch.tensor([step_scalars(step=step, **group).step_size for step in STEPS], dtype=torch.float64)
    assert ulp_distance(prepare(device, STEPS, [group]).column("step_size"), expected.to(torch.float32)).max() <= 1


def test_eps_stays_above_the_resolution_of_the_root_unless_it_was_zero(device: torch.device) -> None:
    groups = [{**GROUP, "eps": eps, "eps_placement": "unnormalized"} for eps in (0.0, 1e-50, 1e-8)]
    prepared = prepare(device, [10**9] * 3, groups, rows_of_groups=[0, 1, 2])
    assert prepared.column("eps").tolist() == [0.0, 2.0**-63, 2.0**-63]


def test_each_tensor_has_the_scalars_of_its_group(device: torch.device) -> None:
    groups = [
        GROUP,
        {**GROUP, "lr": 0.0, "decoupled_weight_decay": False, "maximize": True},
        {**GROUP, "betas": (0.5, 0.999), "second_moment": "adam"},
        {**GROUP, "betas": (0.5, 0.8), "second_moment": "adafactor", "weight_decay": 0.0},
    ]
    steps = [1, 7, 7, 2, 900, 1, 5, 3]
    rows = [2, 0, 3, 3, 1, 1, 0, 2]
    prepared = prepare(device, steps, groups, rows_of_groups=rows)
    expected = [step_scalars(step=step, **groups[row]) for step, row in zip(steps, rows, strict=True)]
    distance = ulp_distance(prepared.scalars[:, :7], torch.tensor(expected, dtype=torch.float64).to(torch.float32))
    assert distance.max() <= 1


def test_a_device_learning_rate_is_read(device: torch.device) -> None:
    lrs = torch.tensor([0.1, 1e-30, 0.0], device=device)
    addresses = [lrs.data_ptr() + 4 * index for index in range(3)]
    groups = [{**GROUP, "betas": (0.9, 0.999), "second_moment": "adam"}, GROUP]
    rows, steps = [0, 1, 1, 0, 1], [3, 3, 3, 3, 3]
    prepared = prepare(device, steps, groups, rows_of_groups=rows, lr_addresses=[*addresses, 0, 0])
    known = [*lrs.tolist(), GROUP["lr"], GROUP["lr"]]
    expected = [step_scalars(step=3, **{**groups[row], "lr": lr}) for row, lr in zip(rows, known, strict=True)]
    distance = ulp_distance(prepared.scalars[:, :7], torch.tensor(expected, dtype=torch.float64).to(torch.float32))
    assert distance.max() <= 1


@pytest.mark.parametrize("seed", [0, 1, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_random_key_equals_that_of_the_host(device: torch.device, seed: int) -> None:
    steps = [*range(1, 300), *SPACED, *NEIGHBOURS, 2**32 + 5, 2**40 + 3]
    words = prepare(device, steps, [{**GROUP, "seed": seed}]).scalars[:, KEY : KEY + 2].contiguous().view(torch.int32)
    assert [(first & 0xFFFFFFFF, second & 0xFFFFFFFF) for first, second in words.tolist()] == [
        random_key(seed, step) for step in steps
    ]


@pytest.mark.parametrize("n", [0, 1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE])
def test_any_number_of_tensors(device: torch.device, n: int) -> None:
    steps = list(range(5, 5 + n))
    prepared = prepare(device, steps, grad_scale=2.0, squares=[36.0], max_grad_norm=1.5)
    assert prepared.counts == steps
    assert prepared.report == pytest.approx([3.0, 0.5, 0.0], rel=1e-6)
    assert prepared.column("grad_factor").tolist() == pytest.approx([0.25] * n, rel=1e-6)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("grad_scale", [1.0, 1024.0, 3e-5])
@pytest.mark.parametrize("max_grad_norm", [1e-4, 1.0, 20.0, 1e6, math.inf])
def test_clipping_equals_that_of_torch(
    device: torch.device, max_grad_norm: float, grad_scale: float, maximize: bool
) -> None:
    param = torch.nn.Parameter(torch.zeros(100, dtype=torch.float64))
    param.grad = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = param.grad.clone()
    sum_of_squares = float((before * grad_scale).square().sum())
    norm = float(torch.nn.utils.clip_grad_norm_(param, max_grad_norm))
    clip = float(param.grad[0] / before[0])
    group = {**GROUP, "maximize": maximize}
    prepared = prepare(
        device, [1, 2], [group], grad_scale=grad_scale, squares=[sum_of_squares], max_grad_norm=max_grad_norm
    )
    assert prepared.report == pytest.approx([norm, clip, 0.0], rel=1.2e-7)
    factor = (-1.0 if maximize else 1.0) * clip / grad_scale
    assert prepared.scalars[:, FACTOR].tolist() == pytest.approx([factor] * 2, rel=1.2e-7)


@pytest.mark.parametrize("count", [0, 1, 2, 1023, 1024, 1025, 5000])
def test_the_norm_is_that_of_all_partial_sums(device: torch.device, count: int) -> None:
    squares = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count)).tolist()
    assert prepare(device, [1], squares=squares).report[0] == pytest.approx(math.sqrt(math.fsum(squares)), rel=1.2e-7)
    if count:
        squares[count // 2] = math.inf
        assert prepare(device, [1], squares=squares).report[2] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_squares_nothing_is_measured_or_clipped(device: torch.device, dtype: torch.dtype) -> None:
    prepared = prepare(device, [4], grad_scale=8.0, found_inf=0.0, max_grad_norm=1e-3, flag_dtype=dtype)
    assert math.isnan(prepared.report[0]) and prepared.report[1:] == [1.0, 0.0]
    assert prepared.scalars[0, FACTOR] == 0.125
    assert prepared.counts == [4]


@pytest.mark.parametrize(
    "inputs",
    [
        {"squares": [math.nan], "max_grad_norm": 1.0},
        {"squares": [math.inf], "max_grad_norm": 1.0},
        {"grad_scale": 4.0, "squares": [math.inf]},
        {"found_inf": 1.0},
        {"found_inf": 1.0, "squares": [4.0], "max_grad_norm": 1.0},
        {"found_inf": 2.0**-149},
        {"found_inf": -1.0},
        {"found_inf": math.inf},
        {"found_inf": math.nan},
    ],
)
def test_skipped_step_leaves_the_counts(device: torch.device, inputs: dict[str, Any]) -> None:
    steps = [1, 17, 2**31, 2**40]
    prepared = prepare(device, steps, **inputs)
    assert prepared.counts == [step - 1 for step in steps]
    assert prepared.report[2] == 1.0
    assert prepared.scalars[:, SKIP].tolist() == [1.0] * 4


@pytest.mark.parametrize("sum_of_squares", [0.0, 1e-300, 1e70])
def test_finite_sums_are_clipped_and_never_skipped(device: torch.device, sum_of_squares: float) -> None:
    prepared = prepare(device, [1], squares=[sum_of_squares], max_grad_norm=1.0)
    norm = math.sqrt(sum_of_squares)
    assert prepared.report == pytest.approx([norm, min(1.0, 1.0 / (norm + 1e-6)), 0.0], rel=1.2e-7)
    assert prepared.counts == [1]


def test_counts_advance_from_launch_to_launch(device: torch.device) -> None:
    count = torch.zeros((), dtype=torch.int64, device=device)
    rows = torch.tensor([[count.data_ptr(), 0, 0]], device=device)
    groups = torch.tensor([device_coefficients(**GROUP, seed=0)], dtype=torch.float64, device=device)
    scalars, report = torch.empty(1, SCALAR_COLUMNS.value, device=device), torch.empty(3, device=device)
    weights = []
    for found_inf in (0.0, 1.0, 0.0):
        prepare_step(rows, groups, scalars, report, found_inf=torch.tensor([found_inf], device=device))
        weights.append(float(scalars[0, 2]))
    assert count == 2
    assert weights[0] == 1.0 and weights[1] == weights[2] == pytest.approx(1e-4 / (1.0001**2 - 1), rel=1e-6)


def test_an_unknown_rule_raises() -> None:
    with pytest.raises(ValueError, match="adagrad"):
        device_coefficients(**{**GROUP, "second_moment": "adagrad"}, seed=0)
