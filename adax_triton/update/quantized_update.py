"""The reference update on tensors as they are stored: decoded, updated in float32, rounded and encoded again."""

from __future__ import annotations

import torch
from torch import Tensor

from .coefficients import StepScalars
from .quantization import GROUP, dequantize_moments, quantize_moments
from .reference import adax_update
from .rounding import (
    current_copy,
    high_bits,
    join_master,
    low_bits,
    random_bits,
    round_to_bfloat16,
    signed_word,
    split_master,
)

# Adding half of what is cut off rounds to the nearest, ties away from zero.
_NEAREST = 0x8000


def load_master(param: Tensor, master: Tensor | None, param_is_copy: bool = False) -> Tensor:
    """Return the float32 weights that a step starts from; a new tensor.

    A master counts only where it still rounds to the parameter. Elsewhere somebody has set the parameter, and it is the
    weight.

    Args:
        param: any float dtype; bfloat16 next to a remainder, float16 next to a copy.
        master: int16 or int8 remainder, float32 copy, or None.
        param_is_copy: the float32 `master` is the weight, and the parameter, of any dtype, is only written.
    """
    if master is None:
        return param.to(torch.float32, copy=True)
    if param_is_copy:
        return master.clone()
    if master.dtype == torch.float32:
        return current_copy(param, master)
    return join_master(param, master)


def store_master(
    weights: Tensor,
    param: Tensor,
    master: Tensor | None,
    random: Tensor | None,
    stochastic: bool,
) -> None:
    """Round float32 weights into a parameter and its `master`.

    Args:
        weights: float32.
        param: written; any float dtype, bfloat16 beside a remainder.
        master: written; int16 or int8 remainder, float32 copy, or None.
        random: 32 random bits per element, for an int8 remainder and for `stochastic`; None to round to nearest.
        stochastic: round a bfloat16 parameter that has no master stochastically.
    """
    if master is None:
        param.copy_(round_to_bfloat16(weights, low_bits(random, 16)) if stochastic else weights)
    elif master.dtype == torch.float32:
        param.copy_(weights)
        master.copy_(weights)
    else:
        high, rest = split_master(weights, low_bits(random, 8) if master.dtype == torch.int8 else None)
        param.copy_(high)
        master.copy_(rest)


def load_moments(exp_avg: Tensor, exp_avg_sq: Tensor, group_exponents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the moments in float32, of the shape in which they are stored; codes have whole groups of elements."""
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
    """Round float32 moments into their stored form; the second one stochastically, unless `random` is None."""
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
        exp_avg.copy_(round_to_bfloat16(first, _NEAREST))
        exp_avg_sq.copy_(round_to_bfloat16(second, high_bits(random, 16)))
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
    words: tuple[int, int, int],
    stochastic: bool,
    param_is_copy: bool = False,
) -> None:
    """Apply one update to stored tensors, in place; see `reference.adax_update`.

    Args:
        param, grad, exp_avg, exp_avg_sq, master: (n,) contiguous, or (n / 32, 32) beside codes, in the dtypes of
            `precision.state_layouts`.
        group_exponents: (n / 32,) beside codes; else None.
        scalars: of this step.
        words: the index of the first element in its parameter, modulo 2^32, and the words of `random_key`.
        stochastic: round the parameter itself stochastically.
        param_is_copy: see `load_master`.
    """
    index = torch.arange(param.numel(), dtype=torch.int32, device=param.device).view(param.shape)
    first_element, *key = map(signed_word, words)
    random = random_bits(index + first_element, (key[0], key[1]))
    weights = load_master(param, master, param_is_copy)
    first, second = load_moments(exp_avg, exp_avg_sq, group_exponents)
    adax_update(weights, grad, first, second, **scalars._asdict())
    store_master(weights, param, master, random, stochastic)
    store_moments((first, second), exp_avg, exp_avg_sq, group_exponents, random)
