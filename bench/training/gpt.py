"""A small GPT in plain torch, with synthetic training tokens.

Tokens follow a Markov chain: after each token come four others, with probabilities 1/2, 1/4, 1/8 and 1/8, in an order
drawn once per seed. An untrained model has a loss of ln 256 = 5.545 nats per token. The best possible loss is the
entropy of the chain, 7/4 ln 2 = 1.213.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256
SUCCESSOR_CHANCES = (1 / 2, 1 / 4, 1 / 8, 1 / 8)
ENTROPY = -sum(chance * math.log(chance) for chance in SUCCESSOR_CHANCES)


class Block(nn.Module):
    """Causal attention, then a perceptron four times as wide.

    Each follows a norm and has a residual path.
    """

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
    """Decoder-only transformer with a tied head.

    Returns the mean cross-entropy of the next token, in nats.
    """

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
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
    """Batches of the Markov chain, which depend on (seed, step, rank) only."""

    def __init__(self, context: int, seed: int) -> None:
        self.context, self.seed = context, seed
        generator = torch.Generator().manual_seed(seed)
        self._successors = torch.rand(VOCABULARY, VOCABULARY, generator=generator).argsort(dim=1)[:, :4]

    def batch(self, step: int, rank: int, ranks: int, size: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Return (inputs, targets) of `rank` at `step`.

        Each is (size, context) int64, the part of `rank` in the global batch.
        """
        draw = torch.Generator().manual_seed((2 * (self.seed * 1_000_003 + step) + held_out) % 2**32)
        chances = torch.tensor(SUCCESSOR_CHANCES).expand(ranks * size, -1)
        choices = torch.multinomial(chances, self.context + 1, replacement=True, generator=draw)
        tokens = [torch.randint(VOCABULARY, (ranks * size,), generator=draw)]
        for position in range(self.context):
            tokens.append(self._successors[tokens[-1], choices[:, position]])
        mine = torch.stack(tokens, dim=1)[rank * size : (rank + 1) * size]
        return mine[:, :-1].contiguous(), mine[:, 1:].contiguous()
