"""The way every conversion of a state dict takes: what it must hold, and moments multiplied or divided by a factor."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adax_triton.state.step_counts import checked_count
from adax_triton.state.validation import OLD_CHECKPOINT_DEFAULTS, as_float, validate_group, with_current_names

FOREIGN_KEYS = ("lr", "betas", "eps", "weight_decay")
NEEDED_KEYS = (*FOREIGN_KEYS, "second_moment", "eps_placement")
TORCH_OPTIONS = {"amsgrad": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None}
HYPERPARAMETERS = (*NEEDED_KEYS, *OLD_CHECKPOINT_DEFAULTS)
_STATE_KEYS = ("step", "exp_avg", "exp_avg_sq")
ConvertGroup = Callable[[Mapping[str, Any], str], dict[str, Any]]  # a group, and how messages name it


class MomentConversion(NamedTuple):
    """How the moments of one state become those of another."""

    factors: Callable[[float, float, int], tuple[float, float]]  # of (b1, b2, t), for exp_avg and exp_avg_sq
    combine: Callable[[Any, Any], Any]  # truediv or mul
    raw_adax: bool = False  # one side is AdaX's raw moment, which overflows
    count: Callable[[int], Any] = int  # what the other program keeps as step


def checked_group(group: Mapping[str, Any], where: str, only: dict[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of a group of this package; `only` is what the other side can express."""
    own = {
        **OLD_CHECKPOINT_DEFAULTS,
        **{key: value for key, value in with_current_names(group).items() if key in HYPERPARAMETERS},
    }
    try:
        validate_group(own)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None
    for key, value in only.items():
        if own[key] != value:
            raise ValueError(f"{where}[{key!r}] is {own[key]!r}; this conversion is for {value!r} only")
    return own


def other_keys(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a group says beside hyper-parameters and torch's choices of implementation."""
    return {key: value for key, value in group.items() if key not in HYPERPARAMETERS and key not in TORCH_OPTIONS}


def _require_keys(given: Any, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{where} is a {type(given).__name__}; expected a dict")
    missing = [key for key in keys if key not in given]
    if missing:
        raise ValueError(f"{where} has no {', '.join(map(repr, missing))}; its keys are {sorted(map(str, given))}")


def convert_state_dict(
    state_dict: Mapping[str, Any], needed: tuple[str, ...], convert_group: ConvertGroup, rule: MomentConversion
) -> dict[str, Any]:
    """Return a state dict with other groups and moments; everything is checked before anything is computed.

    Args:
        state_dict: of any program.
        needed: keys that each of its groups must have.
        convert_group: returns a group of the result.
        rule: by which moments are converted.

    Raises:
        ValueError, TypeError: it does not fit; see the functions of `conversion`.
    """
    _require_keys(state_dict, ("state", "param_groups"), "state_dict")
    groups, betas_of = [], {}
    for index, group in enumerate(state_dict["param_groups"]):
        where = f"state_dict['param_groups'][{index}]"
        _require_keys(group, ("params", *needed), where)
        groups.append(convert_group(group, where))
        betas_of.update(dict.fromkeys(group["params"], group["betas"]))
    states = {key: (state, f"state_dict['state'][{key!r}]") for key, state in state_dict["state"].items()}
    for key, (state, where) in states.items():
        if key not in betas_of:
            raise ValueError(f"{where} is of no parameter of state_dict['param_groups']")
        _check_state(state, where, rule)
    new_states = {key: _converted_state(*states[key], betas_of[key], rule) if states[key][0] else {} for key in states}
    others = copy.deepcopy({key: state_dict[key] for key in state_dict if key not in ("state", "param_groups")})
    return {**others, "state": new_states, "param_groups": groups}


def _check_state(state: Any, where: str, rule: MomentConversion) -> None:
    if state == {}:  # a parameter that has had no gradient
        return
    _require_keys(state, _STATE_KEYS, where)
    advice = "save it first from an optimizer with states='float32' and no master_weights"
    if len(state) > len(_STATE_KEYS):
        raise ValueError(f"{where} has keys {sorted(map(str, state))}; expected {list(_STATE_KEYS)}; {advice}")
    checked_count(state["step"], f"{where}['step']")
    for name in _STATE_KEYS[1:]:
        if not isinstance(state[name], Tensor):
            raise TypeError(f"{where}[{name!r}] is a {type(state[name]).__name__}; expected a tensor")
        if not (state[name].is_floating_point() or state[name].is_complex()):
            raise ValueError(f"{where}[{name!r}] is of {state[name].dtype}; {advice}")
        if rule.raw_adax and state[name].is_complex():
            raise ValueError(f"{where}[{name!r}] is complex, where the released program's moments mean something else")


def _converted_state(state: Mapping[str, Any], where: str, betas: Any, rule: MomentConversion) -> dict[str, Any]:
    step = int(state["step"])
    beta1, beta2 = (as_float(beta, "betas") for beta in betas)
    # Moments of no step are zeros on both sides, and so is the bias factor.
    factors = rule.factors(beta1, beta2, step) if step else (1.0, 1.0)
    exp_avg = _scaled(state["exp_avg"], factors[0], rule.combine)
    exp_avg_sq = _scaled(state["exp_avg_sq"], factors[1], rule.combine)
    if rule.raw_adax and not (state["exp_avg_sq"].isfinite().all() and exp_avg_sq.isfinite().all()):
        last = math.log(torch.finfo(exp_avg_sq.dtype).max) / math.log1p(beta2)
        growth = f"it grows as (1 + {beta2})^t, which leaves {exp_avg_sq.dtype} at about step {last:.0f}"
        raise ValueError(f"{where}['exp_avg_sq']: the raw moment of step {step} is not finite; {growth}")
    return {"step": rule.count(step), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def _scaled(moment: Tensor, factor: float, combine: Callable[[Any, Any], Any]) -> Tensor:
    values = torch.view_as_real(moment.detach()) if moment.is_complex() else moment.detach()
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    scaled = combine(values.to(torch.float64), factor).to(dtype)
    return torch.view_as_complex(scaled) if moment.is_complex() else scaled
