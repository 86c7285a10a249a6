"""Check state dicts and load them without casting their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from adax_triton.update.coefficients import COEFFICIENT_KEYS, LARGEST_ADAX_BETA2
from adax_triton.update.quantization import GROUP
from adax_triton.update.quantized_update import load_moments, store_moments

from .allocation import MOMENTS, STATE_TENSORS, is_new, local_state_tensors
from .dtensor import local_tensor, placed_like, splits_code_groups
from .precision import HALF_DTYPES, Layout, is_quantized, precision_of, state_layouts
from .step_counts import checked_count, counts_as_ints
from .validation import OLD_CHECKPOINT_DEFAULTS, validate_group, with_current_names

# Options that loading a checkpoint does not overwrite: they choose storage formats and do not change the update rule.
KEPT_OPTIONS = ("states", "master_weights", "weight_rounding", "capturable")

# (saved rule, rule of the optimizer) -> function of adax_triton that converts a state dict.
_CONVERSIONS = {("adam", "adax"): "adax_from_adam", ("adax", "adam"): "adam_from_adax"}


class OpaqueTensor:
    """Hide a state tensor from `Optimizer.load_state_dict`, which casts tensors."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def with_int_counts(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with step counts as ints.

    Reading a GPU count synchronizes.
    """
    keys = list(_param_keys(state_dict["param_groups"]))
    return {**state_dict, "state": counts_as_ints(state_dict["state"], keys)}


def _param_keys(groups: Iterable[Mapping[str, Any]]) -> Iterable[Any]:
    return chain.from_iterable(group["params"] for group in groups)


def without_placeholders(
    state_dict: Mapping[str, Any], param_groups: Sequence[Mapping[str, Any]], current_states: Mapping[Any, Any]
) -> Mapping[str, Any]:
    """Return a state dict without the entries that torch adds.

    For an entry that the saved states lack, `set_optimizer_state_dict` passes an empty dictionary if the state dict is
    flat, and the loading optimizer's own `group_exponents` if it is full.

    Args:
        state_dict: the state dict to load.
        param_groups: groups of the loading optimizer.
        current_states: its states.
    """
    if not {"state", "param_groups"} <= set(state_dict):
        return state_dict
    states = dict(state_dict["state"])
    # check_state_dict compares the lengths.
    for key, param in zip(_param_keys(state_dict["param_groups"]), _param_keys(param_groups), strict=False):
        if isinstance(states.get(key), Mapping):
            state = {
                name: value
                for name, value in states[key].items()
                if name not in ("step", *STATE_TENSORS) or not isinstance(value, Mapping) or value
            }
            first = state.get("exp_avg")
            has_codes = "group_exponents" in current_states.get(param, {})
            if has_codes and isinstance(first, Tensor) and first.is_floating_point():
                state.pop("group_exponents", None)
            states[key] = state
    return {**state_dict, "state": states}


def wrap_tensors(state_dict: Mapping[str, Any], current_states: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a shallow copy with state tensors wrapped in `OpaqueTensor`.

    Args:
        state_dict: the state dict to load.
        current_states: states of the loading optimizer. Loading writes into them, so saved tensors that share their
            memory are cloned.
    """
    addresses = {
        _address(value) for state in current_states.values() if isinstance(state, Mapping) for value in state.values()
    }
    states = dict(state_dict["state"])
    for key in _param_keys(state_dict["param_groups"]):
        if isinstance(states.get(key), Mapping):
            states[key] = {
                name: OpaqueTensor(value.clone() if _address(value) in addresses else value)
                if name in STATE_TENSORS
                else value
                for name, value in states[key].items()
            }
    return {**state_dict, "state": states}


def _address(value: Any) -> int | None:
    return local_tensor(value).untyped_storage().data_ptr() or None if isinstance(value, Tensor) else None


def with_kept_options(
    current_groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the saved groups with `KEPT_OPTIONS` from the optimizer's groups."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    for saved, current in zip(groups, current_groups, strict=False):  # torch raises later if their numbers differ
        saved.update({key: current[key] for key in KEPT_OPTIONS})
    return groups


def keep_lr_tensors(groups: Sequence[dict[str, Any]], current_groups: Sequence[Mapping[str, Any]]) -> None:
    """Copy loaded learning rates into the existing lr tensors.

    CUDA graphs read these tensors.
    """
    for group, current in zip(groups, current_groups, strict=False):  # current_groups is empty while unpickling
        if isinstance(current["lr"], Tensor) and group["lr"] is not current["lr"]:
            current["lr"].copy_(torch.as_tensor(group["lr"]))
            group["lr"] = current["lr"]


def check_state_dict(state_dict: Mapping[str, Any], param_groups: list[dict[str, Any]]) -> None:
    """Check that a state dict matches the parameters, before anything is loaded.

    Args:
        state_dict: as given to `load_state_dict`.
        param_groups: the optimizer's groups.

    Raises:
        ValueError: keys or shapes differ; `second_moment` differs, or is missing because another package saved it.
        TypeError: a state is not a tensor, or a step is not a non-negative whole number.
    """
    for name in ("state", "param_groups"):
        if name not in state_dict:
            raise ValueError(f"state_dict has no {name!r}; its keys are {sorted(map(str, state_dict))}")
    saved_groups = state_dict["param_groups"]
    if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in param_groups]:
        return  # torch's load_state_dict raises for this
    states = state_dict["state"]
    for index, (saved, current) in enumerate(zip(saved_groups, param_groups, strict=True)):
        _check_rule(saved, current["second_moment"], index)
        _check_group(saved, current, index)
    for key, param in zip(_param_keys(saved_groups), _param_keys(param_groups), strict=True):
        if isinstance(states.get(key), Mapping) and not is_new(states[key]):
            _check_state(states[key], param, key)


def _advice(group: Mapping[str, Any], current: str) -> str:
    """Return how to convert another program's group for a rule."""
    if "betas" in group and ("amsgrad" in group or "bias_correction" in group):  # torch's or DeepSpeed's Adam
        rule, call = "adam", "from_torch_adam(state_dict)"
    elif "betas" in group and group["betas"][1] <= LARGEST_ADAX_BETA2:
        rule, call = "adax", "from_released_adax(state_dict, decoupled_weight_decay=...)"
    else:
        return "only state dicts of Adam, AdamW and the authors' AdaX can be converted"
    convert = _CONVERSIONS.get((rule, current))
    if convert is None and rule != current:
        return f"{call} converts it for an optimizer with second_moment={rule!r}"
    return f"load {f'{convert}({call})' if convert else call} instead, or convert its file with `adax-triton convert`"


def _check_rule(group: Mapping[str, Any], current: str, index: int) -> None:
    where, saved = f"state_dict['param_groups'][{index}]", group.get("second_moment")
    if saved is None:
        raise ValueError(
            f"{where} has no 'second_moment', so adax_triton did not save it and its exp_avg_sq has another meaning; "
            f"{_advice(group, current)}"
        )
    if saved != current:
        convert = _CONVERSIONS.get((saved, current))
        raise ValueError(
            f"{where}['second_moment'] is {saved!r}, but this optimizer uses {current!r}; load it into an optimizer "
            f"with the saved rule{f', or load {convert}(state_dict) instead' if convert else ''}"
        )


def _check_group(saved: Mapping[str, Any], current: Mapping[str, Any], index: int) -> None:
    where = f"state_dict['param_groups'][{index}]"
    missing = [key for key in COEFFICIENT_KEYS if key not in saved and key not in OLD_CHECKPOINT_DEFAULTS]
    if missing:
        raise ValueError(f"{where} has no {', '.join(map(repr, missing))}; its keys are {sorted(map(str, saved))}")
    try:
        validate_group({**current, **with_current_names(saved)})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None


def _check_state(state: Mapping[str, Any], param: Tensor, key: int) -> None:
    where = f"state_dict['state'][{key}]"
    if not {"step", *MOMENTS} <= set(state):
        raise ValueError(f"{where} has keys {sorted(map(str, state))}; expected step, exp_avg, exp_avg_sq")
    checked_count(state["step"], f"{where}['step']")
    names = [name for name in STATE_TENSORS if name in state]
    for name in names:
        if not isinstance(state[name], Tensor):
            raise TypeError(f"{where}[{name!r}] is a {type(state[name]).__name__}; expected a tensor")
    master = state.get("master")
    if (
        master is not None
        and param.dtype in HALF_DTYPES
        and master.is_floating_point() != (param.dtype == torch.float16)
    ):
        raise ValueError(
            f"{where}['master'] is {master.dtype}, which does not belong to a {param.dtype} parameter; transfer the "
            "weights with master_state_dict and load_master_state_dict"
        )
    precision = precision_of(state)
    if is_quantized(precision.states) and splits_code_groups(param):  # a rank cannot dequantize part of a group
        raise ValueError(
            f"{where} has states={precision.states!r}, but the placements {getattr(param, 'placements', None)} of its "
            f"parameter split groups of {GROUP} elements; save the checkpoint with states='float32'"
        )
    if param.dtype not in HALF_DTYPES and master is not None:  # the saved master is not needed
        precision = precision._replace(master_weights=None)
        names.remove("master")
    layouts = state_layouts(param, precision)
    if names != list(layouts):
        saved = f"states={precision.states!r}"
        advice = f"; load it into an optimizer with {saved}, then load its state_dict() into this one"
        raise ValueError(
            f"{where} has keys {sorted(map(str, state))}; {saved} needs {['step', *layouts]}"
            f"{advice if 'group_exponents' in {*layouts} - {*names} else ''}"
        )
    for name, layout in layouts.items():
        _check_tensor(state[name], layout, f"{where}[{name!r}]", param)


def _check_tensor(tensor: Tensor, layout: Layout, where: str, param: Tensor) -> None:
    if tuple(tensor.shape) != layout.stored_shape:
        raise ValueError(
            f"{where} has shape {tuple(tensor.shape)}; expected {layout.stored_shape} for a parameter of shape "
            f"{tuple(param.shape)}"
        )
    if tensor.is_meta or tensor.layout != torch.strided:
        raise ValueError(f"{where} is a {tensor.layout} tensor on {tensor.device}; expected a dense one with values")
    if layout.is_bytes != (tensor.dtype == torch.uint8) or tensor.is_complex() != layout.dtype.is_complex:
        raise TypeError(f"{where} has dtype {tensor.dtype}; expected {layout.stored_dtype}")


def params_with_wrapped_tensors(state: Mapping[Any, Any]) -> Iterable[Tensor]:
    """Yield the parameters with state tensors that are still wrapped."""
    for param, value in state.items():
        if isinstance(value, Mapping) and any(isinstance(item, OpaqueTensor) for item in value.values()):
            yield param


def copy_loaded_state(loaded: Mapping[str, Any], state: dict[str, Any], param: Tensor) -> None:
    """Copy a loaded state into a parameter's state tensors, converting precision.

    Args:
        loaded: the loaded state, with tensors wrapped in `OpaqueTensor`.
        state: the parameter's state; written in place.
        param: the parameter; its weights do not change.
    """
    saved = {name: value.tensor for name, value in loaded.items() if isinstance(value, OpaqueTensor)}
    other_keys = {name: value for name, value in loaded.items() if name not in ("step", *saved)}
    state.update(other_keys)
    step = checked_count(loaded["step"], "state['step']")
    if isinstance(state["step"], Tensor):
        state["step"].fill_(step)  # in place, because a CUDA graph reads this address
    else:
        state["step"] = step
    with torch.no_grad():
        saved = {name: placed_like(tensor, param) for name, tensor in saved.items()}
        if is_quantized(precision_of(saved).states) or is_quantized(precision_of(state).states):
            _copy_quantized(saved, state, param)
        else:
            for name in MOMENTS:
                state[name].copy_(saved[name])
        if "master" in state:
            _copy_master(saved, state, param)


def _copy_quantized(saved: Mapping[str, Tensor], state: Mapping[str, Tensor], param: Tensor) -> None:
    if precision_of(saved).states == precision_of(state).states:
        for name in (*MOMENTS, "group_exponents"):
            state[name].copy_(saved[name])
        return
    numel = local_tensor(param).numel()
    moments = load_moments(*_flat_moments(saved, param.device))
    targets = _flat_moments(state, param.device)
    padding = 0 if targets[2] is None else -numel % GROUP
    first, second = (torch.nn.functional.pad(moment[:numel], (0, padding)) for moment in moments)
    # Round to nearest. This freezes v only if it is done at every step.
    store_moments((first, second), *targets, random=None)
    tensors = local_state_tensors(state)
    for name, target in zip(MOMENTS, targets[:2], strict=True):
        tensors[name].copy_(target[:numel].view(tensors[name].shape))
    if targets[2] is not None:
        tensors["group_exponents"].copy_(targets[2].view(tensors["group_exponents"].shape))


def _flat_moments(state: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return flat copies of m, v and group exponents.

    Codes are padded to full groups.
    """
    flat = {name: tensor.to(device).flatten().clone() for name, tensor in local_state_tensors(state).items()}
    exponents = flat.get("group_exponents")
    first, second = (flat[name] for name in MOMENTS)
    if exponents is not None:
        first, second = (torch.nn.functional.pad(codes, (0, -codes.numel() % GROUP)) for codes in (first, second))
    return first, second, exponents


def _copy_master(saved: Mapping[str, Tensor], state: Mapping[str, Tensor], param: Tensor) -> None:
    given, master = local_state_tensors(saved).get("master"), local_state_tensors(state)["master"]
    if given is None:
        master.copy_(local_tensor(param.detach()) if master.is_floating_point() else torch.zeros_like(master))
    elif given.dtype == master.dtype:
        master.copy_(given)
    elif master.dtype == torch.int16:
        master.copy_(given.to(torch.int16) << 8)
    else:  # round to the nearest int8, clamped so that the parameter's value does not change
        master.copy_(((given.to(torch.int32) + 0x80) >> 8).clamp(-128, 127))
