"""Lists of tensor shapes to step: of real models, by formula, in the order of their modules."""

from __future__ import annotations

from collections.abc import Callable

Shapes = list[tuple[int, ...]]


def flat(numel: int) -> Shapes:
    """Return one flat tensor, as ZeRO hands its partition over."""
    return [(numel,)]


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> Shapes:
    """Return the 148 tensors of GPT-2 small."""
    block: Shapes = [
        *((width,), (width,)),
        *((3 * width, width), (3 * width,), (width, width), (width,)),
        *((width,), (width,)),
        *((4 * width, width), (4 * width,), (width, 4 * width), (width,)),
    ]
    return [(vocabulary, width), (context, width), *(block * layers), (width,), (width,)]


def llama3_8b(ranks: int = 1) -> Shapes:
    """Return one rank's share of the 291 tensors of Llama 3 8B, each sharded by rows, as FSDP2 does."""
    width, key_value, hidden, vocabulary = 4096, 1024, 14336, 128256
    block: Shapes = [
        *((width, width), (key_value, width), (key_value, width), (width, width)),
        *((hidden, width), (hidden, width), (width, hidden)),
        *((width,), (width,)),
    ]
    whole = [(vocabulary, width), *(block * 32), (width,), (vocabulary, width)]
    return [(shape[0] // ranks, *shape[1:]) for shape in whole]


def resnet50() -> Shapes:
    """Return the 161 tensors of ResNet-50: convolutions without bias, two tensors of each batch norm, a classifier."""

    def normalized(channels: int, *convolution: int) -> Shapes:
        return [(channels, *convolution), (channels,), (channels,)]

    shapes = normalized(64, 3, 7, 7)
    inputs = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += normalized(width, inputs, 1, 1) + normalized(width, width, 3, 3)
            shapes += normalized(4 * width, width, 1, 1)
            if block == 0:
                shapes += normalized(4 * width, inputs, 1, 1)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def vit_l() -> Shapes:
    """Return the 296 tensors of ViT-L/16 at 224 pixels."""
    width, hidden, tokens = 1024, 4096, 197
    block: Shapes = [
        *((width,), (width,)),
        *((3 * width, width), (3 * width,), (width, width), (width,)),
        *((width,), (width,)),
        *((hidden, width), (hidden,), (width, hidden), (width,)),
    ]
    stem: Shapes = [(1, 1, width), (width, 3, 16, 16), (width,), (1, tokens, width)]
    return [*stem, *(block * 24), (width,), (width,), (1000, width), (1000,)]


def many_small(tensors: int = 1000, numel: int = 4096) -> Shapes:
    """Return many tensors of few elements, where the call costs more than the memory traffic."""
    return [(numel,)] * tensors


# name on the command line: name in tables, shapes.
LISTS: dict[str, tuple[str, Callable[[], Shapes]]] = {
    "gpt2": ("GPT-2 small, 148 tensors", gpt2),
    "llama3-8b-shard": ("Llama 3 8B, an eighth, 291 tensors", lambda: llama3_8b(ranks=8)),
    "resnet50": ("ResNet-50, 161 tensors", resnet50),
    "vit-l": ("ViT-L/16, 296 tensors", vit_l),
    "many-small": ("1,000 tensors of 4,096", many_small),
}
