"""State dicts in files, converted to another optimizer or precision without a model.

What a state dict is, its groups say: those of this package name their rule, those of torch's and DeepSpeed's Adam have
`amsgrad` or `bias_correction`, and those of the program released with the paper have neither.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adax_triton.optimizers import AdaX
from adax_triton.state.precision import precision_of
from adax_triton.state.validation import with_current_names

from .state_dicts import (
    HYPERPARAMETERS,
    adam_from_adax,
    adax_from_adam,
    from_released_adax,
    from_torch_adam,
    to_released_adax,
    to_torch_adam,
)

FORMS = ("adax", "adaxw", "adam", "adamw", "torch-adam", "torch-adamw", "released-adax", "released-adaxw")

# Of units of work and a label; yields what is called with units done and what is done now: `bench.progress.progress`.
Progress = Callable[[int, str], AbstractContextManager[Callable[[int, str], None]]]


@contextmanager
def reject_unsafe_pickles(path: Path) -> Iterator[None]:
    """Within the block, what `torch.load(weights_only=True)` cannot read is a ValueError that names the file."""
    try:
        yield
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain values, which torch.load(weights_only=True) "
            "does not read"
        ) from None


def convert_optimizer(
    state_dict: Mapping[str, Any], form: str, *, beta2: float | None = None, lr: float | None = None
) -> dict[str, Any]:
    """Return a state dict as one of another optimizer; see `conversion` for what becomes of moments.

    Between Adam and AdaX it is a start, not the same optimizer, and the form's weight decay is taken, coupled or
    decoupled. Otherwise the run goes on with the same numbers, and a form of other weight decay is refused.

    Args:
        state_dict: of an optimizer of this package, of torch's Adam or AdamW, or of the paper's program.
        form: one of `FORMS`: of this package, of torch, or of the paper's program; with a w, of decoupled weight decay.
        beta2: betas[1] of the result, if the rule changes. Default: 1e-4 for AdaX, 0.999 for Adam.
        lr: learning rate of all groups of the result. Default: None, those of the state dict.

    Raises:
        ValueError, TypeError: it does not fit the form.
    """
    decoupled, rule = form.endswith("w"), form.rstrip("w").rpartition("-")[2]
    own = _as_own(state_dict, decoupled)
    if {group["second_moment"] for group in own["param_groups"]} != {rule}:
        convert = {"adax": adax_from_adam, "adam": adam_from_adax}[rule]
        own = convert(own) if beta2 is None else convert(own, beta2=beta2)
        for group in own["param_groups"]:
            group["decoupled_weight_decay"] = decoupled
    elif beta2 is not None:
        raise ValueError(f"beta2={beta2}: the state dict is of the rule {rule!r} already, and keeps its betas")
    for index, group in enumerate(own["param_groups"]):
        if group["decoupled_weight_decay"] != decoupled:
            raise ValueError(
                f"param_groups[{index}] has decoupled_weight_decay={not decoupled}; convert it to the form "
                f"{form.rstrip('w') if decoupled else form + 'w'!r}"
            )
        if lr is not None:
            group["lr"] = lr
    if form.startswith("torch-"):
        return to_torch_adam(own)
    return to_released_adax(own) if form.startswith("released-") else own


def _as_own(state_dict: Mapping[str, Any], decoupled: bool) -> dict[str, Any]:
    groups = state_dict["param_groups"]
    if all("second_moment" in group for group in groups):
        return {**state_dict, "param_groups": [dict(group) for group in groups]}
    if all("amsgrad" in group or "bias_correction" in group for group in groups):
        unsaid = any("decoupled_weight_decay" not in group for group in groups)
        return from_torch_adam(state_dict, decoupled_weight_decay=decoupled if unsaid else None)
    return from_released_adax(state_dict, decoupled_weight_decay=decoupled)


def convert_precision(
    state_dict: Mapping[str, Any], *, states: str | None = None, master_weights: str | None = None
) -> dict[str, Any]:
    """Return a state dict of this package with its states or masters kept otherwise.

    As an optimizer of that precision would load it: exactly where the new form can hold the old, else to nearest.

    Args:
        state_dict: of an optimizer of this package.
        states: one of `precision.STATES`. Default: None, as they are.
        master_weights: one of `precision.MASTER_WEIGHTS`, for a state dict that has masters; making and giving up
            masters takes the weights themselves. Default: None, as they are.

    Raises:
        ValueError: it is of another program, or has no masters.
    """
    groups = [with_current_names(group) for group in state_dict["param_groups"]]
    if not all("second_moment" in group for group in groups):
        raise ValueError("only a state dict of adax_triton can be kept in another precision; convert it to one first")
    if master_weights is not None and not all(group.get("master_weights") for group in groups):
        raise ValueError(
            f"master_weights={master_weights!r}: the state dict has no masters, and making them takes the weights; "
            "load it as it is into an optimizer with master_weights, which does that"
        )
    changes = {"states": states, "master_weights": master_weights}
    changes = {key: value for key, value in changes.items() if value is not None}
    saved = state_dict["state"]
    stand_ins = {key: _stand_in(saved.get(key) or {}) for group in groups for key in group["params"]}
    own_groups = []
    for group in groups:
        kept = {key: group[key] for key in HYPERPARAMETERS if key in group and key != "capturable"}
        own_groups.append({**kept, **changes, "params": [stand_ins[key] for key in group["params"]]})
    in_full = {
        id(stand_ins[key]) for group in groups for key in group["params"] if _kept_in_full(saved.get(key), group)
    }
    optimizer = AdaX(own_groups, keep_float32=lambda param: id(param) in in_full)
    optimizer.load_state_dict({"state": state_dict["state"], "param_groups": groups})
    keys = list(stand_ins)
    loaded = {keys[index]: state for index, state in optimizer.state_dict()["state"].items()}
    return {**state_dict, "state": loaded, "param_groups": [{**group, **changes} for group in groups]}


def _kept_in_full(state: Mapping[str, Any] | None, group: Mapping[str, Any]) -> bool:
    if not state or group.get("states", "float32") == "float32":
        return False
    return precision_of(state).states == "float32"  # by keep_float32, or because it is small


def _stand_in(state: Mapping[str, Any]) -> nn.Parameter:
    """Return a parameter of zeros that a state fits."""
    moment, master = state.get("exp_avg", torch.empty(0)), state.get("master")
    if moment.dtype == torch.uint8:  # codes
        moment = moment[..., 0]
    dtype = moment.dtype
    if master is not None:
        dtype = torch.float16 if master.is_floating_point() else torch.bfloat16
    elif not dtype.is_complex and dtype != torch.float64:
        dtype = torch.float32
    return nn.Parameter(torch.zeros_like(moment, dtype=dtype))
