"""Lists of tensor shapes: flat, many small, real models in module order."""

from __future__ import annotations

import math
from collections.abc import Callable

Shapes = list[tuple[int, ...]]


def elements(shapes: Shapes) -> int:
    """Return the number of elements of all tensors."""
    return sum(math.prod(shape) for shape in shapes)


def flat(numel: int) -> Shapes:
    """Return one flat tensor, such as a partition of ZeRO."""
    return [(numel,)]


def many_small_tensors(tensors: int = 1000, numel: int = 4096) -> Shapes:
    """Return many small tensors; host overhead limits their step."""
    return [(numel,)] * tensors


def _block(width: int) -> Shapes:
    """Return the shapes of a transformer block with biases.

    It has a norm, attention, a norm, and a perceptron four times as wide.
    """
    attention: Shapes = [(3 * width, width), (3 * width,), (width, width), (width,)]
    perceptron: Shapes = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(width,), (width,), *attention, (width,), (width,), *perceptron]


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> Shapes:
    """Return the 148 tensors of GPT-2 small."""
    return [(vocabulary, width), (context, width), *(_block(width) * layers), (width,), (width,)]


def vit_l() -> Shapes:
    """Return the 296 tensors of ViT-L/16 at 224 pixels."""
    width, tokens = 1024, 197
    stem: Shapes = [(1, 1, width), (width, 3, 16, 16), (width,), (1, tokens, width)]
    return [*stem, *(_block(width) * 24), (width,), (width,), (1000, width), (1000,)]


def llama3_8b(ranks: int = 1) -> Shapes:
    """Return one rank's share of the 291 tensors of Llama 3 8B.

    Each tensor is sharded by rows, as in FSDP2.
    """
    width, key_value, hidden, vocabulary = 4096, 1024, 14336, 128256
    attention: Shapes = [(width, width), (key_value, width), (key_value, width), (width, width)]
    block: Shapes = [*attention, (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    whole = [(vocabulary, width), *(block * 32), (width,), (vocabulary, width)]
    return [(shape[0] // ranks, *shape[1:]) for shape in whole]


def resnet50() -> Shapes:
    """Return ResNet-50's 161 tensors: bias-free convolutions, batch norms and a classifier."""

    def normalized(channels: int, *convolution: int) -> Shapes:
        return [(channels, *convolution), (channels,), (channels,)]

    shapes, inputs = normalized(64, 3, 7, 7), 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += normalized(width, inputs, 1, 1) + normalized(width, width, 3, 3)
            shapes += normalized(4 * width, width, 1, 1)
            if block == 0:
                shapes += normalized(4 * width, inputs, 1, 1)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


# Name on the command line: (name in tables, shapes).
LISTS: dict[str, tuple[str, Callable[[], Shapes]]] = {
    "gpt2": ("GPT-2 small, 148 tensors", gpt2),
    "llama3-8b-shard": ("Llama 3 8B, an eighth, 291 tensors", lambda: llama3_8b(ranks=8)),
    "resnet50": ("ResNet-50, 161 tensors", resnet50),
    "vit-l": ("ViT-L/16, 296 tensors", vit_l),
    "many-small": ("1,000 tensors of 4,096", many_small_tensors),
}
