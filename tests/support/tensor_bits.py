"""Bits of tensors, parameters and optimizer states, for comparisons."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adax_triton import AdaX


def contents(optimizer: AdaX) -> list[tuple[str, Any]]:
    """Return (name, bits) of the parameters and states of the first group."""
    found = []
    for param in optimizer.param_groups[0]["params"]:
        values = {"param": param, **optimizer.state[param]}
        found += [(name, int(value) if name == "step" else bits(value)) for name, value in values.items()]
    return found


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
