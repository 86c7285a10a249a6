"""Read text files as bytes; batches depend only on (seed, step, rank)."""

import functools
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
HELD_OUT_EVERY = 20  # hold out one block in twenty (5 %) for validation
HELD_OUT_BLOCK = 65536  # bytes; large blocks limit leakage from the neighbouring training text


@functools.cache
def read_text(path: Path | None, max_bytes: int) -> bytes:
    """Read up to `max_bytes` bytes of text, files in name order.

    Args:
        path: a file or a folder; hidden files, installed packages and binary files of a folder are skipped. None: the
            source (*.py) of Python's standard library.
        max_bytes: maximum number of bytes.

    Raises:
        ValueError: `path` does not exist or holds no text.
    """
    root = Path(sysconfig.get_path("stdlib")) if path is None else path
    if not root.exists():
        raise ValueError(f"--data {str(root)!r}: no such file or folder")
    files = [root] if root.is_file() else _text_files(root, suffix=".py" if path is None else "")
    parts, size = [], 0
    for file in files:
        content = file.read_bytes()
        if b"\0" in content:  # binary
            continue
        parts.append(content)
        size += len(content)
        if size >= max_bytes:
            break
    if not size:
        raise ValueError(f"--data {str(root)!r} contains no text; pass a text file or a folder of text files")
    return b"".join(parts)[:max_bytes]


def _text_files(root: Path, suffix: str) -> Iterator[Path]:
    for file in sorted(root.rglob(f"*{suffix}")):
        folders = file.relative_to(root).parts
        if SKIPPED_FOLDERS.isdisjoint(folders) and not any(name.startswith(".") for name in folders) and file.is_file():
            yield file


class TextData:
    """Windows of the training and held-out parts of a text.

    Batches depend only on (seed, step, rank), so a resumed run sees the same data as an uninterrupted run.

    Args:
        text: all bytes.
        context: window length in bytes.
        seed: random seed of the batch order.

    Raises:
        ValueError: the text is too short for one window in each part.
    """

    def __init__(self, text: bytes, context: int, seed: int) -> None:
        block = max(1, min(HELD_OUT_BLOCK, len(text) // HELD_OUT_EVERY))
        blocks = [text[start : start + block] for start in range(0, len(text), block)]
        held_out = b"".join(blocks[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
        if len(held_out) <= context:
            raise ValueError(
                f"--data has {len(text)} bytes, {len(held_out)} of them held out; the held-out part "
                f"must be longer than --context {context}; use more data or a smaller --context"
            )
        del blocks[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        self.train = torch.frombuffer(bytearray(b"".join(blocks)), dtype=torch.uint8)
        self.validation = torch.frombuffer(bytearray(held_out), dtype=torch.uint8)
        self.context = context
        self.seed = seed
        self.digest = hashlib.sha256(text).hexdigest()

    def batch(self, step: int, rank: int, ranks: int, size: int) -> tuple[Tensor, Tensor]:
        """Return (inputs, targets) of a rank at a step, (size, context) int64."""
        # The CPU generator uses 32 bits of its seed.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**32)
        starts = torch.randint(len(self.train) - self.context, (ranks * size,), generator=generator)
        return self._windows(self.train, starts[rank * size : (rank + 1) * size])

    def held_out(self, rank: int, ranks: int, size: int, batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of this rank, spaced evenly over the held-out part."""
        count = ranks * size * batches
        last = len(self.validation) - self.context - 1
        starts = torch.arange(count) * last // max(1, count - 1)
        for chosen in starts[rank::ranks].split(size):
            yield self._windows(self.validation, chosen)

    def _windows(self, text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        windows = text[starts[:, None] + torch.arange(self.context + 1)].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
