"""Per-step gradient handling: AMP scale, overflow flag, clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adax_triton.state.parameters import belongs_to_fsdp1

# The epsilon of torch.nn.utils.clip_grad_norm_.
NORM_EPS = 1e-6


class NormRanks(NamedTuple):
    """The ranks that share a gradient norm."""

    process_group: Any
    device: torch.device  # for the all-reduce on a rank without gradients


class GradientHandling(NamedTuple):
    """Gradient scale, overflow flag and clipping of one step.

    Each field is None by default.

    grad_scale: AMP loss scale, 1 element; gradients are divided by it. `torch.amp.GradScaler` sets it.
    found_inf: overflow flag, 1 element; any value but 0 skips the step. `torch.amp.GradScaler` sets it.
    max_grad_norm: clip the norm of all gradients to this. A norm that is not finite skips the step.
    norm_ranks: ranks that shard plain-tensor gradients. Needs `max_grad_norm`.
    grad_factor: factor of all gradients, 1 element. Excludes the other fields. The host counts these
        steps.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    max_grad_norm: float | None = None
    norm_ranks: NormRanks | None = None
    grad_factor: Tensor | None = None

    @property
    def is_default(self) -> bool:
        """Whether the step does not scale, skip or clip."""
        return self is DEFAULT_HANDLING or all(value is None for value in self)

    def decide(self, squares: Tensor | None) -> StepDecision:
        """Return the gradient factor and skip flag of host-counted parameters.

        The host waits for tensors on a GPU.

        Args:
            squares: see `grad_norm.gradient_squares`, of the scaled gradients; required with `max_grad_norm`.
        """
        if self.grad_factor is not None:
            return StepDecision(float(self.grad_factor), False)
        scale = 1.0 if self.grad_scale is None else float(self.grad_scale)
        if self.found_inf is not None and bool(self.found_inf != 0):
            return StepDecision(1.0, True)
        if scale == 0.0:  # Python raises for 1 / 0; the kernel computes inf
            return StepDecision(math.inf, self.max_grad_norm is not None)
        if self.max_grad_norm is None or squares is None:
            return StepDecision(1.0 / scale, False)
        norm = math.sqrt(float(squares.sum())) / scale
        clip = min(1.0, self.max_grad_norm / (norm + NORM_EPS))
        return StepDecision(clip / scale, not math.isfinite(norm))

    def norm(self, squares: Tensor) -> Tensor:
        """Return the norm of the unscaled gradients, 0-d float32."""
        norm = squares.sum().sqrt()
        return (norm if self.grad_scale is None else norm / self.grad_scale.reshape(()).to(norm.device)).float()


DEFAULT_HANDLING = GradientHandling()


class OptimizerOptions(NamedTuple):
    """Optimizer-wide options outside the state dict; see `AdaX` for each."""

    keep_float32: Callable[[Tensor], bool] | None
    max_grad_norm: float | None
    error_if_nonfinite: bool
    norm_process_group: Any
    telemetry: bool
    fused: bool = False  # absent from older pickles

    def check(self) -> None:
        """Check the options.

        Raises:
            TypeError: an option has the wrong type.
            ValueError: an option is out of range, or needs a `max_grad_norm`.
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
            given = "error_if_nonfinite=True needs" if self.error_if_nonfinite else "norm_process_group needs"
            raise ValueError(
                f"Invalid max_grad_norm: None; {given} a number; pass max_grad_norm=float('inf') to measure the norm "
                "without clipping"
            )


class StepDecision(NamedTuple):
    """Gradient factor and skip flag of one step."""

    grad_factor: float
    skip: bool


DEFAULT_DECISION = StepDecision(grad_factor=1.0, skip=False)


def check_max_grad_norm(max_grad_norm: Any) -> float | None:
    """Validate a norm limit and return it as float or None.

    Args:
        max_grad_norm: limit above 0, or None. inf measures the norm and may skip steps, but never clips.

    Raises:
        TypeError: the limit is neither a number nor None.
        ValueError: the limit is not above 0.
    """
    if max_grad_norm is None:
        return None
    if not isinstance(max_grad_norm, (int, float)) or isinstance(max_grad_norm, bool):
        raise TypeError(f"Invalid type of max_grad_norm: expected a number or None, got {max_grad_norm!r}")
    if not max_grad_norm > 0.0:
        raise ValueError(f"Invalid max_grad_norm: {max_grad_norm}; expected a norm above 0")
    return float(max_grad_norm)


def check_sees_whole_gradients(params: Iterable[Any], max_grad_norm: float | None, process_group: Any) -> None:
    """Raise if a norm limit needs gradients that other ranks have.

    Args:
        params: parameters of the optimizer.
        max_grad_norm: norm limit or None.
        process_group: the optimizer's `norm_process_group`.

    Raises:
        ValueError: FSDP1 shards a parameter, and there is a limit but no process group.
    """
    if max_grad_norm is not None and process_group is None and any(map(belongs_to_fsdp1, params)):
        raise ValueError(
            f"Invalid max_grad_norm: {max_grad_norm}; FSDP1 (FullyShardedDataParallel) may shard the gradients, so "
            f"a rank cannot measure their norm; set it to None and call model.clip_grad_norm_({max_grad_norm}) before "
            "step()"
        )


def check_one_element(value: Any, name: str) -> Tensor | None:
    """Return `value` if it is None or a one-element tensor.

    Raises:
        TypeError: it is anything else.
    """
    if value is None or (isinstance(value, Tensor) and value.numel() == 1):
        return value
    if name == "found_inf" and type(value) is int and value == 0:
        return None  # GradScaler sets the int 0 if no parameter has a gradient
    given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise TypeError(f"Invalid type of {name}: expected a tensor of one element or None, got {given}")


def gradient_handling_of(optimizer: Any) -> GradientHandling:
    """Return a `MomentOptimizer`'s `max_grad_norm`, `grad_scale` and `found_inf` for the next step.

    Raises:
        TypeError, ValueError: one of these attributes has an invalid value.
    """
    grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if optimizer.max_grad_norm is None and grad_scale is None and found_inf is None:
        return DEFAULT_HANDLING
    limit, process_group = check_max_grad_norm(optimizer.max_grad_norm), optimizer.options.norm_process_group
    if optimizer.options.max_grad_norm is None:  # `add_param_group` has checked a limit of the constructor
        params = (param for group in optimizer.param_groups for param in group["params"])
        check_sees_whole_gradients(params, limit, process_group)
    ranks = None
    if limit is not None and process_group is not None:
        devices = (param.device for group in optimizer.param_groups for param in group["params"])
        ranks = NormRanks(process_group, next(devices, torch.device("cpu")))
    return GradientHandling(
        check_one_element(grad_scale, "grad_scale"),
        check_one_element(found_inf, "found_inf"),
        limit,
        ranks,
    )
