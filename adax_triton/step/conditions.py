"""What one step obeys besides the gradients: the scale they bear, and whether and how they are clipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What torch.nn.utils.clip_grad_norm_ adds to the norm.
NORM_EPS = 1e-6


class NormRanks(NamedTuple):
    """Over which ranks the norm is summed, and the device on which a rank without gradients takes part."""

    process_group: Any
    device: torch.device


class StepConditions(NamedTuple):
    """The conditions of one step.

    grad_scale: 1 element; the gradients are this times too large. `torch.amp.GradScaler` sets it.
    found_inf: 1 element; the step is skipped where it is not 0. Likewise.
    max_grad_norm: clip to this norm, all gradients of the step together; with a norm that is not finite the step is
        skipped.
    norm_ranks: of gradients that are sharded in plain tensors; only beside `max_grad_norm`.
    grad_factor: 1 element; all gradients are to be multiplied by it. With this alone the host schedules the step.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    max_grad_norm: float | None = None
    norm_ranks: NormRanks | None = None
    grad_factor: Tensor | None = None

    @property
    def is_default(self) -> bool:
        """Whether the step is taken as it is."""
        return self is DEFAULT_CONDITIONS or all(value is None for value in self)

    def read(self, sum_of_squares: Tensor | None) -> Decision:
        """Return what follows for tensors that the host schedules; it waits for devices other than the CPU.

        Args:
            sum_of_squares: of the gradients as they are, 0-d; needed with `max_grad_norm`.
        """
        if self.grad_factor is not None:
            return Decision(float(self.grad_factor), False)
        scale = 1.0 if self.grad_scale is None else float(self.grad_scale)
        if self.found_inf is not None and bool(self.found_inf != 0):
            return Decision(1.0, True)
        if scale == 0.0:  # as the kernel divides
            return Decision(math.inf, self.max_grad_norm is not None)
        if self.max_grad_norm is None or sum_of_squares is None:
            return Decision(1.0 / scale, False)
        norm = math.sqrt(float(sum_of_squares)) / scale
        clip = min(1.0, self.max_grad_norm / (norm + NORM_EPS))
        return Decision(clip / scale, not math.isfinite(norm))

    def norm(self, sum_of_squares: Tensor) -> Tensor:
        """Return the norm of the unscaled gradients, 0-d float32."""
        norm = sum_of_squares.sqrt()
        return (norm if self.grad_scale is None else norm / self.grad_scale.reshape(()).to(norm.device)).float()


DEFAULT_CONDITIONS = StepConditions()


class OptimizerOptions(NamedTuple):
    """What the program chooses for an optimizer as a whole; no part of its state dict. See `AdaX` for each."""

    keep_float32: Callable[[Tensor], bool] | None
    max_grad_norm: float | None
    error_if_nonfinite: bool
    norm_process_group: Any
    telemetry: bool

    def check(self) -> None:
        """Check the options.

        Raises:
            TypeError: one of the wrong type.
            ValueError: one out of range, or without the one that it refers to.
        """
        if self.keep_float32 is not None and not callable(self.keep_float32):
            raise TypeError(
                f"Invalid type of keep_float32: expected a function of a parameter, got {self.keep_float32!r}"
            )
        check_max_grad_norm(self.max_grad_norm)
        for name in ("error_if_nonfinite", "telemetry"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Invalid type of {name}: expected True or False, got {getattr(self, name)!r}")
        if self.max_grad_norm is None and (self.error_if_nonfinite or self.norm_process_group is not None):
            raise ValueError(
                "Invalid max_grad_norm: None; error_if_nonfinite and norm_process_group are about the norm, which is "
                "measured only with a max_grad_norm (float('inf') measures without clipping)"
            )


class Decision(NamedTuple):
    """What a step does: the factor of its gradients, and whether it is skipped."""

    grad_factor: float
    skip: bool


UNCHANGED_GRADIENTS = Decision(1.0, False)


def check_max_grad_norm(max_grad_norm: Any, name: str = "max_grad_norm") -> float | None:
    """Return a limit as given; `name` is that of the argument.

    Raises:
        TypeError: neither a number nor None.
        ValueError: not above 0; inf measures the norm and skips steps, but never clips.
    """
    if max_grad_norm is None:
        return None
    if not isinstance(max_grad_norm, (int, float)) or isinstance(max_grad_norm, bool):
        raise TypeError(f"Invalid type of {name}: expected a number or None, got {max_grad_norm!r}")
    if not max_grad_norm > 0.0:
        raise ValueError(f"Invalid {name}: {max_grad_norm}; expected a norm above 0")
    return float(max_grad_norm)


def check_one_element(value: Any, name: str) -> Tensor | None:
    """Return `grad_scale` or `found_inf` as it was set.

    Raises:
        TypeError: neither a tensor of one element nor None.
    """
    if value is None or (isinstance(value, Tensor) and value.numel() == 1):
        return value
    if name == "found_inf" and type(value) is int and value == 0:
        return None  # GradScaler's sum over the devices of the gradients, where there are no gradients
    given = f"one of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise TypeError(f"Invalid type of {name}: expected a tensor of one element, got {given}")


def conditions_of(optimizer: Any) -> StepConditions:
    """Return the conditions of a `MomentOptimizer`'s next step: `max_grad_norm`, and what `GradScaler` has set of it.

    Raises:
        TypeError, ValueError: one that was set to what it cannot be.
    """
    given = optimizer.__dict__
    if given["max_grad_norm"] is None and given.get("grad_scale") is None and given.get("found_inf") is None:
        return DEFAULT_CONDITIONS
    limit, process_group = check_max_grad_norm(optimizer.max_grad_norm), optimizer.options.norm_process_group
    ranks = None
    if limit is not None and process_group is not None:
        devices = (param.device for group in optimizer.param_groups for param in group["params"])
        ranks = NormRanks(process_group, next(devices, torch.device("cpu")))
    return StepConditions(
        check_one_element(getattr(optimizer, "grad_scale", None), "grad_scale"),
        check_one_element(getattr(optimizer, "found_inf", None), "found_inf"),
        limit,
        ranks,
    )
