"""Lists of tensor shapes to step."""

from __future__ import annotations

Shapes = list[tuple[int, ...]]


def flat(numel: int) -> Shapes:
    """Return one flat tensor, as ZeRO hands its partition over."""
    return [(numel,)]


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> Shapes:
    """Return the 148 tensors of GPT-2 small, in the order of its modules."""
    block: Shapes = [
        *((width,), (width,)),
        *((3 * width, width), (3 * width,), (width, width), (width,)),
        *((width,), (width,)),
        *((4 * width, width), (4 * width,), (width, 4 * width), (width,)),
    ]
    return [(vocabulary, width), (context, width), *(block * layers), (width,), (width,)]
