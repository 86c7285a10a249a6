"""Simulated gradients of several kinds, for `precision_study`: each maps a step t to a float32 gradient.

A kind is called as `KINDS[kind](numel, steps, generator)` and returns the function of t; z is standard normal noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from adax_triton.update.quantization import GROUP

Gradient = Callable[[int], Tensor]
ROW_CHANCE = 1 / 20
DECADES = 4


def stationary(numel: int, steps: int, generator: Generator) -> Gradient:
    """Noise of one scale: g = z."""
    return lambda step: torch.randn(numel, generator=generator)


def decaying(numel: int, steps: int, generator: Generator) -> Gradient:
    """A falling scale, g = s z: s is 1 for the first third of the steps T/3, then sqrt(T/3 / t) / 3.3."""
    third = max(1, steps // 3)

    def gradient(step: int) -> Tensor:
        scale = 1.0 if step <= third else math.sqrt(third / step) / 3.3
        return torch.randn(numel, generator=generator) * scale

    return gradient


def vanishing(numel: int, steps: int, generator: Generator) -> Gradient:
    """A scale that goes to 0, as on the way to a minimum: g = z / (1 + t / (T / 100)), so that v falls all the time."""
    return lambda step: torch.randn(numel, generator=generator) / (1.0 + step / max(1, steps // 100))


def heavy_tailed(numel: int, steps: int, generator: Generator) -> Gradient:
    """Student's t of 3 degrees of freedom: g = z / sqrt(chi2_3 / 3)."""

    def gradient(step: int) -> Tensor:
        noise = torch.randn(4, numel, generator=generator)
        return noise[0] / noise[1:].square().mean(dim=0).sqrt()

    return gradient


def multi_scale(numel: int, steps: int, generator: Generator) -> Gradient:
    """Many scales, g = s z: s is spread over `DECADES` decades within every group of 32, in random order."""
    order = torch.rand(numel // GROUP, GROUP, generator=generator).argsort(dim=1).view(-1)
    scale = 10.0 ** (-DECADES * order / (GROUP - 1))
    return lambda step: torch.randn(numel, generator=generator) * scale


def sparse(numel: int, steps: int, generator: Generator) -> Gradient:
    """An embedding: each row of 32 has g = z with probability `ROW_CHANCE`, else exactly 0."""

    def gradient(step: int) -> Tensor:
        hit = torch.rand(numel // GROUP, 1, generator=generator) < ROW_CHANCE
        return (torch.randn(numel // GROUP, GROUP, generator=generator) * hit).view(-1)

    return gradient


def tiny(numel: int, steps: int, generator: Generator) -> Gradient:
    """Noise near 0: g = 1e-8 z."""
    return lambda step: torch.randn(numel, generator=generator) * 1e-8


KINDS: dict[str, Callable[[int, int, Generator], Gradient]] = {
    "stationary": stationary,
    "decaying": decaying,
    "vanishing": vanishing,
    "heavy-tailed": heavy_tailed,
    "multi-scale": multi_scale,
    "sparse": sparse,
    "tiny": tiny,
}
