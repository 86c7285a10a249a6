"""Export and load the float32 master weights of 16-bit parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adax_triton.update.quantized_update import load_master, store_master

from .allocation import local_state_tensors
from .dtensor import local_tensor, placed_like, sharded_like


def export(model: nn.Module, states: Mapping[Tensor, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return a model's state dict with float32 weights.

    Args:
        model: the model.
        states: optimizer state of each parameter.
    """
    params = dict(model.named_parameters(remove_duplicate=False))
    exported = {}
    for name, tensor in model.state_dict().items():
        param = params.get(name)
        if param is None or not param.is_floating_point() or param.dtype == torch.float64:
            exported[name] = tensor.clone() if isinstance(tensor, Tensor) else tensor
            continue
        master = local_state_tensors(states[param]).get("master") if param in states else None
        weights = load_master(local_tensor(param.detach()), master)
        exported[name] = sharded_like(param, weights, param.shape)
    return exported


def check(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Check that a state dict matches a model's keys and shapes.

    Raises:
        ValueError: keys or shapes differ.
    """
    current = model.state_dict()
    if set(current) != set(state_dict):
        missing, unknown = sorted(set(current) - set(state_dict)), sorted(set(state_dict) - set(current))
        raise ValueError(f"state_dict does not match the model: missing keys {missing}, unknown keys {unknown}")
    for name, tensor in current.items():
        if isinstance(tensor, Tensor) and tensor.shape != state_dict[name].shape:
            raise ValueError(
                f"state_dict[{name!r}] has shape {tuple(state_dict[name].shape)}; the model needs {tuple(tensor.shape)}"
            )


def load(model: nn.Module, states: Mapping[Tensor, Mapping[str, Any]], state_dict: Mapping[str, Tensor]) -> None:
    """Load float32 weights into a model and its masters, rounded to nearest.

    Args:
        model: the model.
        states: optimizer state of each parameter.
        state_dict: float32 weights by name; checked by `check`.
    """
    current = model.state_dict()
    placed = {
        name: placed_like(tensor, current[name]) if isinstance(tensor, Tensor) else tensor
        for name, tensor in state_dict.items()
    }
    model.load_state_dict(placed)
    with torch.no_grad():
        for name, param in model.named_parameters(remove_duplicate=False):
            master = local_state_tensors(states[param]).get("master") if param in states else None
            if master is not None:
                weights = local_tensor(placed[name]).to(device=param.device, dtype=torch.float32)
                store_master(weights, local_tensor(param.detach()), master, random=None, stochastic=False)
