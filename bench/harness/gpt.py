"""A small GPT and its tokens, for `adax-triton bench train`: plain torch, sizes by argument, no files needed.

Synthetic tokens follow a Markov chain: after each token come four others, of probabilities 1/2, 1/4, 1/8 and 1/8, in an
order drawn once per seed. So the loss of what learns nothing is ln 256 = 5.545 nats per token, and no model can come
below the chain's entropy, 7/4 ln 2 = 1.213.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256
SUCCESSOR_CHANCES = (1 / 2, 1 / 4, 1 / 8, 1 / 8)
ENTROPY = -sum(chance * math.log(chance) for chance in SUCCESSOR_CHANCES)
HELD_OUT_SHARE = 1 / 10  # of a text, its end


class Block(nn.Module):
    """Causal attention, then a four times wider perceptron, each after a norm and with a residual path."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block; `x` is (batch, time, width)."""
        batch, time, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, width per head)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class GPT(nn.Module):
    """Decoder-only transformer with a tied head, that returns the mean cross-entropy of the next token, in nats.

    Args:
        layers: number of blocks.
        width: size of the residual stream; a multiple of `heads`.
        heads: attention heads per block.
        context: longest sequence.

    Raises:
        ValueError: `width` is not a multiple of `heads`.
    """

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width: expected a multiple of heads={heads}, got {width}")
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the scalar loss of `targets` after `inputs`, both (batch, time) int64."""
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1], device=inputs.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Batches:
    """Batches that depend on (seed, step, rank) alone: of the Markov chain, or windows of a text's bytes.

    Args:
        context: tokens per sequence.
        seed: of the chain and of the draws.
        text: a file whose bytes are the tokens; its last tenth is held out. None is the chain.

    Raises:
        ValueError: a tenth of the text is not longer than `context`.
    """

    def __init__(self, context: int, seed: int, text: Path | None = None) -> None:
        self.context, self.seed = context, seed
        generator = torch.Generator().manual_seed(seed)
        self._successors = torch.rand(VOCABULARY, VOCABULARY, generator=generator).argsort(dim=1)[:, :4]
        self._text = None if text is None else torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8)
        if self._text is not None and int(len(self._text) * HELD_OUT_SHARE) <= context + 1:
            raise ValueError(
                f"data: a tenth of {text} must be longer than context={context}, got {len(self._text)} bytes"
            )

    def batch(self, step: int, rank: int, ranks: int, size: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Return (inputs, targets), each (size, context) int64: the part of `rank` in the global batch of `step`."""
        draw = torch.Generator().manual_seed((2 * (self.seed * 1_000_003 + step) + held_out) % 2**32)
        windows = self._chain(ranks * size, draw) if self._text is None else self._windows(ranks * size, draw, held_out)
        mine = windows[rank * size : (rank + 1) * size]
        return mine[:, :-1].contiguous(), mine[:, 1:].contiguous()

    def _chain(self, count: int, draw: torch.Generator) -> Tensor:
        chances = torch.tensor(SUCCESSOR_CHANCES).expand(count, -1)
        choices = torch.multinomial(chances, self.context + 1, replacement=True, generator=draw)
        current = torch.randint(VOCABULARY, (count,), generator=draw)
        columns = []
        for position in range(self.context + 1):
            columns.append(current)
            current = self._successors[current, choices[:, position]]
        return torch.stack(columns, dim=1)

    def _windows(self, count: int, draw: torch.Generator, held_out: bool) -> Tensor:
        assert self._text is not None
        border = int(len(self._text) * (1 - HELD_OUT_SHARE))
        part = self._text[border:] if held_out else self._text[:border]
        starts = torch.randint(len(part) - self.context, (count,), generator=draw)
        return part[starts[:, None] + torch.arange(self.context + 1)].long()
