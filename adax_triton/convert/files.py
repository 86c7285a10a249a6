"""Convert optimizer state dicts in files to another optimizer or precision.

The keys of the param_groups tell which optimizer saved a state dict. Groups of this package have `second_moment`.
Groups of torch's or DeepSpeed's Adam have `amsgrad` or `bias_correction`. All others are taken to be groups of the
paper's released code. No model is needed.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeGuard

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

# "torch-" and "released-" mean torch's optimizers and the paper's code. A final w means decoupled weight decay.
OPTIMIZER_KINDS = ("adax", "adaxw", "adam", "adamw", "torch-adam", "torch-adamw", "released-adax", "released-adaxw")

# (total units, label) -> context manager that yields advance(units, text); such as bench.harness.progress.progress.
Progress = Callable[[int, str], AbstractContextManager[Callable[[int, str], None]]]


def convert_file(
    source: Path, target: Path, key: str | None, convert: Callable[[dict[str, Any]], dict[str, Any]], progress: Progress
) -> str:
    """Convert a file and return a summary line.

    Args:
        source: file that `torch.load(weights_only=True)` reads.
        target: file to write; appears when it is complete.
        key: key in the file's dictionary of the state dict, or of a list of state dicts, which are all converted.
            None if the file holds the state dict itself.
        convert: converts the state dict.
        progress: shows the progress.

    Raises:
        ValueError: the file holds no state dict, or not under `key`.
        ValueError, TypeError: a state dict cannot be converted. For a list the message names its index.
    """
    with progress(3, "convert") as advance:
        with reject_unsafe_pickles(source):
            saved = torch.load(source, map_location="cpu", weights_only=True)
        advance(1, "read")
        found = _find(saved, source, key)
        converted = _convert_list(found, f"{source}[{key!r}]", convert) if isinstance(found, list) else convert(found)
        advance(1, "converted")
        part = target.with_name(f"{target.name}.part")
        try:
            torch.save(converted if key is None else {**saved, key: converted}, part)
            os.rename(part, target)
        finally:
            part.unlink(missing_ok=True)
        advance(1, "written")
    written = converted if isinstance(converted, list) else [converted]
    states, groups = (sum(len(item[name]) for item in written) for name in ("state", "param_groups"))
    return f"{target}: {states} states in {groups} groups"


def _convert_list(
    state_dicts: list[dict[str, Any]], where: str, convert: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[dict[str, Any]]:
    converted = []
    for index, state_dict in enumerate(state_dicts):
        try:
            converted.append(convert(state_dict))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}[{index}]: {error}") from None
    return converted


@contextmanager
def reject_unsafe_pickles(path: Path) -> Iterator[None]:
    """Turn failures of `torch.load(weights_only=True)` into a ValueError that names the file."""
    try:
        yield
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        raise ValueError(
            f"{path} cannot be loaded by torch.load(weights_only=True): it is damaged, or holds objects other than "
            "tensors and plain values; save it again with tensors and plain values only"
        ) from None


def _find(saved: Any, source: Path, key: str | None) -> dict[str, Any] | list[dict[str, Any]]:
    """Return the state dict of a file, or Lightning's list of them."""
    if not isinstance(saved, dict):
        raise ValueError(f"{source} holds a {type(saved).__name__}; expected a dictionary")
    found = saved if key is None else saved.get(key)
    if _is_state_dict(found) or _are_state_dicts(found):
        return found
    keys = [name for name, value in saved.items() if _is_state_dict(value) or _are_state_dicts(value)]
    where = f"{source}[{key!r}]" if key is not None else str(source)
    advice = f"give --key {' or '.join(map(str, keys))}" if keys else "pass a file that holds optimizer.state_dict()"
    raise ValueError(f"{where} is not the state dict of an optimizer; {advice}")


def _is_state_dict(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict) and {"state", "param_groups"} <= set(value)


def _are_state_dicts(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and bool(value) and all(map(_is_state_dict, value))


def convert_optimizer(
    state_dict: Mapping[str, Any], kind: str, *, beta2: float | None = None, lr: float | None = None
) -> dict[str, Any]:
    """Convert a state dict to another optimizer; `state_dicts` has the formulas.

    Between Adam and AdaX the result is a warm start, and `kind` chooses coupled or decoupled weight decay. All other
    conversions continue training with the same numbers; for them `kind` must keep the weight decay of the source.

    Args:
        state_dict: of this package, of torch's or DeepSpeed's Adam, or of the paper's released code.
        kind: target optimizer, one of `OPTIMIZER_KINDS`.
        beta2: betas[1] of the result, if the rule changes. Default: 1e-4 for AdaX, 0.999 for Adam.
        lr: learning rate of all groups of the result. Default: None, keep those of the state dict.

    Raises:
        ValueError, TypeError: the state dict cannot be converted to `kind`.
    """
    decoupled, rule = kind.endswith("w"), kind.rstrip("w").rpartition("-")[2]
    converted = _from_any_optimizer(state_dict, decoupled)
    if {group["second_moment"] for group in converted["param_groups"]} != {rule}:
        convert = {"adax": adax_from_adam, "adam": adam_from_adax}[rule]
        converted = convert(converted) if beta2 is None else convert(converted, beta2=beta2)
        for group in converted["param_groups"]:
            group["decoupled_weight_decay"] = decoupled
    elif beta2 is not None:
        raise ValueError(f"beta2={beta2} applies only if the rule changes, but the state dict has {rule!r}; omit beta2")
    for index, group in enumerate(converted["param_groups"]):
        if group["decoupled_weight_decay"] != decoupled:
            raise ValueError(
                f"param_groups[{index}] has decoupled_weight_decay={not decoupled}; convert it to "
                f"{kind.rstrip('w') if decoupled else kind + 'w'!r}"
            )
        if lr is not None:
            group["lr"] = lr
    if kind.startswith("torch-"):
        return to_torch_adam(converted)
    return to_released_adax(converted) if kind.startswith("released-") else converted


def _from_any_optimizer(state_dict: Mapping[str, Any], decoupled: bool) -> dict[str, Any]:
    """Return a state dict of this package.

    `decoupled` is used if the groups lack the key `decoupled_weight_decay`.
    """
    groups = state_dict["param_groups"]
    if all("second_moment" in group for group in groups):
        return {**state_dict, "param_groups": [dict(group) for group in groups]}
    if all("amsgrad" in group or "bias_correction" in group for group in groups):
        needs_argument = any("decoupled_weight_decay" not in group for group in groups)
        return from_torch_adam(state_dict, decoupled_weight_decay=decoupled if needs_argument else None)
    return from_released_adax(state_dict, decoupled_weight_decay=decoupled)


def convert_precision(
    state_dict: Mapping[str, Any], *, states: str | None = None, master_weights: str | None = None
) -> dict[str, Any]:
    """Convert states or masters of a state dict to another precision.

    The result equals what an optimizer of that precision would load. Values are exact if the new format can represent
    them, else rounded to nearest.

    Args:
        state_dict: of an optimizer of this package.
        states: one of `precision.STATES`. Default: None, keep the states.
        master_weights: one of `precision.MASTER_WEIGHTS`, for a state dict that has masters. Adding or removing masters
            needs the model's weights and is not supported. Default: None, keep the masters.

    Raises:
        ValueError: another package saved the state dict, or `master_weights` is given but the state dict has no
            masters.
    """
    groups = [with_current_names(group) for group in state_dict["param_groups"]]
    if not all("second_moment" in group for group in groups):
        raise ValueError("states and master_weights need a state dict of adax_triton; convert it to adax or adam first")
    if master_weights is not None and not all(group.get("master_weights") for group in groups):
        raise ValueError(
            f"master_weights={master_weights!r}: the state dict has no masters, and adding them needs the model's "
            "weights; load it into an optimizer with master_weights set"
        )
    changes = {"states": states, "master_weights": master_weights}
    changes = {key: value for key, value in changes.items() if value is not None}
    saved = state_dict["state"]
    dummies = {key: _dummy_param(saved.get(key) or {}) for group in groups for key in group["params"]}
    new_groups = []
    for group in groups:
        kept = {key: group[key] for key in HYPERPARAMETERS if key in group and key != "capturable"}
        new_groups.append({**kept, **changes, "params": [dummies[key] for key in group["params"]]})
    exceptions = {
        id(dummies[key]) for group in groups for key in group["params"] if _is_float32_exception(saved.get(key), group)
    }
    optimizer = AdaX(new_groups, keep_float32=lambda param: id(param) in exceptions)
    optimizer.load_state_dict({"state": state_dict["state"], "param_groups": groups})
    keys = list(dummies)
    loaded = {keys[index]: state for index, state in optimizer.state_dict()["state"].items()}
    return {**state_dict, "state": loaded, "param_groups": [{**group, **changes} for group in groups]}


def _is_float32_exception(state: Mapping[str, Any] | None, group: Mapping[str, Any]) -> bool:
    """Return whether a state is float32 although its group uses another precision."""
    if not state or group.get("states", "float32") == "float32":
        return False
    return precision_of(state).states == "float32"


def _dummy_param(state: Mapping[str, Any]) -> nn.Parameter:
    """Return a zero parameter whose shape and dtype match a state."""
    moment, master = state.get("exp_avg", torch.empty(0)), state.get("master")
    if moment.dtype == torch.uint8:  # quantized: the bytes of each integer are the last dimension
        moment = moment[..., 0]
    dtype = moment.dtype
    if master is not None:
        dtype = torch.float16 if master.is_floating_point() else torch.bfloat16
    elif not dtype.is_complex and dtype != torch.float64:
        dtype = torch.float32
    return nn.Parameter(torch.zeros_like(moment, dtype=dtype))
