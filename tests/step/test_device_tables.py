"""Content and uploads of launch tables. Oracle: plain loops."""

from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adax_triton.kernels.tables import TENSOR_COLUMNS
from torch import Tensor

from adax_triton.step.device_tables import AddressTable, DeviceTable, chunk_table, row_ranges


@pytest.mark.parametrize("numels", [[], [0], [1], [8], [9], [7, 0, 8, 17, 1], [0, 0, 24]], ids=str)
def test_chunk_table_agrees_with_a_plain_loop(numels: list[int]) -> None:
    expected = []
    for tensor, numel in enumerate(numels):
        for chunk, _ in enumerate(range(0, numel, 8)):
            expected.append(tensor * 2**32 + chunk)
    assert torch.equal(chunk_table(numels, 8), torch.tensor(expected, dtype=torch.int64))


def test_chunk_table_holds_chunks_past_2_31_elements() -> None:
    assert chunk_table([3, 2**31 + 1], 2048)[-1].item() == (1 << 32) + 2**20


def row(*values: int) -> tuple[int, ...]:
    """Return a row of the address table, padded with zeros."""
    return (*values, *[0] * (len(TENSOR_COLUMNS) - len(values)))


@pytest.mark.parametrize(
    ("rows", "numels", "builds"),
    [([row(1, 2), row(3, 4)], [9, 5], 0), ([row(1, 8), row(3, 4)], [9, 5], 1), ([row(1, 2), row(3, 8)], [9, 8], 2)],
    ids=["nothing-changed", "address-changed", "numel-changed"],
)
def test_refresh_builds_only_what_changed(
    rows: list[tuple[int, ...]], numels: list[int], builds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = AddressTable(torch.device("cpu"), chunk_size=8)
    table.refresh([row(1, 2), row(3, 4)], [9, 5])
    before = table.tensors.data_ptr(), table.chunks
    built = []
    upload = DeviceTable._upload
    monkeypatch.setattr(DeviceTable, "_upload", lambda *given: built.append(given) or upload(*given))
    monkeypatch.setattr(
        "adax_triton.step.device_tables.chunk_table", lambda *given: built.append(given) or chunk_table(*given)
    )
    table.refresh(rows, numels)
    assert len(built) == builds
    assert table.tensors.data_ptr() == before[0]
    assert (table.chunks is before[1]) == (numels == [9, 5])


def test_refreshed_tables_hold_rows_and_chunks() -> None:
    table = AddressTable(torch.device("cpu"), chunk_size=8)
    table.refresh([row(1, 2)], [9])
    table.refresh([row(3, 4), row(2**62, 6)], [17, 1])
    rows = [list(row(3, 4)), list(row(2**62, 6))]
    assert (table.tensors.tolist(), table.chunks.tolist()) == (rows, [0, 1, 2, 2**32])
    table.refresh_column(1, array("q", [5, 2**61]))
    assert table.tensors.tolist() == [list(row(3, 5)), list(row(2**62, 2**61))]


def packed(*values: int) -> tuple[bytes, Callable[[], bytes]]:
    """Return content and pack function of a table of one int64 column."""
    content = array("q", values).tobytes()
    return content, lambda: content


def test_a_table_keeps_its_memory_while_its_shape_is_the_same() -> None:
    table = DeviceTable(torch.device("cpu"), torch.int64, 1)
    first = table.set(*packed(1, 2))
    address = first.data_ptr()
    assert table.set(*packed(3, 4)).data_ptr() == address
    assert first.tolist() == [[3], [4]]
    assert table.set(*packed(5)).tolist() == [[5]]
    assert table.set(*packed()).tolist() == []


def test_packed_rows_fill_the_columns() -> None:
    table = DeviceTable(torch.device("cpu"), torch.float32, 3)
    values = array("f", [1.0, -2.0, 0.5, 3.0, 4.0, 5.0]).tobytes()
    assert table.set(0, lambda: values).tolist() == [[1.0, -2.0, 0.5], [3.0, 4.0, 5.0]]


def test_an_invalidated_table_is_uploaded_again() -> None:
    table = DeviceTable(torch.device("cpu"), torch.int64, 1)
    table.set(*packed(1, 2))[0] = 7
    assert table.set(*packed(1, 2)).tolist() == [[7], [2]]
    table.invalidate()
    assert table.set(*packed(1, 2)).tolist() == [[1], [2]]


def test_pinned_memory_is_reused_only_after_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Copied:
        done = True

        def query(self) -> bool:
            return self.done

    allocations = []

    empty = torch.empty

    def unpinned(*shape: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        allocations.append(pin_memory)
        return empty(*shape, **options)

    table = DeviceTable(torch.device("cpu"), torch.int64, 1)
    table.set(*packed(1, 2, 3))
    monkeypatch.setattr(torch.cuda, "Event", Copied)
    monkeypatch.setattr(torch, "empty", unpinned)
    pending = []
    for _ in range(40):
        block, copied = table._free_block()
        copied.done = False
        pending.append((block, copied))
    assert len({block.data_ptr() for block, _ in pending}) == 40
    assert allocations == [True] * 6  # of 2, 2, 4, 8, 16 and 32 blocks
    for block, copied in pending:
        copied.done = True
        for _ in range(64):  # blocks are reused in least recently used order
            again, event = table._free_block()
            if again is block:
                break
            event.done = True
        assert again is block
    assert len(allocations) == 6


def test_row_ranges() -> None:
    assert row_ranges([]).tolist() == []
    assert row_ranges([2, 0, 5]).tolist() == [[0, 2], [2, 0], [2, 5]]
