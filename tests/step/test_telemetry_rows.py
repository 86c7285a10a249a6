"""Telemetry row sums of `kernels.telemetry`. Oracle: torch in float64."""

from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("triton")

COUNTS = (0, 1, 511, 512, 513, 5000)


def sum_rows(counts: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows, their sums, and torch's sums, for ranges of `counts` rows."""
    from adax_triton.kernels.telemetry import sum_rows

    from adax_triton.step.device_tables import row_ranges

    rows = torch.rand(sum(counts), 5, generator=torch.Generator().manual_seed(len(counts))).to(device)
    around = torch.full((len(counts) + 2, 5), -7.0, device=device)
    sum_rows(rows, row_ranges(counts).to(device), around[1:-1])
    assert bool((around[[0, -1]] == -7.0).all())
    parts = rows.double().split(list(counts))
    return (
        rows,
        around[1:-1],
        torch.stack([part.sum(0) for part in parts]) if parts else torch.zeros(0, 5, dtype=torch.float64),
    )


@pytest.mark.parametrize("count", COUNTS)
def test_one_range_of_any_length(count: int, device: torch.device) -> None:
    _, found, expected = sum_rows([count], device)
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("counts", [COUNTS, (0, 0), (0, 3, 0, 0, 2, 0), (1,) * 70, ()], ids=str)
def test_ranges_are_summed_separately(counts: tuple[int, ...], device: torch.device) -> None:
    _, found, expected = sum_rows(counts, device)
    assert torch.allclose(found.double(), expected.to(device), rtol=1e-6, atol=0.0)


def test_sums_are_deterministic(device: torch.device) -> None:
    assert torch.equal(sum_rows([5000, 3], device)[1], sum_rows([5000, 3], device)[1])


def test_a_nonfinite_value_stays_in_its_range_and_column(device: torch.device) -> None:
    from adax_triton.kernels.telemetry import sum_rows

    rows = torch.ones(600, 5, device=device)
    rows[3, 0], rows[599, 4] = float("nan"), float("inf")
    sums = torch.empty(2, 5, device=device)
    sum_rows(rows, torch.tensor([(0, 520), (520, 80)], device=device), sums)
    assert str(sums.tolist()) == str([[float("nan"), *[520.0] * 4], [*[80.0] * 4, float("inf")]])
