"""Check the dtype, shape and device of parameters and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .dtensor import finished, is_dtensor, is_supported, splits_code_groups
from .precision import HALF_DTYPES, PARAM_DTYPES, QUANTIZED_FROM_NUMEL, is_quantized


def is_frozen(param: Tensor) -> bool:
    """Return whether a parameter is frozen or still lazy (without a shape)."""
    return not param.requires_grad or is_lazy(param)


def belongs_to_fsdp1(param: Tensor) -> bool:
    """Return whether FSDP1 manages a parameter, even if it does not shard it.

    `FullyShardedDataParallel` marks its flat parameters, and the original ones with `use_orig_params=True`.
    """
    return getattr(param, "_fsdp_flattened", False)


def check_param(
    param: Tensor, name: str, group: Mapping[str, Any], keep_float32: Callable[[Tensor], bool] | None
) -> None:
    """Check that a parameter supports the precision options of its group.

    Args:
        param: the parameter.
        name: name of the parameter in error messages.
        group: its parameter group.
        keep_float32: see `AdaX`.

    Raises:
        TypeError: unsupported dtype or tensor subclass.
        ValueError: the dtype or the sharding does not support the group's precision options.
    """
    if not is_supported(param):  # data_ptr() of a wrapper subclass does not point to its elements
        raise TypeError(f"{name}: tensor subclass {type(param)} is not supported; use a plain tensor or a DTensor")
    if param.dtype.to_real() not in PARAM_DTYPES:
        raise TypeError(f"{name}: dtype {param.dtype} is not supported; use float32, bfloat16, float16 or float64")
    if param.dtype == torch.float16 and group["master_weights"] == "24bit":
        raise ValueError(
            f"{name}: master_weights='24bit' supports only bfloat16 parameters; for float16 use "
            "master_weights='float32'"
        )
    if param.dtype == torch.float16 and group["weight_rounding"] == "stochastic":
        raise ValueError(
            f"{name}: weight_rounding='stochastic' supports only bfloat16 parameters; for float16 use "
            "master_weights='float32'"
        )
    if belongs_to_fsdp1(param):
        _check_fsdp1(param, name, group)
    if param.numel() < QUANTIZED_FROM_NUMEL or group["states"] == "float32" or (keep_float32 and keep_float32(param)):
        return
    if param.is_complex() or param.dtype == torch.float64:
        raise ValueError(
            f"{name}: states={group['states']!r} does not support {param.dtype} parameters; return True from "
            "keep_float32 for this parameter"
        )
    if is_quantized(group["states"]) and splits_code_groups(param):
        raise ValueError(
            f"{name}: states={group['states']!r} needs shards of whole rows, with a multiple of 32 elements per row; "
            f"got shape {tuple(param.shape)} and placements {getattr(param, 'placements', None)}; return True from "
            "keep_float32 for this parameter"
        )


def _check_fsdp1(param: Tensor, name: str, group: Mapping[str, Any]) -> None:
    # FSDP1 gathers states that have shape and dtype in common on all ranks. Codes have other shapes than their
    # parameter, and a rank keeps float32 states for a small shard.
    for option, plain in (("states", "float32"), ("master_weights", None)):
        if group[option] != plain and (option == "states" or param.dtype in HALF_DTYPES):
            raise ValueError(
                f"{name}: FSDP1 (FullyShardedDataParallel) does not support {option}={group[option]!r}; use FSDP2 "
                f"(fully_shard) or {option}={plain!r}"
            )


def checked_gradient(param: Tensor) -> Tensor:
    """Check a parameter's gradient and return it dense.

    Lazy conj and neg are applied.

    Raises:
        TypeError, ValueError: its dtype, shape or device does not match the parameter.
    """
    assert param.grad is not None
    grad = finished(param.grad)
    if grad.shape != param.shape:
        raise ValueError(f"grad has shape {tuple(grad.shape)}; expected the parameter's shape {tuple(param.shape)}")
    if is_dtensor(grad) != is_dtensor(param):  # torch allows this, but the local shapes differ
        raise TypeError(
            f"grad is a {type(grad).__name__}, but the parameter is a {type(param.data).__name__}; shard both alike"
        )
    if not is_supported(grad):
        raise TypeError(
            f"grad is a {type(grad).__name__}, which wraps other tensors; expected a plain tensor or DTensor"
        )
    if grad.device != param.device:
        raise ValueError(f"grad is on {grad.device}; expected the parameter's device {param.device}")
    if grad.is_complex() != param.is_complex() or not (grad.is_complex() or grad.is_floating_point()):
        raise TypeError(
            f"grad has dtype {grad.dtype} but the parameter has {param.dtype}; expected both real or both complex"
        )
    if grad.dtype.to_real() not in PARAM_DTYPES:
        raise TypeError(f"grad has dtype {grad.dtype}; expected float32, bfloat16, float16 or float64")
    # Every step updates every element, so a sparse gradient is a dense one with zeros.
    dense = grad if grad.layout == torch.strided else grad.to_dense()
    # The kernel reads raw memory, so resolve lazy conjugation and negation first.
    return dense.resolve_conj().resolve_neg() if dense.is_conj() or dense.is_neg() else dense
