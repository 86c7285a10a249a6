"""What a loaded state dict must hold, and how its tensors reach the optimizer with their precision kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .compact import GROUP
from .flat_buffer import is_dense, memory_run
from .precision import HALF_DTYPES, Layout, is_compact, precision_of, state_layouts
from .sharding import local, placed_like, splits_groups
from .state_tensors import MOMENTS
from .stored import load_moments, store_moments

# What an optimizer keeps of its own when it loads a checkpoint: how states and counts are kept is no part of what was
# learned.
OWN_KEYS = ("states", "master_weights", "weight_rounding", "capturable")


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


def with_own_options(own_groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a state dict's groups with the options that an optimizer's own groups keep."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    for saved, own in zip(groups, own_groups, strict=False):  # unequal numbers are refused later, in torch's words
        saved.update({key: own[key] for key in OWN_KEYS})
    return groups


def keep_lr_tensors(groups: Sequence[dict[str, Any]], own_groups: Sequence[Mapping[str, Any]]) -> None:
    """Put loaded learning rates into the tensors that an optimizer's own groups had, which a CUDA graph reads."""
    for group, own in zip(groups, own_groups, strict=False):  # there are none before an optimizer is unpickled
        if isinstance(own["lr"], Tensor) and group["lr"] is not own["lr"]:
            own["lr"].copy_(torch.as_tensor(group["lr"]))
            group["lr"] = own["lr"]


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
    name = f"state_dict['state'][{key}]"
    if not {"step", *MOMENTS} <= set(state):
        raise ValueError(f"{name} has keys {sorted(map(str, state))}; expected step, exp_avg, exp_avg_sq")
    step = state["step"]
    if isinstance(step, Tensor) and step.numel() == 1:
        step = step.item()
    if isinstance(step, bool) or not isinstance(step, (int, float)) or not float(step).is_integer() or step < 0:
        raise TypeError(f"{name}['step'] is {state['step']!r}; expected a count of steps")
    for part, value in state.items():
        if part != "step" and not isinstance(value, Tensor):
            raise TypeError(f"{name}[{part!r}] is a {type(value).__name__}; expected a tensor")
    master = state.get("master")
    if (
        master is not None
        and param.dtype in HALF_DTYPES
        and master.is_floating_point() != (param.dtype == torch.float16)
    ):
        raise ValueError(
            f"{name}['master'] is {master.dtype}, that of another 16-bit dtype than its parameter's {param.dtype}; "
            "carry weights over by master_state_dict and load_master_state_dict"
        )
    precision = precision_of(state)
    if is_compact(precision.states) and splits_groups(param):  # a rank's part could not be decoded alone
        raise ValueError(
            f"{name} holds states={precision.states!r}, in groups that are split by the sharding of its parameter, "
            f"{getattr(param, 'placements', None)}; save it with states='float32' instead"
        )
    layouts = state_layouts(param, precision)
    if set(state) != {"step", *layouts}:
        raise ValueError(f"{name} has keys {sorted(map(str, state))}; expected {['step', *layouts]}")
    for part, layout in layouts.items():
        _check_tensor(state[part], layout, f"{name}[{part!r}]", param)


def _check_tensor(tensor: Tensor, layout: Layout, name: str, param: Tensor) -> None:
    if tuple(tensor.shape) != layout.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; expected {layout.shape} beside a parameter of shape "
            f"{tuple(param.shape)}"
        )
    codes = not layout.dtype.is_floating_point and not layout.dtype.is_complex
    if codes and tensor.dtype != layout.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected {layout.dtype}")


def held_params(state: Mapping[Any, Any]) -> Iterable[Tensor]:
    """Yield the parameters whose loaded state is still held."""
    for param, value in state.items():
        if isinstance(value, Mapping) and any(isinstance(item, Held) for item in value.values()):
            yield param


def restore(held: Mapping[str, Any], into: dict[str, Any], param: Tensor) -> None:
    """Copy a held state into the tensors of `into`, in their precision, and its step where it is kept.

    Args:
        held: the loaded state, with held tensors.
        into: the state of the parameter.
        param: the parameter, whose weights are not changed.
    """
    saved = {name: value.tensor if isinstance(value, Held) else value for name, value in held.items()}
    step = int(saved.pop("step"))
    if isinstance(into["step"], Tensor):
        into["step"].fill_(step)  # a captured graph knows it by address
    else:
        into["step"] = step
    with torch.no_grad():
        saved = {name: placed_like(tensor, param) for name, tensor in saved.items()}
        if is_compact(precision_of(saved).states) or is_compact(precision_of(into).states):
            _restore_codes(saved, into, param)
        else:
            for name in MOMENTS:
                into[name].copy_(saved[name])
        if "master" in into:
            _restore_master(saved.get("master"), into["master"], param)


def _restore_codes(saved: Mapping[str, Tensor], into: Mapping[str, Tensor], param: Tensor) -> None:
    if precision_of(saved).states == precision_of(into).states:
        for name in (*MOMENTS, "group_exponents"):
            into[name].copy_(saved[name])
        return
    shard = local(param.detach())
    numel = shard.numel()
    moments = load_moments(*_runs(saved, shard))
    targets = _runs(into, shard)
    filler = 0 if targets[2] is None else -numel % GROUP
    first, second = (torch.nn.functional.pad(moment[:numel], (0, filler)) for moment in moments)
    # To nearest: once is not step by step, and freezes nothing.
    store_moments((first, second), *targets, random=None)
    for name, run in zip(MOMENTS, targets[:2], strict=True):
        tensor = local(into[name])
        tensor.copy_(_in_shape(run[:numel], tensor))
    if targets[2] is not None:
        local(into["group_exponents"]).copy_(targets[2].view(local(into["group_exponents"]).shape))


def _runs(state: Mapping[str, Tensor], shard: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return copies of the moments as 1-D runs in the order of the parameter's memory; codes in whole groups."""
    exponents = state.get("group_exponents")
    runs = []
    for name in MOMENTS:
        tensor = local(state[name]).to(shard.device)
        if exponents is None:
            like = torch.empty_like(shard, dtype=tensor.dtype) if is_dense(shard) else tensor.new_empty(tensor.shape)
            runs.append(memory_run(like.copy_(tensor)))
        else:
            runs.append(torch.nn.functional.pad(tensor.reshape(-1), (0, -tensor.numel() % GROUP)))
    return runs[0], runs[1], None if exponents is None else local(exponents).to(shard.device).flatten().clone()


def _in_shape(run: Tensor, tensor: Tensor) -> Tensor:
    return run.view(tensor.shape) if tensor.is_contiguous() else run.as_strided(tensor.shape, tensor.stride())


def _restore_master(saved: Tensor | None, into: Tensor, param: Tensor) -> None:
    if saved is None:
        local(into).copy_(local(param.detach()) if into.is_floating_point() else torch.zeros_like(local(into)))
    elif saved.dtype == into.dtype:
        into.copy_(saved)
    elif into.dtype == torch.int16:
        local(into).copy_(local(saved).to(torch.int16) << 8)
    else:  # to the nearest of those that leave the parameter as it is
        local(into).copy_(((local(saved).to(torch.int32) + 0x80) >> 8).clamp(-128, 127))
