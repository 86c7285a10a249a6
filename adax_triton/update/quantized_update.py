"""Reference update of stored tensors: dequantize, update in float32, round and quantize."""

from __future__ import annotations

import torch
from torch import Tensor

from .coefficients import StepScalars
from .quantization import GROUP, dequantize_moments, quantize_moments
from .reference import adax_update
from .rounding import (
    HALF_BFLOAT16,
    addend_from_high_bits,
    addend_from_low_bits,
    join_master,
    random_bits,
    round_to_bfloat16,
    signed_word,
    split_master,
    valid_master,
)


def load_master(param: Tensor, master: Tensor | None, param_is_copy: bool = False) -> Tensor:
    """Return the float32 weights before a step, as a new tensor.

    They are the master if it rounds to the parameter. Otherwise the user has overwritten the parameter, and they are
    the parameter.

    Args:
        param: any float dtype; bfloat16 if `master` is a remainder, float16 if it is a copy.
        master: int16 or int8 remainder, float32 copy, or None.
        param_is_copy: use the float32 `master` without comparing it with `param`, which is output only.
    """
    if master is None:
        return param.to(torch.float32, copy=True)
    if param_is_copy:
        return master.clone()
    if master.dtype == torch.float32:
        return valid_master(param, master)
    return join_master(param, master)


def store_master(
    weights: Tensor,
    param: Tensor,
    master: Tensor | None,
    random: Tensor | None,
    stochastic: bool,
) -> None:
    """Round float32 weights into a parameter and its master.

    Args:
        weights: float32.
        param: written; any float dtype, bfloat16 if `master` is a remainder.
        master: written; int16 or int8 remainder, float32 copy, or None.
        random: 32 random bits per element, for an int8 remainder and for `stochastic`; None to round to nearest.
        stochastic: round stochastically if the parameter is bfloat16 and has no master.
    """
    if master is None:
        param.copy_(round_to_bfloat16(weights, addend_from_low_bits(random, 16)) if stochastic else weights)
    elif master.dtype == torch.float32:
        param.copy_(weights)
        master.copy_(weights)
    else:
        high, remainder = split_master(weights, addend_from_low_bits(random, 8) if master.dtype == torch.int8 else None)
        param.copy_(high)
        master.copy_(remainder)


def load_moments(exp_avg: Tensor, exp_avg_sq: Tensor, group_exponents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the moments in float32, in their stored shape.

    Quantized moments are padded to whole groups of 32.
    """
    if group_exponents is None:
        return exp_avg.to(torch.float32, copy=True), exp_avg_sq.to(torch.float32, copy=True)
    codes = (exp_avg.view(-1, GROUP), exp_avg_sq.view(-1, GROUP), group_exponents.view(-1))
    first, second = dequantize_moments(*codes)
    return first.view(exp_avg.shape), second.view(exp_avg.shape)


def store_moments(
    values: tuple[Tensor, Tensor],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    group_exponents: Tensor | None,
    random: Tensor | None,
) -> None:
    """Round float32 moments into their stored form.

    v is rounded stochastically, or to nearest if `random` is None.
    """
    first, second = values
    if group_exponents is not None:
        codes = quantize_moments(
            first.view(-1, GROUP),
            second.view(-1, GROUP),
            None if random is None else random.view(-1, GROUP),
            v_8bit=exp_avg_sq.dtype == torch.uint8,
        )
        exp_avg.copy_(codes[0].view(exp_avg.shape))
        exp_avg_sq.copy_(codes[1].view(exp_avg_sq.shape))
        group_exponents.copy_(codes[2].view(group_exponents.shape))
    elif exp_avg_sq.dtype == torch.bfloat16:
        exp_avg.copy_(round_to_bfloat16(first, HALF_BFLOAT16))
        exp_avg_sq.copy_(round_to_bfloat16(second, addend_from_high_bits(random, 16)))
    else:
        exp_avg.copy_(first)
        exp_avg_sq.copy_(second)


def quantized_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    group_exponents: Tensor | None,
    scalars: StepScalars,
    random_words: tuple[int, int, int],
    stochastic: bool,
    param_is_copy: bool = False,
) -> None:
    """Apply one update to stored tensors, in place; see `reference.adax_update`.

    Args:
        param, grad, exp_avg, exp_avg_sq, master: (n,) contiguous, or (n / 32, 32) if the moments are quantized, in the
            dtypes of `precision.state_layouts`.
        group_exponents: (n / 32,) if the moments are quantized, else None.
        scalars: the scalars of this step.
        random_words: the index of the first element in its parameter, modulo 2^32, and the two words of `random_key`.
        stochastic: round the parameter itself stochastically.
        param_is_copy: see `load_master`.
    """
    index = torch.arange(param.numel(), dtype=torch.int32, device=param.device).view(param.shape)
    first_element, *key = map(signed_word, random_words)
    random = random_bits(index + first_element, (key[0], key[1]))
    weights = load_master(param, master, param_is_copy)
    first, second = load_moments(exp_avg, exp_avg_sq, group_exponents)
    adax_update(weights, grad, first, second, **scalars._asdict())
    store_master(weights, param, master, random, stochastic)
    store_moments((first, second), exp_avg, exp_avg_sq, group_exponents, random)
