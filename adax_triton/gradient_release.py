"""Step each parameter in the backward pass and free its gradient."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from .moment_optimizer import MomentOptimizer


class GradientRelease:
    """Steps each parameter in the backward pass, then frees its gradient.

    A parameter is stepped as soon as the backward pass has computed its gradient.

        optimizer = AdaXW(model.parameters())
        GradientRelease(optimizer)
        loss.backward()  # updates the parameters; every `param.grad` is None afterwards

    Each gradient is freed as soon as its parameter is updated, which lowers peak memory. The results are those of
    `step()`, bit for bit. `step()` may stay in the training loop; it then finds no gradients.

    - Groups and learning rates are read when a parameter is stepped.
    - A parameter that the model uses twice is stepped once, by the sum of its gradients.
    - A parameter that is added or unfrozen later is stepped at the end of its first backward pass. In later passes it
      is stepped like the others.
    - Gradient release does not support clipping, accumulation over several backward passes, or `GradScaler`: each
      needs all gradients at once. Train in bfloat16 instead of using a `GradScaler`.
    - FSDP2 works: it reduces gradients before their hooks run, and accumulates them with
      `set_requires_gradient_sync`. `DistributedDataParallel` is not supported: it reduces gradients after their
      hooks, so the first backward pass raises.
    - A reentrant checkpoint runs its own backward pass, so two of them must not share a parameter. Use
      `use_reentrant=False` if they do.
    - Under `torch.compile` one graph node returns all gradients, so they exist at the same time.

    Args:
        optimizer: one of this package, without `max_grad_norm` and `telemetry`.

    Raises:
        TypeError: `optimizer` is not one of this package.
        ValueError: the optimizer clips or records telemetry; or a parameter belongs to another `GradientRelease`, to
            FSDP1, or to FSDP2 with CPU offload and torch < 2.13, which runs hooks before the gradient reaches the CPU.
        RuntimeError: a `GradScaler` has been used with the optimizer; backward passes and `step()` raise it too.

    A backward pass raises the errors of `step()`. Parameters that it stepped before the error stay stepped.
    """

    def __init__(self, optimizer: MomentOptimizer) -> None:
        if not isinstance(optimizer, MomentOptimizer):
            raise TypeError(
                f"Invalid type of optimizer: got {type(optimizer).__module__}.{type(optimizer).__name__}; "
                "GradientRelease accepts adax_triton's AdaX, AdaXW, Adam and AdamW"
            )
        if optimizer.options.telemetry:
            raise ValueError(
                "Invalid optimizer: made with telemetry=True; GradientRelease does not support telemetry, which "
                "measures whole steps"
            )
        self._optimizer = optimizer
        self._hooked: set[Tensor] = set()
        self._group_of: dict[Tensor, int] = {}  # read once per backward pass
        self._handles: list[RemovableHandle] = []
        self._stepped: set[Tensor] = set()
        # Weak: if a backward pass fails, autograd frees the callback, and the next pass starts anew.
        self._end_callback: weakref.ref[Callable[[], None]] | None = None
        # Autograd runs one thread per device.
        self._lock = threading.Lock()
        self._check_optimizer()
        new_params = self._params_without_hook()
        for param, group_index in new_params.items():
            _check_param(param, group_index)
        self._hook(new_params)
        self._handles.append(optimizer.register_step_pre_hook(lambda *_: self._check_optimizer()))
        optimizer._step_supports_amp_scaling = True  # a GradScaler then sets `grad_scale`, which raises

    def remove(self) -> None:
        """Remove the hooks: gradients stay and `step()` steps again.

        Leaving a `with` block does the same.
        """
        if self._handles:
            self._optimizer._step_supports_amp_scaling = self._optimizer.options.fused
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
                f"Invalid max_grad_norm: {self._optimizer.max_grad_norm}; GradientRelease does not support clipping; "
                "set it to None"
            )
        for name in ("grad_scale", "found_inf"):
            if getattr(self._optimizer, name, None) is not None:
                raise RuntimeError(
                    f"{name} is set: GradientRelease does not support GradScaler; train in bfloat16 without a scaler"
                )

    def _params_without_hook(self) -> dict[Tensor, int]:
        """Return the trained parameters without a hook, with their group indices."""
        return {
            param: group_index
            for group_index, group in enumerate(self._optimizer.param_groups)
            for param in group["params"]
            if param not in self._hooked and param.requires_grad
        }

    def _hook(self, params: Iterable[Tensor]) -> None:
        self._hooked.update(params)
        self._handles += [param.register_post_accumulate_grad_hook(self._on_gradient) for param in params]

    # Compiled autograd would otherwise trace the hook into the compiled backward pass.
    @torch._disable_dynamo
    def _on_gradient(self, param: Tensor) -> None:
        with self._lock, torch.no_grad():
            if self._end_callback is None or self._end_callback() is None:
                self._begin_backward()
            self._step_and_free(param)

    def _begin_backward(self) -> None:
        self._check_optimizer()
        self._stepped.clear()
        self._group_of = self._optimizer._group_indices()

        def end() -> None:
            # Queued again, so that it runs after the callbacks of FSDP2 and DDP.
            Variable._execution_engine.queue_callback(self._end_backward)

        Variable._execution_engine.queue_callback(end)
        self._end_callback = weakref.ref(end)

    def _step_and_free(self, param: Tensor) -> None:
        if param not in self._group_of:  # removed from its group; `step()` would skip it too
            return
        if param in self._stepped:
            raise RuntimeError(
                f"GradientRelease updated a parameter of shape {tuple(param.shape)} with only part of its gradient: "
                "two reentrant checkpoints share the parameter; pass use_reentrant=False to them"
            )
        self._optimizer._step_one(param, self._group_of[param])
        param.grad = None
        self._stepped.add(param)

    @torch._disable_dynamo
    def _end_backward(self) -> None:
        with self._lock, torch.no_grad():
            self._end_callback = None
            for param in self._stepped:
                if param.grad is not None:
                    raise RuntimeError(
                        f"A parameter of shape {tuple(param.shape)} got a second gradient after GradientRelease "
                        "updated it. DistributedDataParallel causes this: it reduces gradients after their hooks, so "
                        "this step used only the gradients of this rank. Use FSDP2 (fully_shard), or train without "
                        "GradientRelease"
                    )
            new_params = self._params_without_hook()
            self._hook(new_params)
            self._group_of.update(new_params)
            for param in new_params:
                if param.grad is not None:
                    self._step_and_free(param)


def _check_param(param: Tensor, group_index: int) -> None:
    name = f"param_groups[{group_index}]"
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    if any(isinstance(getattr(hook, "__self__", None), GradientRelease) for hook in hooks.values()):
        raise ValueError(f"{name}: a parameter belongs to another GradientRelease; call its remove() first")
    if getattr(param, "_fsdp_flattened", False):  # its hooks run before gradients are reduced, or never
        raise ValueError(f"{name}: a parameter belongs to FSDP1; GradientRelease needs FSDP2 (fully_shard)")
    mesh = getattr(param, "device_mesh", None)
    if mesh is not None and mesh.device_type != param.device.type and torch.__version__ < "2.13":
        raise ValueError(
            f"{name}: FSDP2 offloads a parameter to the CPU; GradientRelease needs torch >= 2.13 for that, found "
            f"{torch.__version__}"
        )
