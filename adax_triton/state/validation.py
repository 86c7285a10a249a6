"""Validate the hyper-parameters of a parameter group."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch

from adax_triton.update.coefficients import EPS_PLACEMENTS, LARGEST_ADAX_BETA2, SECOND_MOMENTS

from .precision import MASTER_WEIGHTS, STATES, WEIGHT_ROUNDINGS

# Each rule reads betas[1] differently. AdaX's default 1e-4 lies outside the ranges of Adam and AdaFactor, and their
# usual values lie outside AdaX's.
_SMALLEST_DECAY = 0.01
# Defaults for keys that older checkpoints and pickles lack.
OLD_CHECKPOINT_DEFAULTS: dict[str, Any] = {
    "decoupled_weight_decay": False,
    "maximize": False,
    "states": "float32",
    "master_weights": None,
    "weight_rounding": "nearest",
    "seed": 0,
    "capturable": False,
}
# Old values of `states` in checkpoints -> current values.
_RENAMED_STATES = {"low": "8bit_v16", "lowest": "8bit"}


def with_current_names(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved parameter group with the current names of its values."""
    states = group.get("states")
    return {**group, "states": _RENAMED_STATES[states]} if states in _RENAMED_STATES else dict(group)


def as_float(value: float | torch.Tensor, name: str) -> float:
    """Return a hyper-parameter as a Python float.

    The host waits for a CUDA tensor.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is a tensor with more or fewer than one element.
    """
    if type(value) is float:  # the common case at each step
        return value
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
        return float(value.item())
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"Invalid type of {name}: expected a number or a 1-element tensor, got {value!r}")
    return float(value)


def validate_group(group: Mapping[str, Any]) -> None:
    """Check the hyper-parameters of a complete parameter group.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range, or belongs to another rule.
    """
    _check_non_negative(group["lr"], "lr", "learning rate")
    _check_non_negative(group["eps"], "eps", "epsilon value")
    _check_non_negative(group["weight_decay"], "weight_decay", "weight_decay value")
    for name in ("decoupled_weight_decay", "maximize", "capturable"):
        if not isinstance(group[name], bool):
            raise TypeError(f"Invalid type of {name}: expected True or False, got {group[name]!r}")
    _check_choice(group["second_moment"], "second_moment", SECOND_MOMENTS)
    _check_choice(group["eps_placement"], "eps_placement", EPS_PLACEMENTS)
    _check_precision(group)
    _check_betas(group["betas"], group["second_moment"], group["eps_placement"])


def check_changed_betas(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Check betas written into the groups since `validate_group`.

    Each step calls it. Tensors are not checked, because the host would wait for a GPU.

    Raises:
        TypeError, ValueError: as `validate_group`.
    """
    for index, group in enumerate(param_groups):
        betas, rule = group["betas"], (group["second_moment"], group["eps_placement"])
        kinds = set(map(type, (*betas, *rule))) if isinstance(betas, (tuple, list)) else {type(betas)}
        try:
            if kinds == {float, str}:
                _check_rule_once(tuple(betas), *rule)
            elif kinds != {torch.Tensor, str}:
                _check_rule(betas, *rule)
        except (TypeError, ValueError) as error:
            raise type(error)(f"param_groups[{index}]: {error}") from None


def _check_non_negative(value: float | torch.Tensor, name: str, title: str) -> None:
    number = as_float(value, name)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"Invalid {title}: {number}; expected {name} finite and >= 0")


def _check_choice(value: str, name: str, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"Invalid type of {name}: expected one of {choices}, got {value!r}")
    if value not in choices:
        raise ValueError(f"Invalid {name}: {value!r}; expected one of {choices}")


def _check_precision(group: Mapping[str, Any]) -> None:
    states = group["states"]
    if isinstance(states, str) and states in _RENAMED_STATES:
        raise ValueError(f"Invalid states: {states!r}; it was renamed, use {_RENAMED_STATES[states]!r}")
    _check_choice(states, "states", STATES)
    _check_choice(group["weight_rounding"], "weight_rounding", WEIGHT_ROUNDINGS)
    master_weights, seed = group["master_weights"], group["seed"]
    if master_weights is not None:
        _check_choice(master_weights, "master_weights", MASTER_WEIGHTS)
        if group["weight_rounding"] == "stochastic":
            raise ValueError(
                f"Invalid weight_rounding: 'stochastic' with master_weights={master_weights!r}; master weights keep "
                "the bits that rounding loses, use weight_rounding='nearest'"
            )
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"Invalid type of seed: expected an int, got {seed!r}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"Invalid seed: {seed}; expected 0 <= seed < 2^32")


def _check_betas(betas: Any, second_moment: str, eps_placement: str) -> None:
    if not isinstance(betas, (tuple, list)):
        raise TypeError(f"Invalid type of betas: expected a pair of numbers, got {betas!r}")
    if len(betas) != 2:
        raise ValueError(f"Invalid length of betas: expected a pair of numbers, got {betas!r}")
    if isinstance(betas[0], torch.Tensor) != isinstance(betas[1], torch.Tensor):
        raise ValueError(f"betas must be either both floats or both Tensors, got {betas!r}")
    beta1, beta2 = (as_float(beta, f"betas[{index}]") for index, beta in enumerate(betas))
    if not 0.0 <= beta1 < 1.0:
        raise ValueError(f"Invalid beta parameter at index 0: {beta1}; expected 0 <= betas[0] < 1")
    _check_beta2(beta1, beta2, second_moment)
    if eps_placement == "unnormalized" and second_moment == "adafactor":
        raise ValueError(
            "Invalid eps_placement: 'unnormalized'; second_moment='adafactor' has no raw moment, use 'normalized'"
        )
    if eps_placement == "unnormalized" and second_moment == "adax" and beta2 == 0.0:
        raise ValueError(
            "Invalid eps_placement: 'unnormalized'; AdaX's bias factor is 0 at betas[1]=0.0, use 'normalized'"
        )


def _check_rule(betas: Any, second_moment: str, eps_placement: str) -> None:
    _check_choice(second_moment, "second_moment", SECOND_MOMENTS)
    _check_choice(eps_placement, "eps_placement", EPS_PLACEMENTS)
    _check_betas(betas, second_moment, eps_placement)


_check_rule_once = functools.lru_cache(maxsize=128)(_check_rule)  # errors are not cached


def _check_beta2(beta1: float, beta2: float, second_moment: str) -> None:
    title = f"Invalid beta parameter at index 1: {beta2};"
    if second_moment == "adax":
        if not 0.0 <= beta2 <= LARGEST_ADAX_BETA2:
            raise ValueError(
                f"{title} AdaX's betas[1] is the growth rate of its memory, at most {LARGEST_ADAX_BETA2}; pass "
                f"betas=({beta1}, 1e-4), or use AdamW of adax_triton for Adam's decay"
            )
    elif second_moment == "adam":
        if not 0.0 <= beta2 < 1.0:
            raise ValueError(f"{title} Adam's betas[1] is a decay, expected 0 <= betas[1] < 1")
        if 0.0 < beta2 < _SMALLEST_DECAY:
            raise ValueError(
                f"{title} Adam's betas[1] is a decay near 1; pass betas=({beta1}, 0.999), or use AdaX or AdaXW for a "
                "growth rate such as 1e-4"
            )
    elif not _SMALLEST_DECAY <= beta2 <= 1.0:
        raise ValueError(
            f"{title} for second_moment='adafactor' betas[1] is the exponent c of w_t = t^-c, expected "
            f"{_SMALLEST_DECAY} <= c <= 1 (AdaFactor uses 0.8); 1e-4 is AdaX's growth rate"
        )
