"""The source of Python's standard library as bytes or words."""

from __future__ import annotations

import collections
import functools
import hashlib
import re
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

MAX_BYTES = 8_000_000
HELD_OUT_EVERY = 20  # one block in twenty is held out
BLOCK = 8192  # tokens
CONTEXT = 4  # words before the predicted one
_WORD = re.compile(rb"[A-Za-z_]\w*|\d+|[^\w\s]")


@functools.cache
def source() -> bytes:
    """Return the first `MAX_BYTES` of the library's *.py files, in name order."""
    root = Path(sysconfig.get_path("stdlib"))
    parts, size = [], 0
    for file in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages"} & set(file.relative_to(root).parts):
            parts.append(file.read_bytes())
            size += len(parts[-1])
            if size >= MAX_BYTES:
                break
    return b"".join(parts)[:MAX_BYTES]


def digest() -> str:
    """Return 12 digits of the text's SHA-256.

    The text differs between versions of Python.
    """
    return hashlib.sha256(source()).hexdigest()[:12]


@functools.cache
def split_bytes() -> tuple[Tensor, Tensor]:
    """Return the training and the held-out text, (n,) uint8."""
    return split(torch.frombuffer(bytearray(source()), dtype=torch.uint8))


@functools.cache
def split_words(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return the training and the held-out text, (n,) int32 word numbers.

    The most frequent word has number 0. All words outside the vocabulary have the last number.
    """
    found = _WORD.findall(source())
    common = collections.Counter(found).most_common(vocabulary - 1)
    number = {word: index for index, (word, _) in enumerate(common)}
    return split(torch.tensor([number.get(word, vocabulary - 1) for word in found], dtype=torch.int32))


def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the training and the held-out part of (n,) tokens."""
    blocks = tokens.split(BLOCK)
    held_out = torch.cat(blocks[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    return torch.cat([block for index, block in enumerate(blocks) if (index + 1) % HELD_OUT_EVERY]), held_out
