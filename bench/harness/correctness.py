"""Correctness check: an optimizer with wrong results is not timed.

Five steps of a few tensors, each with new gradients of another scale, are compared with the float64 reference. The
error of a tensor is |p - exact| / |exact - start| in the Euclidean norm: it is relative to the whole update, and 1 for
a tensor that did not move. Weights start small and decay fast, so every term of the rule is a large part of the update
and 16-bit weights resolve it.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adax_triton.update.coefficients import step_scalars
from adax_triton.update.reference import adax_update

from .modes import Mode
from .providers import RULES, Provider, Rule
from .timing import wait
from .workloads import Shapes

# Sizes above and below 4096 elements, both multiples of 256 and odd sizes.
SHAPES: Shapes = [(160, 256), (5003,), (33, 17), (3,)]
LR, WEIGHT_DECAY = 0.05, 1.0
START = 0.05  # standard deviation of the weights
GRAD_SCALES = (1.0, 3.0, 0.3, 2.0, 0.7)
RULE_NAMES = {"adax": "AdaX-W", "adam": "AdamW"}

END_ELEMENTS = 256
END_START = 1e-4  # small enough that bfloat16 resolves a first step, lr / 10


class WrongResultError(Exception):
    """A provider's weights differ from the float64 reference."""


class CheckResult(NamedTuple):
    """Error, tolerance and first-step seconds of a provider, compilation included."""

    error: float
    tolerance: float
    compile_s: float


def tolerance(mode: Mode) -> float:
    """Return the tolerance of a mode, from its state and weight formats."""
    by_states = {"float32": 0.0, "bfloat16": 0.005, "8bit_v16": 0.015, "8bit": 0.05}[mode.precision.states]
    if mode.param_dtype == torch.float32:
        # Some optimizers compute 1 - 0.999^t in float32, which loses digits.
        return by_states + 1e-4
    # With a master weight the rounding to bfloat16 does not accumulate.
    return by_states + (0.02 if mode.precision.master_weights is None else 0.008)


class Reference:
    """Applies the float64 reference to copies of a provider's weights.

    Weight decay is decoupled.
    """

    def __init__(self, provider: Provider, rule: Rule, weights: list[Tensor]) -> None:
        self._provider, self._rule, self._weights = provider, rule, weights
        self._start = [tensor.detach().double() for tensor in weights]
        self._exact = [start.clone() for start in self._start]
        self._moments = [(torch.zeros_like(start), torch.zeros_like(start)) for start in self._start]
        self._steps = 0

    def step(self, grads: list[Tensor]) -> None:
        """Apply the gradients; call before the provider's step, which may overwrite them."""
        self._steps += 1
        scalars = step_scalars(
            step=self._steps,
            second_moment=self._provider.second_moment,
            decoupled_weight_decay=True,
            eps_placement="normalized",
            maximize=False,
            **self._rule,
        )
        for exact, grad, moments in zip(self._exact, grads, self._moments, strict=True):
            adax_update(exact, grad.double(), *moments, **scalars._asdict())

    def check(self) -> float:
        """Compare after equally many steps; return the error or raise WrongResultError."""
        errors = [
            (found.detach().double() - exact).norm() / (exact - start).norm()
            for found, exact, start in zip(self._weights, self._exact, self._start, strict=True)
        ]
        error, allowed = torch.stack(errors).max().item(), tolerance(self._provider.mode)  # NaN if any error is
        if not error <= allowed:
            rule = RULE_NAMES[self._provider.second_moment]
            raise WrongResultError(
                f"weights differ from the {rule} rule by {error:.1e} of the update; the tolerance is {allowed:.1e}"
            )
        return error


def check(provider: Provider, device: torch.device) -> CheckResult:
    """Compare five steps of a few tensors with the reference.

    Raises WrongResultError unless the error is within the tolerance.
    """
    generator = torch.Generator(device).manual_seed(1)
    dtype = provider.mode.param_dtype

    def random(shape: tuple[int, ...], scale: float) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

    params = [random(shape, START).requires_grad_() for shape in SHAPES]
    rule = RULES[provider.second_moment] | {"lr": LR, "weight_decay": WEIGHT_DECAY}
    reference = Reference(provider, rule, params)
    step: Any = None
    for scale in GRAD_SCALES:
        grads = [random(param.shape, scale) for param in params]
        reference.step(grads)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        begun = time.perf_counter()
        if step is None:
            step = provider.build(params, rule)
            step()
            wait(device)
            compile_s = time.perf_counter() - begun
        else:
            step()
    return CheckResult(reference.check(), tolerance(provider.mode), compile_s)


def reference_at_ends(provider: Provider, params: list[Tensor]) -> Reference:
    """Return a reference for both ends of the first and last tensor.

    It has made the first step. Each end has `END_ELEMENTS` elements; known weights and gradients replace them. This
    detects 32-bit overflow and missing tails, which small tensors do not show. `params` are the timed tensors,
    contiguous and with gradients.
    """
    generator = torch.Generator(params[0].device).manual_seed(4)
    weights, grads = [], []
    for param in (params[0], params[-1]):
        assert param.grad is not None
        for end in (slice(0, END_ELEMENTS), slice(max(0, param.numel() - END_ELEMENTS), None)):
            weights.append(param.detach().view(-1)[end])
            grads.append(param.grad.view(-1)[end])
            for tensor, scale in ((weights[-1], END_START), (grads[-1], 1.0)):
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator, device=tensor.device))
    # Copy the weights after all ends are written, because the two ends of a short tensor overlap.
    reference = Reference(provider, RULES[provider.second_moment], weights)
    reference.step(grads)
    return reference
