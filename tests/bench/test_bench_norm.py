"""The benchmark of the gradient norm: rates, table and rejected norms."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adax_triton.bench import norm
from adax_triton.bench.harness import timing
from torch import Tensor

from adax_triton.cli.main import main

CPU = torch.device("cpu")
METHODS = ["adax_triton", "torch get_total_norm", "copy"]


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overwrite 2 MiB before each call."""
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**20)


def test_rows_have_the_rate_of_every_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "norm.json"
    words = ["--device", "cpu", "--sizes", "500", "1001", "--models", "--rounds", "2", "--json", str(file)]
    assert main(["bench", "norm", *words]) == 0
    result = json.loads(file.read_text())
    assert result["benchmark"] == "norm"
    sizes = {"flat 500": 500, "flat 1,001": 1001}
    itemsizes = {"bfloat16": 2, "float32": 4}
    found = [(workload["name"], workload["dtype"]) for workload in result["workloads"]]
    assert found == [(name, dtype) for name in sizes for dtype in itemsizes]
    for workload in result["workloads"]:
        moved = sizes[workload["name"]] * itemsizes[workload["dtype"]]
        assert list(workload["rows"]) == METHODS
        for name, row in workload["rows"].items():
            of_row = -(-moved // 8) * 8 if name == "copy" else moved  # a copy moves 8 bytes per element
            assert row["gb_per_s"] == pytest.approx(of_row / (row["median_ms"] / 1e3) / 1e9)
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    lines = norm.table(result).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[:3] for row in cells] == [[*workload, method] for workload in found for method in METHODS]
    assert [row[-1] for row in cells if row[2] == "copy"] == ["100%"] * len(found)
    assert "\n".join(lines) in capsys.readouterr().out


@pytest.mark.parametrize("dtype", norm.DTYPES.values(), ids=norm.DTYPES)
def test_a_wrong_norm_is_rejected(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = norm.ours

    def off(params: list[Tensor]) -> Callable[[], Tensor]:
        return lambda: 1.0001 * ours(params)()

    monkeypatch.setattr(norm, "ours", off)
    with pytest.raises(ValueError, match=r"the norm is .*, expected"):
        norm.measure([(33, 17), (3,)], dtype, timing.Clock(CPU), CPU, rounds=1)
