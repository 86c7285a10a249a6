"""Keyword arguments of the optimizers' constructors."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, MutableMapping
from typing import Any, TypedDict

from torch import Tensor

# Keyword arguments of torch's optimizers. They select torch's implementation, so most values change nothing here. The
# text says why True is not supported.
_TORCH_KEYWORDS = {
    "amsgrad": "AMSGrad is not supported",
    "differentiable": "autograd cannot differentiate a fused step",
    "foreach": None,
    "fused": None,
}


class SharedOptions(TypedDict, total=False):
    """Keyword arguments that every optimizer takes; `AdaX` describes them."""

    maximize: bool
    states: str
    master_weights: str | None
    weight_rounding: str
    seed: int
    keep_float32: Callable[[Tensor], bool] | None
    capturable: bool
    max_grad_norm: float | None
    error_if_nonfinite: bool
    norm_process_group: Any
    telemetry: bool
    fused: bool | None
    foreach: bool | None
    amsgrad: bool
    differentiable: bool


def signature_with_shared_options(optimizer_class: type, base: type) -> inspect.Signature:
    """Return a class's signature with the shared options listed.

    `help()` and callers that inspect the signature then see them.

    Args:
        optimizer_class: its constructor may take `**options: Unpack[SharedOptions]`.
        base: the class whose constructor names each shared option.
    """
    shared = inspect.signature(base.__init__).parameters  # type: ignore[misc]
    own = inspect.signature(optimizer_class.__init__)  # type: ignore[misc]
    listed = []
    for parameter in list(own.parameters.values())[1:]:
        if parameter.annotation == "Unpack[SharedOptions]":
            listed += [shared[name] for name in SharedOptions.__annotations__ if name not in own.parameters]
        else:
            listed.append(parameter)
    return own.replace(parameters=listed)


def check_keywords(options: SharedOptions, optimizer_class: type, base: type) -> None:
    """Raise for a keyword argument that is not a shared option.

    Python's error would name a base class.

    Args:
        options: the keyword arguments.
        optimizer_class: the optimizer's class.
        base: the class of this package that it is, or that it extends.

    Raises:
        TypeError: the message names the class and the nearest argument.
    """
    unknown = [key for key in options if key not in SharedOptions.__annotations__]
    if unknown:
        raise TypeError(
            f"{optimizer_class.__name__}() got an unexpected keyword argument {unknown[0]!r}; "
            f"{_advice(unknown[0], optimizer_class, base)}"
        )


def _advice(given: str, optimizer_class: type, base: type) -> str:
    name = optimizer_class.__name__
    found = [*inspect.signature(optimizer_class).parameters.values(), *inspect.signature(base).parameters.values()]
    accepted = list(dict.fromkeys(one.name for one in found if one.name != "params" and one.kind != one.VAR_KEYWORD))
    if given == "decoupled_weight_decay":
        return f"{name} always decouples weight decay; remove it, or use {base.__name__.removesuffix('W')}"
    if nearest := difflib.get_close_matches(given, accepted, n=1, cutoff=0.7):
        return f"did you mean {nearest[0]!r}?"
    return f"it accepts {', '.join(accepted)}"


def remove_torch_keywords(given: MutableMapping[str, Any]) -> None:
    """Check and remove torch's keyword arguments, which select torch's implementation.

    Args:
        given: keyword arguments or a parameter group.

    Raises:
        TypeError: a value is not True, False or None.
        ValueError: `amsgrad` or `differentiable` is True.
    """
    for name, problem in _TORCH_KEYWORDS.items():
        value = given.pop(name, None)
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"Invalid type of {name}: expected True or False, got {value!r}")
        if value and problem is not None:
            raise ValueError(f"Invalid {name}: True; {problem}, remove it")
