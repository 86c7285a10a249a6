"""The gate: a provider whose weights are not those of its rule gets no time.

Five steps of a list of tensors with new gradients, of another scale each time, are compared with the reference in
float64. The error of a tensor is that of its movement, |p - exact| / |exact - start| in the Euclidean norm, so that one
that stays where it was has 1, whatever the learning rate. Weights start small and decay fast: each term of the rule
makes up a good part of the movement, and 16-bit weights still resolve it.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adax_triton.update.coefficients import StepScalars, step_scalars
from adax_triton.update.reference import adax_update

from .modes import Mode
from .providers import RULES, Provider, Rule
from .workloads import Shapes

STEPS = 5
# Of more and of less than 4096 elements, in whole groups of 256 and not.
SHAPES: Shapes = [(160, 256), (5003,), (33, 17), (3,)]
LR, WEIGHT_DECAY = 0.05, 1.0
START = 0.05  # deviation of the weights
GRAD_SCALES = (1.0, 3.0, 0.3, 2.0, 0.7)

ENDS = 256
# So small that bfloat16 resolves a first step, a tenth of a learning rate.
ENDS_START = 1e-4


class WrongResultError(Exception):
    """A provider's weights are not those of its rule."""


class Passed(NamedTuple):
    """What the gate found of a provider: its error, what was allowed, and the seconds of its first step of all."""

    error: float
    tolerance: float
    compile_s: float


def tolerance(mode: Mode) -> float:
    """Return the largest error of a mode: what the formats of its states and of its weights cost, with some room."""
    by_states = {"float32": 0.0, "bfloat16": 0.005, "8bit_v16": 0.015, "8bit": 0.05}[mode.precision.states]
    if mode.param_dtype == torch.float32:
        # Some take a power of 0.999 in float32 and then its difference from 1.
        return by_states + 1e-4
    # Next to a master the rounding to bfloat16 is seen once; alone it adds up.
    return by_states + (0.02 if mode.precision.master_weights is None else 0.008)


def check(provider: Provider, device: torch.device) -> Passed:
    """Step a small list and compare with the reference in float64.

    Raises:
        WrongResultError: the weights of a tensor differ by more than `tolerance`, or are not finite.
    """
    generator = torch.Generator(device).manual_seed(1)
    dtype = provider.mode.param_dtype
    params = [
        (START * torch.randn(shape, generator=generator, device=device)).to(dtype).requires_grad_() for shape in SHAPES
    ]
    start = [param.detach().double() for param in params]
    exact = [weights.clone() for weights in start]
    moments = [(torch.zeros_like(weights), torch.zeros_like(weights)) for weights in start]
    rule = RULES[provider.second_moment] | {"lr": LR, "weight_decay": WEIGHT_DECAY}
    step: Any = None
    for number, scale in enumerate(GRAD_SCALES, start=1):
        for param in params:
            param.grad = (scale * torch.randn(param.shape, generator=generator, device=device)).to(dtype)
        # A step may use its gradients up.
        grads = [param.grad.double() for param in params if param.grad is not None]
        if step is None:
            begun = time.perf_counter()
            step = provider.build(params, rule)
        step()
        if number == 1:
            _wait(device)
            compile_s = time.perf_counter() - begun
        scalars = scalars_of(provider.second_moment, rule, number)
        for weights, grad, moment in zip(exact, grads, moments, strict=True):
            adax_update(weights, grad, *moment, **scalars._asdict())
    error = max(map(error_of_movement, params, exact, start))
    if not error <= tolerance(provider.mode):
        raise WrongResultError(
            f"weights differ from the {rule_name(provider)} rule by {error:.1e} of their movement; "
            f"{tolerance(provider.mode):.1e} is allowed"
        )
    return Passed(error, tolerance(provider.mode), compile_s)


def error_of_movement(found: Tensor, exact: Tensor, start: Tensor) -> float:
    """Return |found - exact| / |exact - start|."""
    return ((found.detach().double() - exact).norm() / (exact - start).norm()).item()


def scalars_of(second_moment: str, rule: Rule, step: int) -> StepScalars:
    """Return what the reference takes for step t of a rule with decoupled decay."""
    return step_scalars(
        step=step,
        second_moment=second_moment,
        decoupled_weight_decay=True,
        eps_placement="normalized",
        maximize=False,
        **rule,
    )


def rule_name(provider: Provider) -> str:
    """Return the rule's name as users write it."""
    return {"adax": "AdaX-W", "adam": "AdamW"}[provider.second_moment]


class Ends:
    """Holds a provider's first step on the tensors it is timed on against the reference, where those begin and end.

    What overflows 32 bits, or leaves a tail out, passes a small list and fails here. Weights and gradients at the ends
    of the first and of the last tensor are replaced by known ones.

    Args:
        params: with gradients, contiguous.
    """

    def __init__(self, params: list[Tensor]) -> None:
        generator = torch.Generator(params[0].device).manual_seed(4)
        self._weights: list[Tensor] = []
        self._grads: list[Tensor] = []
        for param in (params[0], params[-1]):
            assert param.grad is not None
            for end in (slice(0, ENDS), slice(max(0, param.numel() - ENDS), None)):
                weights, grad = param.detach().view(-1)[end], param.grad.view(-1)[end]
                for tensor, scale in ((weights, ENDS_START), (grad, 1.0)):
                    tensor.copy_(scale * torch.randn(tensor.shape, generator=generator, device=tensor.device))
                self._weights.append(weights)
                self._grads.append(grad)
        # After all are written: they may overlap.
        self._before = [weights.double() for weights in self._weights]
        self._before_grads = [grad.double() for grad in self._grads]

    def check(self, provider: Provider) -> None:
        """Compare after one step.

        Raises:
            WrongResultError: an end's error is more than `tolerance`.
        """
        rule = RULES[provider.second_moment]
        scalars = scalars_of(provider.second_moment, rule, 1)
        allowed = tolerance(provider.mode)
        for found, before, grad in zip(self._weights, self._before, self._before_grads, strict=True):
            exact = before.clone()
            adax_update(exact, grad, torch.zeros_like(exact), torch.zeros_like(exact), **scalars._asdict())
            error = error_of_movement(found, exact, before)
            if not error <= allowed:
                raise WrongResultError(f"at an end of a tensor, weights differ by {error:.1e} of their movement")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
