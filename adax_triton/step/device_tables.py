"""Host-written tables that kernels read, such as tensor addresses."""

from __future__ import annotations

import ctypes
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from adax_triton.kernels.tables import CHUNK_BITS, TENSOR_COLUMNS

T = TypeVar("T")

# Gradient release launches once per parameter, so it needs as many tables.
_MAX_CACHED = 8192
CAPTURE_NEEDS_WARM_UP = (
    "step(): a CUDA graph is being captured without a step of the same parameters before it; call step() once before "
    "each capture"
)


class DeviceTable:
    """A device tensor of packed rows that `set` uploads only if its content changed.

    The host does not wait for an upload. Memory is allocated only if the shape changes.

    Before a CUDA graph capture, call `set` once with content of the same shape. This allocates pinned memory. The graph
    records the upload from it, and every replay uploads from it again. Keep the table alive after the capture and never
    set it again.

    Args:
        device: where kernels read the table.
        dtype: dtype of the table.
        columns: elements per row.

    Attributes:
        tensor: the content on the device, (rows, columns); a new tensor only if the shape changes.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, columns: int) -> None:
        self._device = device
        self._content: Any = None
        self._blocks: deque[tuple[Tensor, torch.cuda.Event]] = deque()  # least recently used first
        self._capture_staging: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        self.tensor = torch.empty(0, columns, dtype=dtype, device=device)

    def set(self, content: Any, pack: Callable[[], bytes]) -> Tensor:
        """Upload `pack()` if the content changed, and return the device tensor.

        Args:
            content: compared with the previous content. The table keeps it, so do not modify it later.
            pack: returns the bytes of all rows.
        """
        capturing = is_capturing(self._device)
        if capturing or content != self._content:
            self._upload(pack(), capturing)
            self._content = content
        return self.tensor

    def invalidate(self) -> None:
        """Force the next `set` to upload, after a write on the device."""
        self._content = None

    def _upload(self, packed: bytes, capturing: bool) -> None:
        if self.tensor.nbytes != len(packed):
            columns = self.tensor.shape[1]
            shape = (len(packed) // (columns * self.tensor.itemsize), columns)
            self.tensor = self.tensor.new_empty(shape)
            self._blocks.clear()
            self._capture_staging = None
        if self._device.type == "cpu":
            _write(packed, self.tensor)
            return
        if capturing:
            if self._capture_staging is None:
                raise RuntimeError(CAPTURE_NEEDS_WARM_UP)
            self.tensor.copy_(_write(packed, self._capture_staging), non_blocking=True)
            return
        block, copied = self._free_block()
        self.tensor.copy_(_write(packed, block), non_blocking=True)
        if self._stream is None:  # a table is used on one stream only, see `PerStreamCache`
            self._stream = torch.cuda.current_stream(self._device)
        copied.record(self._stream)
        if self._capture_staging is None:
            self._capture_staging = torch.empty_like(self.tensor, device="cpu", pin_memory=True)

    def _free_block(self) -> tuple[Tensor, torch.cuda.Event]:
        # Do not overwrite pinned memory before the copy from it has finished. Pinned allocation is slow, so double the
        # number of blocks each time.
        if not self._blocks or not self._blocks[0][1].query():
            shape = (max(2, len(self._blocks)), *self.tensor.shape)
            blocks = torch.empty(shape, dtype=self.tensor.dtype, device="cpu", pin_memory=True).unbind()
            self._blocks.extendleft((block, torch.cuda.Event()) for block in blocks)
        self._blocks.rotate(-1)
        return self._blocks[-1]


def _write(packed: bytes, tensor: Tensor) -> Tensor:
    """Write bytes to a contiguous CPU tensor of the same size, and return it."""
    assert tensor.nbytes == len(packed)
    ctypes.memmove(tensor.data_ptr(), packed, len(packed))  # a tenth of the time of torch.frombuffer and copy_
    return tensor


class PerStreamCache(Generic[T]):
    """Cache of objects that own device memory, one per key and stream.

    The CUDA allocator reuses freed memory safely only on the stream that allocated it, so each stream has its own
    entry. During a CUDA graph capture, `get` removes the key's newest entry from the cache, because the graph reads the
    entry at every replay. The next step on that entry's stream makes a new one.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, dict[int, T]] = {}
        self._captured: list[T] = []

    def get(self, key: Hashable, device: torch.device, make: Callable[[], T]) -> T:
        """Return the key's entry for the current stream, made if missing.

        Args:
            key: must include the device, because stream handles of two devices can be equal.
            device: device of the memory.
            make: makes an entry.
        """
        if is_capturing(device):
            by_stream = self._entries.get(key)
            self._captured.append(by_stream.popitem()[1] if by_stream else make())
            return self._captured[-1]
        if key not in self._entries and len(self._entries) >= _MAX_CACHED:
            # Keys contain addresses. Entries of tensors that have moved are never used again.
            self._entries.clear()
        stream = current_stream(device)
        by_stream = self._entries.setdefault(key, {})
        entry = by_stream.pop(stream) if stream in by_stream else make()
        by_stream[stream] = entry  # now the most recently used
        return entry

    def latest(self, key: Hashable) -> T | None:
        """Return the key's most recently used entry, or None."""
        return next(reversed(self._entries.get(key, {}).values()), None)


def current_stream(device: torch.device) -> int:
    """Return the handle of a device's current stream; 0 on a CPU."""
    # torch.cuda.current_stream makes an object, which takes 5 us.
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """Return whether a device's current stream is capturing a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device. The host does not wait."""
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def chunk_table(numels: Sequence[int], chunk_size: int) -> Tensor:
    """Return `tensor << 32 | chunk` per chunk, (chunks,) int64 CPU.

    Args:
        numels: element count of each tensor.
        chunk_size: elements per chunk. The last chunk of a tensor may have fewer.
    """
    chunks = [
        torch.arange(-(-numel // chunk_size), dtype=torch.int64, device="cpu") + (index << CHUNK_BITS)
        for index, numel in enumerate(numels)
    ]
    return torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.int64, device="cpu")


def row_ranges(lengths: Sequence[int]) -> Tensor:
    """Return (first row, length) of consecutive ranges, (n, 2) int64 CPU."""
    counts = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    return torch.stack([counts.cumsum(0) - counts, counts], dim=1)


class AddressTable:
    """A launch's address table and chunk table on a device.

    Args:
        device: where the kernel reads them.
        chunk_size: elements per chunk, see `chunk_table`.

    Attributes:
        numels: element count of each tensor.
        chunks: (chunks,) int64 on the device, see `chunk_table`.
    """

    def __init__(self, device: torch.device, chunk_size: int) -> None:
        self._device = device
        self._chunk_size = chunk_size
        self._tensors = DeviceTable(device, torch.int64, len(TENSOR_COLUMNS))
        self._rows = array("q")
        self.numels: Sequence[int] = ()
        self.chunks = torch.empty(0, dtype=torch.int64, device=device)

    @property
    def tensors(self) -> Tensor:
        """(n, columns) int64 on the device, one row per tensor; see `kernels.tables.TENSOR_COLUMNS`."""
        return self._tensors.tensor

    def refresh(self, rows: Sequence[tuple[int, ...]], numels: Sequence[int]) -> None:
        """Upload the tables if they changed.

        Args:
            rows: one tuple of integers per tensor.
            numels: element count of each tensor. It must not change during a capture.
        """
        if numels != self.numels:
            # A new tensor, because a captured graph may still read the old one.
            self.chunks = upload(chunk_table(numels, self._chunk_size), self._device)
            self.numels = numels
        self._rows = array("q", chain.from_iterable(rows))
        self._upload()

    def refresh_column(self, column: int, values: array[int]) -> None:
        """Set one column to `values` (int64), and upload the table if it changed."""
        self._rows[column :: len(TENSOR_COLUMNS)] = values
        self._upload()

    def _upload(self) -> None:
        packed = self._rows.tobytes()
        self._tensors.set(packed, lambda: packed)

    def chunk_counts(self) -> list[int]:
        """Return the number of chunks of each tensor."""
        return [-(-numel // self._chunk_size) for numel in self.numels]
