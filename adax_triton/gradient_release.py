"""Gradient release: parameters are stepped within the backward pass, and their gradients freed one by one."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from adax_triton.state.dtensor import local_gradient, shard_process_groups
from adax_triton.state.parameters import checked_gradient
from adax_triton.step.conditions import NORM_EPS, check_max_grad_norm
from adax_triton.step.device_tables import CAPTURE_NEEDS_WARM_UP, current_stream, is_capturing
from adax_triton.step.grad_norm import sum_over_ranks

from .moment_optimizer import MomentOptimizer


class GradientRelease:
    r"""Has each parameter stepped as soon as a backward pass has its gradient, which is then freed (`grad` is None).

    The numbers are those of `step()`, bit for bit. `step()` may stay in the training loop and finds nothing to do.
    Groups and learning rates are read when a parameter is stepped. A parameter that is used twice is stepped once, by
    the sum. One that joins a group or comes to require a gradient later is stepped at the end of its first backward
    pass, and during the following ones.

    What needs all gradients at once cannot be had: clipping by their norm; accumulation over backward passes, each of
    which steps; a `GradScaler`, for which train in bfloat16. In place of the first, `max_last_norm` goes by the norm of
    the backward pass before:

    .. math::
        g_t \leftarrow g_t \min(1, \mathrm{max\_last\_norm} / (\lVert g_{t-1} \rVert + 10^{-6}))

    where the norm is that of the gradients before they are scaled. The first pass is not clipped, nor is one after a
    norm that is not finite. Parameters are stepped by gradients that are not finite, too.

    Works with FSDP2, which reduces gradients before their hooks run, and lets them accumulate with
    `set_requires_gradient_sync`. `DistributedDataParallel` reduces them afterwards: that raises, at the end of the
    first backward pass. A reentrant checkpoint runs a backward pass of its own: no parameter may belong to two, and
    `max_last_norm` needs one outside of them that comes first; or use `use_reentrant=False`. Where one node of the
    graph returns all gradients, as under `torch.compile`, they live together all the same.

    Args:
        optimizer: whose parameters are stepped; made without `max_grad_norm` and `telemetry`.
        max_last_norm: scale the gradients by the norm of all gradients of the last backward pass, > 0; where the kernel
            steps them, the host waits for nothing. inf measures only. Default: None, the norm is not measured.

    Attributes:
        grad_norm: of all gradients of the last backward pass, 0-d float32; None unless `max_last_norm` is set.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: one out of range, an optimizer that clips or takes telemetry, or a parameter that is released
            already, is FSDP1's, or is offloaded to the CPU by FSDP2 of torch < 2.13, whose hooks see unfinished copies.
        RuntimeError: a `GradScaler` has been at the optimizer; backward passes and `step()` raise it too.

    A backward pass raises what `step()` would of a bad gradient; parameters that came before it have been stepped.
    """

    def __init__(self, optimizer: MomentOptimizer, max_last_norm: float | None = None) -> None:
        if not isinstance(optimizer, MomentOptimizer):
            raise TypeError(f"Invalid type of optimizer: expected one of adax_triton, got {type(optimizer).__name__}")
        if optimizer.options.telemetry:
            raise ValueError(
                "Invalid optimizer: made with telemetry=True, which is of whole steps; gradient release has none"
            )
        limit = check_max_grad_norm(max_last_norm, "max_last_norm")
        self.grad_norm: Tensor | None = None
        self._optimizer = optimizer
        self._last_norm = None if limit is None else _LastNorm(limit)
        self._hooked: set[Tensor] = set()
        self._group_of: dict[Tensor, int] = {}  # of this backward pass
        self._handles: list[RemovableHandle] = []
        self._stepped: set[Tensor] = set()
        # Alive as long as a backward pass is under way, which alone holds it: one that fails ends no other way.
        self._end: weakref.ref[Callable[[], None]] | None = None
        # Each device's gradients come in a thread of their own.
        self._lock = threading.Lock()
        self._check_optimizer()
        joining = self._joining()
        for param, group_index in joining.items():
            _check_param(param, group_index)
        self._join(joining)
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))

    def remove(self) -> None:
        """Have gradients stay and `step()` step from now on; leaving a `with` block does the same."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked.clear()
        self._group_of.clear()

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _check_optimizer(self) -> None:
        if self._optimizer.max_grad_norm is not None:
            raise ValueError(
                f"Invalid max_grad_norm: {self._optimizer.max_grad_norm} with gradient release, where no more than one "
                "gradient is known when a parameter is stepped; set it to None, and give GradientRelease a "
                "max_last_norm, which clips by the norm of the last backward pass"
            )
        for name in ("grad_scale", "found_inf"):
            if getattr(self._optimizer, name, None) is not None:
                raise RuntimeError(
                    f"{name} is set, by a GradScaler? It comes too late with gradient release: parameters are stepped "
                    "before the scale and the finiteness of all gradients are known; train in bfloat16 without a scaler"
                )

    def _before_step(self, *_: Any) -> None:
        self._check_optimizer()

    def _joining(self) -> dict[Tensor, int]:
        return {
            param: group_index
            for group_index, group in enumerate(self._optimizer.param_groups)
            for param in group["params"]
            if param not in self._hooked and param.requires_grad
        }

    def _join(self, params: Iterable[Tensor]) -> None:
        self._hooked.update(params)
        self._handles += [param.register_post_accumulate_grad_hook(self._on_gradient) for param in params]

    # A backward pass within a compiled function is run by Python, but the hooks in it would be compiled.
    @torch._disable_dynamo
    def _on_gradient(self, param: Tensor) -> None:
        with self._lock, torch.no_grad():
            if self._end is None or self._end() is None:
                self._begin()
            self._step_and_free(param)

    def _begin(self) -> None:
        self._check_optimizer()
        self._stepped.clear()
        self._group_of = self._optimizer._group_indices()
        if self._last_norm is not None:
            self._last_norm.begin()

        def end() -> None:
            # After all that others do at the end, as FSDP2's last gradients and DDP's copies.
            Variable._execution_engine.queue_callback(self._finish)

        Variable._execution_engine.queue_callback(end)
        self._end = weakref.ref(end)

    def _step_and_free(self, param: Tensor) -> None:
        if param not in self._group_of:  # any more; `step()` would leave it, too
            return
        if param in self._stepped:
            raise RuntimeError(
                f"A parameter of shape {tuple(param.shape)} gets its gradient in parts, as one that two reentrant "
                "checkpoints share; gradient release has stepped by the first part alone. Use use_reentrant=False"
            )
        grad_scale = None
        if self._last_norm is not None:
            grad_scale = self._last_norm.grad_scale(param.device)
            self._last_norm.add(param)
        self._optimizer._step_one(param, self._group_of[param], grad_scale)
        param.grad = None
        self._stepped.add(param)

    @torch._disable_dynamo
    def _finish(self) -> None:
        with self._lock, torch.no_grad():
            self._end = None
            for param in self._stepped:
                if param.grad is not None:
                    raise RuntimeError(
                        f"A parameter of shape {tuple(param.shape)} has a gradient again after gradient release has "
                        "stepped it, as with DistributedDataParallel, which reduces gradients afterwards; this step "
                        "was by the gradients of this rank alone. Use FSDP2 (fully_shard), or no gradient release"
                    )
            joining = self._joining()
            self._join(joining)
            self._group_of.update(joining)
            for param in joining:
                if param.grad is not None:
                    self._step_and_free(param)
            if self._last_norm is not None and self._stepped:
                self.grad_norm = self._last_norm.close()


class _LastNorm:
    """The norm of the gradients of a backward pass, and by it the scale of those of the next."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        # By what they are sharded over, and where they are added up.
        self._squares: dict[tuple[tuple[Any, ...], torch.device, int], Tensor] = {}
        self._grad_scales: dict[torch.device, Tensor] = {}
        self._is_open = False

    def begin(self) -> None:
        if self._is_open:  # the last pass failed
            self._squares.clear()
        self._is_open = True

    def grad_scale(self, device: torch.device) -> Tensor:
        """Return what the gradients of this pass are divided by; always the same tensor, for CUDA graphs.

        Raises:
            RuntimeError: a CUDA graph is being captured without a pass before it.
        """
        if device not in self._grad_scales:
            if is_capturing(device):
                raise RuntimeError(CAPTURE_NEEDS_WARM_UP)
            self._grad_scales[device] = torch.ones((), dtype=torch.float64, device=device)
        return self._grad_scales[device]

    def add(self, param: Tensor) -> None:
        grad = local_gradient(checked_gradient(param), param)
        grad = torch.view_as_real(grad) if grad.is_complex() else grad
        # The norm of 16-bit gradients would be rounded to 16 bits; any dtype but their own costs the others a copy.
        dtype = torch.float32 if grad.element_size() == 2 else None
        square = torch.linalg.vector_norm(grad, dtype=dtype).double().square()
        key = shard_process_groups(param), grad.device, current_stream(grad.device)
        if key in self._squares:
            self._squares[key].add_(square)
        else:
            self._squares[key] = square

    def close(self) -> Tensor:
        parts: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        for (process_groups, _, _), squares in self._squares.items():
            parts[process_groups].append(squares)
        total = sum_over_ranks(parts)
        assert total is not None
        norm = total.sqrt()
        excess = ((norm + NORM_EPS) / self._limit).clamp(min=1.0)
        excess = excess.where(norm.isfinite(), 1.0)
        for grad_scale in self._grad_scales.values():
            grad_scale.copy_(excess)
        for squares in self._squares.values():
            squares.zero_()
        self._is_open = False
        return norm.float()


def _check_param(param: Tensor, group_index: int) -> None:
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    if any(isinstance(getattr(hook, "__self__", None), GradientRelease) for hook in hooks.values()):
        raise ValueError(
            f"param_groups[{group_index}]: has a parameter of another GradientRelease; remove() that first"
        )
    if getattr(param, "_fsdp_flattened", False):  # its hooks run before gradients are reduced, or never
        raise ValueError(f"param_groups[{group_index}]: has a parameter of FSDP1; gradient release needs FSDP2")
    mesh = getattr(param, "device_mesh", None)
    if mesh is not None and mesh.device_type != param.device.type and torch.__version__ < "2.13":
        raise ValueError(
            f"param_groups[{group_index}]: has a parameter that FSDP2 offloads to the CPU; its gradients are released "
            "with torch >= 2.13"
        )
