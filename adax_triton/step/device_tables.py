"""Small tables that the host fills and kernels read, such as those by which one launch reaches any tensors."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from adax_triton.kernels.tables import CHUNK_BITS

T = TypeVar("T")

# Releasing gradients steps each parameter by itself, and so has tables for each.
_MAX_CACHED = 8192
CAPTURE_NEEDS_WARM_UP = (
    "step(): a CUDA graph is being captured without a step of the same parameters before it; take one step outside of "
    "the capture, and one between two captures"
)


class DeviceTable:
    """A tensor that is uploaded when its content changes, without the host waiting and without a new allocation.

    A capture needs a table that was set before, to content of the same shape: its upload becomes part of the graph and
    reads a block of pinned memory that was allocated then. After a capture the graph writes this table at every replay.
    Keep it alive and never set it again.

    Args:
        device: where kernels read it.

    Attributes:
        tensor: the content on the device; another tensor only for another shape.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._content: Any = None
        self._blocks: deque[tuple[Tensor, torch.cuda.Event]] = deque()  # the first was used longest ago
        self._spare: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        self.tensor = torch.empty(0, device=device)

    def set(self, content: Any, build: Callable[[Any], Tensor]) -> Tensor:
        """Make the table hold `build(content)`, a CPU tensor, and return it on the device.

        Args:
            content: compared with the last one; the table keeps it, so it must not be changed afterwards.
            build: called if the content is another one.
        """
        capturing = is_capturing(self._device)
        if capturing or content != self._content:
            self._upload(build(content), capturing)
            self._content = content
        return self.tensor

    def forget(self) -> None:
        """Have the next `set` upload; for who writes into `tensor` on the device."""
        self._content = None

    def _upload(self, host: Tensor, capturing: bool) -> None:
        if not _alike(self.tensor, host):
            self.tensor = torch.empty_like(host, device=self._device)
            self._blocks.clear()
        if self._device.type == "cpu":
            self.tensor.copy_(host)
            return
        if capturing:
            assert self._spare is not None
            self.tensor.copy_(self._spare.copy_(host), non_blocking=True)
            return
        block, copied = self._free_block(host)
        self.tensor.copy_(block.copy_(host), non_blocking=True)
        if self._stream is None:  # the only one, see `PerStreamCache`
            self._stream = torch.cuda.current_stream(self._device)
        copied.record(self._stream)
        if self._spare is None or not _alike(self._spare, host):
            self._spare = torch.empty_like(host, pin_memory=True)

    def _free_block(self, host: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        # Pinned memory must not be written again before the copy from it is done. To get more takes long: twice as much
        # as there is each time.
        if not self._blocks or not self._blocks[0][1].query():
            shape = (max(2, len(self._blocks)), *host.shape)
            blocks = host.new_empty(shape, pin_memory=True).unbind()
            self._blocks.extendleft((block, torch.cuda.Event()) for block in blocks)
        self._blocks.rotate(-1)
        return self._blocks[-1]


def _alike(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype


class PerStreamCache(Generic[T]):
    """One owner of device memory per key and stream.

    The allocator orders the reuse of memory by the stream that it was allocated on, so no other stream may read it. A
    captured CUDA graph takes an owner for good, the one used last on any stream; the next step on that stream makes
    another.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, dict[int, T]] = {}
        self._captured: list[T] = []

    def get(self, key: Hashable, device: torch.device, make: Callable[[], T]) -> T:
        """Return the owner of a key for the current stream, made if there is none yet.

        Args:
            key: names the device, too, because handles of streams of two devices may be equal.
            device: of the memory.
            make: makes an owner.
        """
        if is_capturing(device):
            prepared = self._kept.get(key)
            self._captured.append(prepared.popitem()[1] if prepared else make())
            return self._captured[-1]
        if key not in self._kept and len(self._kept) >= _MAX_CACHED:
            # What has moved is never found again.
            self._kept.clear()
        stream = current_stream(device)
        of_streams = self._kept.setdefault(key, {})
        owner = of_streams.pop(stream) if stream in of_streams else make()
        of_streams[stream] = owner  # now the last one
        return owner

    def prepared(self, key: Hashable) -> T | None:
        """Return the owner that a capture would take, or None if it would make one."""
        return next(reversed(self._kept.get(key, {}).values()), None)


def current_stream(device: torch.device) -> int:
    """Return the handle of a device's current stream; 0 on a CPU."""
    # torch.cuda.current_stream takes 5 us: it makes an object.
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """Whether work on a device goes into a CUDA graph instead of being done."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on_device(host: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on a device, without the host waiting."""
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def chunk_table(numels: Sequence[int], chunk_size: int) -> Tensor:
    """Return `tensor << 32 | chunk` for each run of `chunk_size` elements of each tensor, as 1-D int64 on the CPU."""
    chunks = [
        torch.arange(-(-numel // chunk_size), dtype=torch.int64, device="cpu") + (index << CHUNK_BITS)
        for index, numel in enumerate(numels)
    ]
    return torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.int64, device="cpu")


def run_table(lengths: Sequence[int]) -> Tensor:
    """Return (first row, number of rows) of runs that follow each other, as (n, 2) int64 on the CPU."""
    counts = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    return torch.stack([counts.cumsum(0) - counts, counts], dim=1)


class AddressTable:
    """The device copies of a launch's tables, uploaded only when they change.

    Args:
        device: where the kernel reads them.
        chunk_size: elements per program, see `chunk_table`.

    Attributes:
        numels: of the tensors.
        tensors: (n, columns) int64 on the device: what the rows say.
        chunks: (programs,) int64 on the device, see `chunk_table`.
    """

    def __init__(self, device: torch.device, chunk_size: int) -> None:
        self._device = device
        self._chunk_size = chunk_size
        self._tensors = DeviceTable(device)
        self._rows = torch.empty(0, dtype=torch.int64, device="cpu")
        self._column: array[int] | None = None
        self.numels: Sequence[int] = ()
        self.tensors = torch.empty(0, dtype=torch.int64, device=device)
        self.chunks = torch.empty(0, dtype=torch.int64, device=device)

    def refresh(self, rows: Sequence[tuple[int, ...]], numels: Sequence[int]) -> None:
        """Make the tables say `rows`, one tuple of integers per tensor, for tensors of `numels` elements.

        During a capture `numels` must be the last ones: other tables could not be uploaded.
        """
        if numels != self.numels:
            # A captured graph may still read the old ones.
            chunks = chunk_table(numels, self._chunk_size)
            self.chunks = (
                chunks if self._device.type == "cpu" else chunks.pin_memory().to(self._device, non_blocking=True)
            )
            self.numels = numels
        self.tensors = self._tensors.set(rows, self._filled)
        self._column = None

    def _filled(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        self._rows = torch.tensor(rows, dtype=torch.int64, device="cpu")
        return self._rows.clone()

    def refresh_column(self, column: int, values: array[int]) -> None:
        """Make one column say `values`, an array of int64 that stays as it is, and leave the rest of the rows."""
        if values != self._column:
            self._rows[:, column] = torch.frombuffer(values, dtype=torch.int64)
            self._column = values
        self.tensors = self._tensors.set(values, lambda _: self._rows)

    def chunk_counts(self) -> list[int]:
        """Return how many chunks each tensor has."""
        return [-(-numel // self._chunk_size) for numel in self.numels]
