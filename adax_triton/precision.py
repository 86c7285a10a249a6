"""Which dtype each tensor of a step has, and the bytes that follow from it."""

from __future__ import annotations

import torch

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def state_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of `exp_avg` and `exp_avg_sq`: float32, or float64 for float64 parameters; complex for complex.

    Never less: `w_t` shrinks for as long as AdaX runs, and a second moment rounded to nearest in bfloat16 stops
    changing after some 250 steps.
    """
    real = torch.float64 if param_dtype.to_real() == torch.float64 else torch.float32
    return real.to_complex() if param_dtype.is_complex else real


def bytes_loaded(param_dtype: torch.dtype, grad_dtype: torch.dtype) -> int:
    """Return the bytes a step reads per element: parameter, gradient and both moments."""
    return param_dtype.itemsize + grad_dtype.itemsize + 2 * state_dtype(param_dtype).itemsize


def bytes_stored(param_dtype: torch.dtype) -> int:
    """Return the bytes a step writes per element: parameter and both moments."""
    return param_dtype.itemsize + 2 * state_dtype(param_dtype).itemsize
