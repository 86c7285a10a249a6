"""What state dicts carry: 16-bit words as pairs of bytes, for neither NCCL nor Gloo sends int16; counts as numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .sharding import local, sharded_like


def with_bytes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict in which int16 tensors of shape (...) are uint8 of shape (..., 2), on the same memory."""
    return _with_states(
        state_dict,
        lambda state: {
            name: _as_bytes(value) if isinstance(value, Tensor) and value.dtype == torch.int16 else value
            for name, value in state.items()
        },
    )


def with_words(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict in which what `with_bytes` made of int16 tensors is int16 again, on the same memory."""
    return _with_states(state_dict, _state_with_words)


def with_numbers(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict whose step counts are Python ints; the host waits for those that lie on a device."""
    states = [state for state in state_dict["state"].values() if isinstance(state.get("step"), Tensor)]
    by_device: dict[torch.device, list[Mapping[str, Any]]] = defaultdict(list)
    for state in states:
        by_device[state["step"].device].append(state)
    numbers: dict[int, int] = {}
    for some in by_device.values():
        counts = torch.stack([state["step"] for state in some]).tolist()
        numbers |= {id(state): count for state, count in zip(some, counts, strict=True)}
    return _with_states(state_dict, lambda state: {**state, "step": numbers.get(id(state), state.get("step"))})


def _with_states(
    state_dict: Mapping[str, Any], convert: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    states = state_dict.get("state")
    if not isinstance(states, Mapping):  # refused later, by name
        return dict(state_dict)
    converted = {key: convert(state) if isinstance(state, Mapping) else state for key, state in states.items()}
    return {**state_dict, "state": converted}


def _state_with_words(state: Mapping[str, Any]) -> dict[str, Any]:
    words = dict(state)
    if _is_bytes(state.get("master")):  # a remainder of one byte is int8
        words["master"] = _as_words(state["master"])
    coded = _is_bytes(state.get("exp_avg_sq")) and _is_bytes(state.get("group_exponents"))
    if coded and isinstance(state.get("exp_avg"), Tensor):
        name = "exp_avg_sq" if state["exp_avg_sq"].ndim == state["exp_avg"].ndim + 1 else "group_exponents"
        words[name] = _as_words(state[name])
    return words


def _is_bytes(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8


def _as_bytes(tensor: Tensor) -> Tensor:
    return sharded_like(tensor, local(tensor).unsqueeze(-1).view(torch.uint8), (*tensor.shape, 2))


def _as_words(tensor: Tensor) -> Tensor:
    if tensor.ndim == 0 or tensor.shape[-1] != 2:  # refused later, by name
        return tensor
    return sharded_like(tensor, local(tensor).view(torch.int16).squeeze(-1), tensor.shape[:-1])
