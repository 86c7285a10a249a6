"""What a loaded state dict must hold, and how its tensors reach the optimizer with their precision kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from adax_triton.update.coefficients import COEFFICIENT_KEYS
from adax_triton.update.quantization import GROUP
from adax_triton.update.quantized_update import load_moments, store_moments

from .allocation import MOMENTS, STATE_TENSORS, is_new, local_state_tensors
from .dtensor import local_tensor, placed_like, splits_groups
from .precision import HALF_DTYPES, Layout, is_quantized, precision_of, state_layouts
from .step_counts import checked_count, counts_as_ints
from .validation import OLD_CHECKPOINT_DEFAULTS, validate_group, with_current_names

# What an optimizer keeps of its own when it loads a checkpoint: how states and counts are kept is no part of what was
# learned.
KEPT_OPTIONS = ("states", "master_weights", "weight_rounding", "capturable")


class OpaqueTensor:
    """Carries a state tensor through `Optimizer.load_state_dict`, which would cast it to the parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def with_int_counts(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict whose step counts are Python ints; the host waits for those that lie on a device."""
    keys = list(_param_keys(state_dict["param_groups"]))
    return {**state_dict, "state": counts_as_ints(state_dict["state"], keys)}


def _param_keys(groups: Iterable[Mapping[str, Any]]) -> Iterable[Any]:
    return chain.from_iterable(group["params"] for group in groups)


def wrap_tensors(state_dict: Mapping[str, Any], own_states: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a shallow copy of a state dict with this package's tensors of its per-parameter states held.

    Args:
        state_dict: to load.
        own_states: of the optimizer that loads it. Tensors on their memory are copied, because loading writes there.
    """
    own = {_address(value) for state in own_states.values() if isinstance(state, Mapping) for value in state.values()}
    states = dict(state_dict["state"])
    for key in _param_keys(state_dict["param_groups"]):
        if isinstance(states.get(key), Mapping):
            states[key] = {
                name: OpaqueTensor(value.clone() if _address(value) in own else value)
                if name in STATE_TENSORS
                else value
                for name, value in states[key].items()
            }
    return {**state_dict, "state": states}


def _address(value: Any) -> int | None:
    return local_tensor(value).untyped_storage().data_ptr() or None if isinstance(value, Tensor) else None


def with_own_options(own_groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a state dict's groups with the options that an optimizer's own groups keep."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    for saved, own in zip(groups, own_groups, strict=False):  # unequal numbers are refused later, in torch's words
        saved.update({key: own[key] for key in KEPT_OPTIONS})
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
        _check_group(saved, own, index)
    for key, param in zip(_param_keys(saved_groups), _param_keys(param_groups), strict=True):
        if isinstance(states.get(key), Mapping) and not is_new(states[key]):
            _check_state(states[key], param, key)


def _check_rule(saved: str | None, own: str, index: int) -> None:
    if saved is None:
        raise ValueError(
            f"state_dict['param_groups'][{index}] has no 'second_moment': it was not saved by adax_triton, and its "
            "exp_avg_sq is not known to be the normalised second moment; convert it first, by from_torch_adam or "
            "from_released_adax"
        )
    if saved != own:
        raise ValueError(
            f"state_dict['param_groups'][{index}]['second_moment'] is {saved!r}, but this optimizer runs {own!r}"
        )


def _check_group(saved: Mapping[str, Any], own: Mapping[str, Any], index: int) -> None:
    name = f"state_dict['param_groups'][{index}]"
    missing = [key for key in COEFFICIENT_KEYS if key not in saved and key not in OLD_CHECKPOINT_DEFAULTS]
    if missing:
        raise ValueError(f"{name} has no {', '.join(map(repr, missing))}")
    try:
        validate_group({**own, **with_current_names(saved)})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _check_state(state: Mapping[str, Any], param: Tensor, key: int) -> None:
    name = f"state_dict['state'][{key}]"
    if not {"step", *MOMENTS} <= set(state):
        raise ValueError(f"{name} has keys {sorted(map(str, state))}; expected step, exp_avg, exp_avg_sq")
    checked_count(state["step"], f"{name}['step']")
    own = [part for part in STATE_TENSORS if part in state]
    for part in own:
        if not isinstance(state[part], Tensor):
            raise TypeError(f"{name}[{part!r}] is a {type(state[part]).__name__}; expected a tensor")
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
    if is_quantized(precision.states) and splits_groups(param):  # a rank's part could not be decoded alone
        raise ValueError(
            f"{name} holds states={precision.states!r}, in groups that are split by the sharding of its parameter, "
            f"{getattr(param, 'placements', None)}; save it with states='float32' instead"
        )
    if param.dtype not in HALF_DTYPES and master is not None:  # its own master
        precision = precision._replace(master_weights=None)
        own.remove("master")
    layouts = state_layouts(param, precision)
    if own != list(layouts):
        raise ValueError(f"{name} has keys {sorted(map(str, state))}; expected {['step', *layouts]}")
    for part, layout in layouts.items():
        _check_tensor(state[part], layout, f"{name}[{part!r}]", param)


def _check_tensor(tensor: Tensor, layout: Layout, name: str, param: Tensor) -> None:
    if tuple(tensor.shape) != layout.stored_shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; expected {layout.stored_shape} for a parameter of shape "
            f"{tuple(param.shape)}"
        )
    if tensor.is_meta or tensor.layout != torch.strided:
        raise ValueError(f"{name} is a {tensor.layout} tensor on {tensor.device}; expected a dense one with values")
    if layout.is_bytes != (tensor.dtype == torch.uint8) or tensor.is_complex() != layout.dtype.is_complex:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected {layout.stored_dtype}")


def params_with_wrapped_tensors(state: Mapping[Any, Any]) -> Iterable[Tensor]:
    """Yield the parameters whose loaded state is still held."""
    for param, value in state.items():
        if isinstance(value, Mapping) and any(isinstance(item, OpaqueTensor) for item in value.values()):
            yield param


def restore(held: Mapping[str, Any], into: dict[str, Any], param: Tensor) -> None:
    """Copy a held state into the tensors of `into`, in their precision, and its step where it is kept.

    Args:
        held: the loaded state, with held tensors.
        into: the state of the parameter.
        param: the parameter, whose weights are not changed.
    """
    saved = {name: value.tensor for name, value in held.items() if isinstance(value, OpaqueTensor)}
    into.update({name: value for name, value in held.items() if name not in ("step", *saved)})  # of others
    step = checked_count(held["step"], "state['step']")
    if isinstance(into["step"], Tensor):
        into["step"].fill_(step)  # a captured graph knows it by address
    else:
        into["step"] = step
    with torch.no_grad():
        saved = {name: placed_like(tensor, param) for name, tensor in saved.items()}
        if is_quantized(precision_of(saved).states) or is_quantized(precision_of(into).states):
            _restore_codes(saved, into, param)
        else:
            for name in MOMENTS:
                into[name].copy_(saved[name])
        if "master" in into:
            _restore_master(saved, into, param)


def _restore_codes(saved: Mapping[str, Tensor], into: Mapping[str, Tensor], param: Tensor) -> None:
    if precision_of(saved).states == precision_of(into).states:
        for name in (*MOMENTS, "group_exponents"):
            into[name].copy_(saved[name])
        return
    numel = local_tensor(param).numel()
    moments = load_moments(*_runs(saved, param.device))
    targets = _runs(into, param.device)
    filler = 0 if targets[2] is None else -numel % GROUP
    first, second = (torch.nn.functional.pad(moment[:numel], (0, filler)) for moment in moments)
    # To nearest: once is not step by step, and freezes nothing.
    store_moments((first, second), *targets, random=None)
    stored = local_state_tensors(into)
    for name, run in zip(MOMENTS, targets[:2], strict=True):
        stored[name].copy_(run[:numel].view(stored[name].shape))
    if targets[2] is not None:
        stored["group_exponents"].copy_(targets[2].view(stored["group_exponents"].shape))


def _runs(state: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return 1-D copies of the moments in the order of indices; codes in whole groups."""
    numbers = {name: tensor.to(device).flatten().clone() for name, tensor in local_state_tensors(state).items()}
    exponents = numbers.get("group_exponents")
    first, second = (numbers[name] for name in MOMENTS)
    if exponents is not None:
        first, second = (torch.nn.functional.pad(codes, (0, -codes.numel() % GROUP)) for codes in (first, second))
    return first, second, exponents


def _restore_master(saved: Mapping[str, Tensor], into: Mapping[str, Tensor], param: Tensor) -> None:
    given, own = local_state_tensors(saved).get("master"), local_state_tensors(into)["master"]
    if given is None:
        own.copy_(local_tensor(param.detach()) if own.is_floating_point() else torch.zeros_like(own))
    elif given.dtype == own.dtype:
        own.copy_(given)
    elif own.dtype == torch.int16:
        own.copy_(given.to(torch.int16) << 8)
    else:  # to the nearest of those that leave the parameter as it is
        own.copy_(((given.to(torch.int32) + 0x80) >> 8).clamp(-128, 127))
