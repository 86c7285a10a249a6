"""Content and uploads of launch tables. Oracle: plain loops."""

import pytest
import torch
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


@pytest.mark.parametrize(
    ("rows", "numels", "builds"),
    [([(1, 2, 9), (3, 4, 5)], [9, 5], 0), ([(1, 8, 9), (3, 4, 5)], [9, 5], 1), ([(1, 2, 9), (3, 4, 8)], [9, 8], 2)],
    ids=["nothing-changed", "address-changed", "numel-changed"],
)
def test_refresh_builds_only_what_changed(
    rows: list[tuple[int, ...]], numels: list[int], builds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = AddressTable(torch.device("cpu"), chunk_size=8)
    table.refresh([(1, 2, 9), (3, 4, 5)], [9, 5])
    before = table.tensors.data_ptr(), table.chunks
    built = []
    original = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *given, **options: built.append(given) or original(*given, **options))
    monkeypatch.setattr(
        "adax_triton.step.device_tables.chunk_table", lambda *given: built.append(given) or chunk_table(*given)
    )
    table.refresh(rows, numels)
    assert len(built) == builds
    assert table.tensors.data_ptr() == before[0]
    assert (table.chunks is before[1]) == (numels == [9, 5])


def test_refreshed_tables_hold_rows_and_chunks() -> None:
    table = AddressTable(torch.device("cpu"), chunk_size=8)
    table.refresh([(1, 2, 9)], [9])
    table.refresh([(3, 4, 17), (2**62, 6, 1)], [17, 1])
    assert (table.tensors.tolist(), table.chunks.tolist()) == ([[3, 4, 17], [2**62, 6, 1]], [0, 1, 2, 2**32])


def test_a_table_keeps_its_memory_while_its_shape_is_the_same() -> None:
    table = DeviceTable(torch.device("cpu"))
    first = table.set([1, 2], torch.tensor)
    address = first.data_ptr()
    assert table.set([3, 4], torch.tensor).data_ptr() == address
    assert first.tolist() == [3, 4]
    assert table.set([5], torch.tensor).tolist() == [5]


def test_an_invalidated_table_is_uploaded_again() -> None:
    table = DeviceTable(torch.device("cpu"))
    table.set([1, 2], torch.tensor)[0] = 7
    assert table.set([1, 2], torch.tensor).tolist() == [7, 2]
    table.invalidate()
    assert table.set([1, 2], torch.tensor).tolist() == [1, 2]


def test_pinned_memory_is_reused_only_after_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Copied:
        done = True

        def query(self) -> bool:
            return self.done

    allocations = []

    def unpinned(tensor: Tensor, shape: tuple[int, ...], *, pin_memory: bool) -> Tensor:
        allocations.append(pin_memory)
        return torch.empty(shape, dtype=tensor.dtype)

    monkeypatch.setattr(torch.cuda, "Event", Copied)
    monkeypatch.setattr(Tensor, "new_empty", unpinned)
    table = DeviceTable(torch.device("cpu"))
    pending = []
    for _ in range(40):
        block, copied = table._free_block(torch.zeros(3))
        copied.done = False
        pending.append((block, copied))
    assert len({block.data_ptr() for block, _ in pending}) == 40
    assert allocations == [True] * 6  # of 2, 2, 4, 8, 16 and 32 blocks
    for block, copied in pending:
        copied.done = True
        for _ in range(64):  # blocks are reused in least recently used order
            again, event = table._free_block(torch.zeros(3))
            if again is block:
                break
            event.done = True
        assert again is block
    assert len(allocations) == 6


def test_row_ranges() -> None:
    assert row_ranges([]).tolist() == []
    assert row_ranges([2, 0, 5]).tolist() == [[0, 2], [2, 0], [2, 5]]
