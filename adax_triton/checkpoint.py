"""What a loaded state dict must hold, and how its tensors reach the optimizer with their precision kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .precision import state_dtype

STATE_KEYS = ("step", "exp_avg", "exp_avg_sq")


class Held:
    """Carries a state tensor through `Optimizer.load_state_dict`, which would cast it to the parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def hold_tensors(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a shallow copy of a state dict with the tensors of its per-parameter states held."""
    states = {
        key: {name: Held(value) if isinstance(value, Tensor) else value for name, value in state.items()}
        if isinstance(state, Mapping)
        else state
        for key, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


def check_state_dict(state_dict: Mapping[str, Any], param_groups: list[dict[str, Any]]) -> None:
    """Check that a state dict fits the parameters, before anything is loaded.

    Args:
        state_dict: as given to `load_state_dict`.
        param_groups: the optimizer's own groups.

    Raises:
        ValueError: keys or shapes that do not fit; a second moment of another rule, or of another package, whose
            `exp_avg_sq` means something else.
        TypeError: a state that is not a tensor, or a step that is no count.
    """
    for name in ("state", "param_groups"):
        if name not in state_dict:
            raise ValueError(f"state_dict has no {name!r}; its keys are {sorted(map(str, state_dict))}")
    saved_groups = state_dict["param_groups"]
    if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in param_groups]:
        return  # load_state_dict itself refuses this, with its usual words
    states = state_dict["state"]
    for index, (saved, own) in enumerate(zip(saved_groups, param_groups, strict=True)):
        _check_rule(saved.get("second_moment"), own["second_moment"], index)
    keys = chain.from_iterable(group["params"] for group in saved_groups)
    params = chain.from_iterable(group["params"] for group in param_groups)
    for key, param in zip(keys, params, strict=True):
        if states.get(key):
            _check_state(states[key], param, key)


def _check_rule(saved: str | None, own: str, index: int) -> None:
    if saved is None:
        raise ValueError(
            f"state_dict['param_groups'][{index}] has no 'second_moment': it was not saved by adax_triton, and its "
            "exp_avg_sq is not known to be the normalised second moment"
        )
    if saved != own:
        raise ValueError(
            f"state_dict['param_groups'][{index}]['second_moment'] is {saved!r}, but this optimizer runs {own!r}"
        )


def _check_state(state: Mapping[str, Any], param: Tensor, key: int) -> None:
    if set(state) != set(STATE_KEYS):
        raise ValueError(f"state_dict['state'][{key}] has keys {sorted(map(str, state))}; expected {list(STATE_KEYS)}")
    step = state["step"]
    if isinstance(step, Tensor) and step.numel() == 1:
        step = step.item()
    if isinstance(step, bool) or not isinstance(step, (int, float)) or not float(step).is_integer() or step < 0:
        raise TypeError(f"state_dict['state'][{key}]['step'] is {state['step']!r}; expected a count of steps")
    for name in STATE_KEYS[1:]:
        tensor = state[name]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"state_dict['state'][{key}][{name!r}] is a {type(tensor).__name__}; expected a tensor")
        if tensor.shape != param.shape:
            raise ValueError(
                f"state_dict['state'][{key}][{name!r}] has shape {tuple(tensor.shape)}, "
                f"its parameter {tuple(param.shape)}"
            )


def held_params(state: Mapping[Any, Any]) -> Iterable[Tensor]:
    """Yield the parameters whose loaded state is still held."""
    for param, value in state.items():
        if isinstance(value, Mapping) and any(isinstance(item, Held) for item in value.values()):
            yield param


def misfit(state: Mapping[str, Any], param: Tensor) -> str | None:
    """Return what about a parameter's state does not fit it any more, or None.

    States are reached by address: after `param.data = other`, a cast or `model.to(...)` they would be misread.
    """
    if set(state) != set(STATE_KEYS):
        return f"state has keys {sorted(map(str, state))}; expected {list(STATE_KEYS)}"
    dtype = state_dtype(param.dtype)
    for name in STATE_KEYS[1:]:
        tensor = state[name]
        if tensor.shape != param.shape or tensor.dtype != dtype or tensor.device != param.device:
            return (
                f"state[{name!r}]: shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}; its parameter of "
                f"{param.dtype} needs shape {tuple(param.shape)}, {dtype}, {param.device}"
            )
    return None


def restore(held: Mapping[str, Any], into: dict[str, Any]) -> None:
    """Copy a held state into the tensors of `into`, and make its step a Python int."""
    step = held["step"].tensor if isinstance(held["step"], Held) else held["step"]
    into["step"] = int(step)
    with torch.no_grad():
        for name in STATE_KEYS[1:]:
            into[name].copy_(held[name].tensor)
