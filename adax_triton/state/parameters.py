"""What a parameter and its gradient may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .dtensor import is_sharded, is_supported, splits_groups
from .precision import PARAM_DTYPES, QUANTIZED_FROM_NUMEL, is_quantized


def is_frozen(param: Tensor) -> bool:
    """Whether a parameter has nothing to check yet: it is not trained, or its module has not seen an input."""
    return not param.requires_grad or is_lazy(param)


def check_param(
    param: Tensor, name: str, group: Mapping[str, Any], keep_float32: Callable[[Tensor], bool] | None
) -> None:
    """Check that a parameter can be stepped, and its states and weights kept as its group says.

    Args:
        param: the parameter.
        name: of the parameter, for messages.
        group: its group.
        keep_float32: see `AdaX`.

    Raises:
        TypeError: a dtype or kind for which there is no step.
        ValueError: its precision cannot be what the group asks for.
    """
    if not is_supported(param):  # its data_ptr() is not that of its elements
        raise TypeError(f"{name}: no step for {type(param)}, which wraps the tensors that hold its elements")
    if param.dtype.to_real() not in PARAM_DTYPES:
        raise TypeError(f"{name}: no step for dtype {param.dtype}; expected float32, bfloat16, float16 or float64")
    if param.dtype == torch.float16 and group["master_weights"] == "24bit":
        raise ValueError(
            f"{name}: master_weights='24bit' is the upper bits of a bfloat16 parameter's master; for float16 "
            "use master_weights='float32'"
        )
    if param.dtype == torch.float16 and group["weight_rounding"] == "stochastic":
        raise ValueError(
            f"{name}: weight_rounding='stochastic' is for bfloat16; for float16 use master_weights='float32'"
        )
    if param.numel() < QUANTIZED_FROM_NUMEL or group["states"] == "float32" or (keep_float32 and keep_float32(param)):
        return
    if param.is_complex() or param.dtype == torch.float64:
        raise ValueError(
            f"{name}: states={group['states']!r} for {param.dtype}, whose states are at least float32; let "
            "keep_float32 return True for it"
        )
    if is_quantized(group["states"]) and splits_groups(param):
        raise ValueError(
            f"{name}: states={group['states']!r} needs shards of whole rows of a multiple of 32 elements; "
            f"this one has shape {tuple(param.shape)} and placements {getattr(param, 'placements', None)}; let "
            "keep_float32 return True for it"
        )


def checked_gradient(param: Tensor) -> Tensor:
    """Return a parameter's gradient as a dense tensor whose memory holds its values.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit the parameter.
    """
    grad = param.grad
    assert grad is not None
    if grad.shape != param.shape:
        raise ValueError(f"grad: shape {tuple(grad.shape)} for a parameter of shape {tuple(param.shape)}")
    if is_sharded(grad) != is_sharded(param):  # torch takes it, but this rank's parts have different shapes
        raise TypeError(f"grad: a {type(grad).__name__} for a parameter that is a {type(param.data).__name__}")
    if grad.device != param.device:
        raise ValueError(f"grad: on {grad.device} for a parameter on {param.device}")
    if grad.is_complex() != param.is_complex() or not (grad.is_complex() or grad.is_floating_point()):
        raise TypeError(f"grad: dtype {grad.dtype} for a parameter of dtype {param.dtype}")
    if grad.dtype.to_real() not in PARAM_DTYPES:
        raise TypeError(f"grad: no step for dtype {grad.dtype}; expected float32, bfloat16, float16 or float64")
    # Every element decays and moves at every step, so a sparse gradient is a dense one with zeros.
    dense = grad if grad.layout == torch.strided else grad.to_dense()
    # The memory of a lazily conjugated or negated tensor, which is what the kernel reads, does not hold its values.
    return dense.resolve_conj().resolve_neg() if dense.is_conj() or dense.is_neg() else dense
