"""The torch.optim contract of the four optimizers: groups, states, checkpoints, steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT
from torch.utils.hooks import RemovableHandle

from adax_triton.state import master_weights
from adax_triton.state.allocation import STATE_TENSORS, allocate_states, is_new, state_mismatch
from adax_triton.state.checkpoint import (
    check_state_dict,
    copy_loaded_state,
    keep_lr_tensors,
    params_with_wrapped_tensors,
    with_int_counts,
    with_kept_options,
    without_placeholders,
    wrap_tensors,
)
from adax_triton.state.keywords import remove_torch_keywords, signature_with_shared_options
from adax_triton.state.parameters import check_param, is_frozen
from adax_triton.state.precision import precision_for
from adax_triton.state.validation import OLD_CHECKPOINT_DEFAULTS, check_changed_betas, validate_group
from adax_triton.step.backend import uses_triton
from adax_triton.step.collect import Collected, ParamWithGrad, collect, normalize_counts
from adax_triton.step.external_grads import (
    ExternalGrads,
    ExternalStep,
    checked_external_grads,
    collect_external,
    params_with_external_grads,
)
from adax_triton.step.frozen_warning import FrozenWarning
from adax_triton.step.gradient_handling import (
    DEFAULT_HANDLING,
    GradientHandling,
    OptimizerOptions,
    check_sees_whole_gradients,
    gradient_handling_of,
)
from adax_triton.step.launch import LaunchCache
from adax_triton.step.plan import StepPlan
from adax_triton.step.scalars import HostScalars
from adax_triton.step.telemetry import StepSums, StepTelemetry
from adax_triton.update.horizon import FROZEN_WEIGHT

# A cleanup drops unused plans. The next one runs at `_MIN_PLAN_LIMIT + 2 * (plans kept)` plans.
_MIN_PLAN_LIMIT = 64


class MomentOptimizer(Optimizer):
    """Base of the four optimizers.

        p -= lr m / (sqrt(v) + eps)

    v is a normalised second moment.

    A parameter's state is created at its first step with a gradient, and updated in place from then on:

    - `step`: int, number of steps with a gradient. It is a 0-d int64 tensor on the GPU if the GPU counts steps: with
      `capturable`, `max_grad_norm`, a `GradScaler` with `fused`, or a learning rate on the GPU.
    - `exp_avg`: m, same shape as the parameter; float32 unless `states` says otherwise. float64 and complex
      parameters keep their own dtype.
    - `exp_avg_sq`: v, as `exp_avg`. A complex parameter has one v for the real and one for the imaginary part.
    - `group_exponents`: one exponent per 32 elements; only with 8-bit states.
    - `master`: low bits of the float32 weight (bfloat16) or a float32 copy (float16); only with `master_weights`.

    Precision is fixed when a state is created and read back from its dtypes.

    `max_grad_norm` may change between steps.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float | Tensor,
        betas: tuple[float | Tensor, float | Tensor],
        eps: float,
        weight_decay: float,
        decoupled_weight_decay: bool,
        second_moment: str,
        eps_placement: str,
        maximize: bool = False,
        states: str = "float32",
        master_weights: str | None = None,
        weight_rounding: str = "nearest",
        seed: int = 0,
        keep_float32: Callable[[Tensor], bool] | None = None,
        capturable: bool = False,
        max_grad_norm: float | None = None,
        error_if_nonfinite: bool = False,
        norm_process_group: Any = None,
        telemetry: bool = False,
        fused: bool | None = None,
        foreach: bool | None = None,
        amsgrad: bool = False,
        differentiable: bool = False,
    ) -> None:
        remove_torch_keywords(
            {"fused": fused, "foreach": foreach, "amsgrad": amsgrad, "differentiable": differentiable}
        )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "second_moment": second_moment,
            "eps_placement": eps_placement,
            "maximize": maximize,
            "states": states,
            "master_weights": master_weights,
            "weight_rounding": weight_rounding,
            "seed": seed,
            "capturable": capturable,
        }
        validate_group(defaults)
        self.options = OptimizerOptions(
            keep_float32, max_grad_norm, error_if_nonfinite, norm_process_group, telemetry, fused is True
        )
        self.options.check()
        self.max_grad_norm = max_grad_norm
        self._prepare()
        super().__init__(params, defaults)

    def __init_subclass__(cls) -> None:
        """List the shared options in the class's signature."""
        super().__init_subclass__()
        cls.__signature__ = signature_with_shared_options(cls, MomentOptimizer)  # type: ignore[attr-defined]

    # True: weight decay is always decoupled, and a loaded checkpoint does not change this, as in torch's AdamW.
    _is_decoupled = False

    def _prepare(self) -> None:
        # True tells torch.amp.GradScaler that `step` unscales gradients and skips steps itself.
        self._step_supports_amp_scaling = self.options.fused
        self._launch_cache = LaunchCache()
        self._sums = StepSums() if self.options.telemetry else None
        # Keyed by kind of step and first parameter: ZeRO steps one group at a time, GradientRelease one parameter.
        self._plans: dict[tuple[str, int], StepPlan] = {}
        self._plan_limit = _MIN_PLAN_LIMIT
        self._external_step: ExternalStep | None = None
        self._grad_norm: Tensor | None = None
        self._frozen_warning = FrozenWarning()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group with its own hyper-parameters.

        Args:
            param_group: `{"params": tensor or iterable, ...}`. Missing keys take the constructor's values. A frozen
                parameter may have any dtype; it is checked once it has a gradient.

        Raises:
            TypeError: a trained parameter holds integers, or a hyper-parameter has the wrong type.
            ValueError: a hyper-parameter is out of range, a parameter already belongs to a group, or a trained
                parameter does not support the group's `states`, `master_weights` or `weight_rounding`. FSDP1 shards a
                parameter, and the optimizer clips.
        """
        if isinstance(param_group, dict):
            remove_torch_keywords(param_group)
            group = {**self.defaults, **param_group}
            validate_group(group)
            if self._is_decoupled and not group["decoupled_weight_decay"]:
                name = type(self).__name__
                raise ValueError(
                    f"Invalid decoupled_weight_decay: False in a parameter group; {name} accepts True only, use "
                    f"{name.removesuffix('W')}"
                )
            params = param_group.get("params", [])
            if not isinstance(params, (Tensor, set)):
                params = param_group["params"] = list(params)
            if group["capturable"] and self.options.error_if_nonfinite:
                raise ValueError(
                    "Invalid error_if_nonfinite: True with capturable=True, where the host cannot read the norm; set "
                    "one of them to False"
                )
            for index, entry in enumerate([params] if isinstance(params, Tensor) else params):
                param, name = entry[1] if isinstance(entry, tuple) else entry, f"params[{index}]"
                if not isinstance(param, Tensor):
                    raise TypeError(
                        f"{name}: optimizer can only optimize Tensors, but one of the params is {type(param)}"
                    )
                if not is_frozen(param):  # a frozen one is checked once it has a gradient
                    check_param(param, name, group, self.options.keep_float32)
                check_sees_whole_gradients([param], self.max_grad_norm, self.options.norm_process_group)
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: function that clears the gradients, computes the loss, calls `backward()` and returns the loss.
                Called with gradients enabled.

        Returns:
            The loss of the closure, or None.

        Raises:
            TypeError, ValueError: a gradient or a state has the wrong dtype, shape or device, or a group has invalid
                betas. Nothing has changed.
            RuntimeError: the gradient norm is not finite and `error_if_nonfinite` is True; Triton is missing; or a
                CUDA graph capture runs without `capturable=True` or without an earlier step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            if torch.compiler.is_dynamo_compiling():
                self._step_untraced()
            else:
                self._step()
        return loss

    # Breaks the graph of torch.compile once. If it were traced, step counts and addresses would become constants and
    # each step would compile again.
    @torch._disable_dynamo
    def _step_untraced(self) -> None:
        self._step()

    def _step(self) -> None:
        check_changed_betas(self.param_groups)
        handling = gradient_handling_of(self)
        if self._external_step is not None:
            external_step, self._external_step = self._external_step, None
            return self._step_external(external_step, handling)
        key = "step", next((id(group["params"][0]) for group in self.param_groups if group["params"]), 0)
        plan = self._plans.get(key)
        if plan is None or not plan.try_reuse(self.param_groups, self.state, handling):
            plan = self._new_plan(key, collect(self.param_groups, self.state, handling, self.options.keep_float32))
        self._run(plan, handling)

    def _new_plan(self, key: tuple[str, int], collected: Collected, covers_all_params: bool = True) -> StepPlan:
        """Return a new plan for checked parameters.

        Keeps the plan if later steps can reuse it.
        """
        normalize_counts(collected.params, self.state)
        host_scalars = HostScalars(
            [
                (item.group_index, 1 if is_new(state) else state["step"] + 1)
                for item in collected.params
                for state in [self.state.get(item.param, {})]
                if not (collected.counts_on_device and uses_triton(item.param))
            ]
        )
        host_scalars.compute(self.param_groups)
        # All checks have passed; state changes start here.
        self._create_states([item[:2] for item in collected.params if is_new(self.state[item.param])])
        plan = StepPlan(
            collected,
            host_scalars,
            self.param_groups,
            self.state,
            self._launch_cache,
            self.options.telemetry,
            self.options.norm_process_group,
            covers_all_params,
        )
        self._plans.pop(key, None)
        if key[0] == "step" or len(self._plans) >= self._plan_limit:
            # A plan keeps its tensors alive, so drop the plans of replaced parameters.
            self._plans = {other: old for other, old in self._plans.items() if old.belongs_to(self.state)}
            self._plan_limit = 2 * len(self._plans) + _MIN_PLAN_LIMIT
        if plan.is_reusable:
            self._plans[key] = plan
        return plan

    def _run(self, plan: StepPlan, handling: GradientHandling) -> None:
        result = plan.run(self.param_groups, handling, self.options.error_if_nonfinite, self._sums)
        self._grad_norm = result.grad_norm
        warning = None
        if result.taken and any(row.exp_avg_sq_weight < FROZEN_WEIGHT for row in plan.host_scalars.rows):
            group_steps = zip(plan.host_scalars.groups, plan.host_scalars.steps, strict=True)
            warning = self._frozen_warning.after_host_step(group_steps, self.param_groups)
        if plan.device_rows:
            warning = warning or self._frozen_warning.after_device_step(plan.device_rows, self.param_groups)
        if warning is not None:
            warnings.warn(warning, stacklevel=5)

    def register_step_post_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Call a function after each step.

        Raises:
            RuntimeError: the function logs telemetry, and the optimizer records none.
        """
        if getattr(hook, "reads_telemetry", False) is True and not self.options.telemetry:
            raise RuntimeError(
                f"{type(hook).__name__} logs telemetry, but the optimizer records none; create it with telemetry=True"
            )
        return super().register_step_post_hook(hook)

    def set_external_grads(self, parts: Sequence[ExternalGrads], grad_factor: Tensor | None = None) -> None:
        """Make the next `step()` use external gradients.

        The next step updates these parameters and no others.

        ZeRO keeps float32 weights in addition to the model's low-precision weights. A gradient is one or more tensors
        in the model's dtype. The step reads each gradient once in its own dtype, multiplies it by `grad_factor` in
        float32, and writes the new weights in the model's dtype too. The result is that of a step with
        `grad * grad_factor`; the host does not wait for the factor.

        Args:
            parts: parameters with their gradients and low-precision copies; see `ExternalGrads`.
            grad_factor: 1 element on any device; multiplies all gradients. Default: None, no factor.

        Raises:
            TypeError, ValueError: a tensor does not fit, or the optimizer was made with `telemetry=True`. The next
                `step()` raises ValueError if a parameter is in no group, if the device counts steps, or if
                `max_grad_norm` is set.
        """
        self._external_step = checked_external_grads(parts, grad_factor, self.options.telemetry)

    def _step_external(self, external_step: ExternalStep, handling: GradientHandling) -> None:
        parts, group_of = external_step.parts, self._group_indices()
        key = "external", id(parts[0].param) if parts else 0
        plan = self._plans.get(key)
        may_reuse = handling.is_default and all(part.param in group_of for part in parts)
        if (
            plan is None
            or not may_reuse
            or not plan.try_reuse(self.param_groups, self.state, handling, params_with_external_grads(parts, group_of))
        ):
            # Check again: a tensor may have changed since `set_external_grads`.
            checked_external_grads(parts, external_step.grad_factor, telemetry=False)
            collected = collect_external(parts, handling, group_of, self.param_groups, self.state)
            plan = self._new_plan(key, collected, covers_all_params=False)
        self._run(plan, handling._replace(grad_factor=external_step.grad_factor))

    def _step_one(self, param: Tensor, group_index: int) -> None:
        check_changed_betas(self.param_groups[group_index : group_index + 1])
        handling, key = DEFAULT_HANDLING, ("release", id(param))
        plan = self._plans.get(key)
        params = [ParamWithGrad(param, group_index, (param.grad,))] if param.grad is not None else []
        if plan is None or not plan.try_reuse(self.param_groups, self.state, handling, params):
            only = {param: group_index}
            collected = collect(self.param_groups, self.state, handling, self.options.keep_float32, only)
            plan = self._new_plan(key, collected, covers_all_params=False)
        self._run(plan, handling)

    def _create_states(self, params: list[tuple[Tensor, int]]) -> None:
        keep_float32 = self.options.keep_float32
        precisions = [precision_for(param, self.param_groups[index], keep_float32) for param, index in params]
        tensors = [param for param, _ in params]
        for param, state in zip(tensors, allocate_states(tensors, precisions), strict=True):
            self.state[param].update(state)

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all unscaled gradients of the last step, 0-d float32.

        None without `max_grad_norm`.
        """
        return None if self._grad_norm is None else self._grad_norm.clone()

    def read_telemetry(self, per_parameter: bool = False) -> StepTelemetry:
        """Return norms and counts of the last step.

        The host waits until the step is done. With DTensor parameters every rank must call it; each gets the numbers of
        the full parameters.

        Args:
            per_parameter: return the numbers of each parameter too. Default: False.

        Raises:
            RuntimeError: the optimizer was made without `telemetry=True`, or has not stepped yet.
        """
        if self._sums is None:
            raise RuntimeError("read_telemetry(): no telemetry was recorded; create the optimizer with telemetry=True")
        return self._sums.read(len(self.param_groups), per_parameter)

    def master_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a model's state dict with exact float32 weights.

        The weights include the bits of the master weights.

        Args:
            model: the model that this optimizer trains.

        Returns:
            New tensors under the keys of `model.state_dict()`. Floating-point parameters are float32 and hold the
            exact weights that the optimizer trains. Everything else is as in the model.
        """
        return master_weights.export(model, self.state)

    def load_master_state_dict(self, model: nn.Module, state_dict: dict[str, Tensor]) -> None:
        """Load float32 weights into a model and into this optimizer's master weights.

        Args:
            model: the model that this optimizer trains.
            state_dict: from `master_state_dict`; must hold every parameter and buffer of the model.

        Raises:
            ValueError: keys or shapes do not fit. Nothing has changed.
        """
        master_weights.check(model, state_dict)
        group_of = self._group_indices()
        owned = [param for param in model.parameters() if param in group_of and not is_frozen(param)]
        # A parameter without a step has no master weights yet.
        self._create_states([(param, group_of[param]) for param in owned if is_new(self.state[param])])
        master_weights.load(model, self.state, state_dict)

    def _group_indices(self) -> dict[Tensor, int]:
        return {param: index for index, group in enumerate(self.param_groups) for param in group["params"]}

    def state_dict(self) -> dict[str, Any]:
        """Return states and groups as `torch.optim.Optimizer.state_dict`, with step counts as ints."""
        # Run before the user's post-hooks, so that they see int step counts.
        handle = self.register_state_dict_post_hook(lambda _, given: with_int_counts(given), prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict from an optimizer of the same kind.

        This optimizer keeps its own `states`, `master_weights` and `weight_rounding`. States in another precision are
        converted: exactly if the new precision can represent the values, else rounded to nearest. The tensors are
        copied.

        Args:
            state_dict: from `state_dict()` of an optimizer with groups of the same sizes.

        Raises:
            ValueError, TypeError: the state dict does not fit. Nothing has changed.
        """

        def check_and_wrap(optimizer: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            saved = without_placeholders(given, optimizer.param_groups, optimizer.state)
            check_state_dict(saved, optimizer.param_groups)
            wrapped = wrap_tensors(saved, optimizer.state)
            return {**wrapped, "param_groups": with_kept_options(optimizer.param_groups, saved)}

        # Run after the user's pre-hooks, to see their result.
        handle = self.register_load_state_dict_pre_hook(check_and_wrap)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        before, current_groups = self.__dict__.get("state", {}), self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        keep_lr_tensors(self.param_groups, current_groups)
        if "_launch_cache" not in self.__dict__:  # unpickled; otherwise keep the tables that captured graphs read
            self._prepare()
        self._plans.clear()
        for group in self.param_groups:
            for key, value in OLD_CHECKPOINT_DEFAULTS.items():
                group.setdefault(key, value)
            group["decoupled_weight_decay"] |= self._is_decoupled
        loaded = {param: self.state[param] for param in params_with_wrapped_tensors(self.state)}
        group_of = self._group_indices()
        for param in loaded:
            # Load into the existing tensors, unless a framework freed them or the user moved the parameter.
            existing = before.get(param, {})
            kept = {name: value for name, value in existing.items() if name in ("step", *STATE_TENSORS)}
            self.state[param] = kept if state_mismatch(existing, param) is None else {}
        self._create_states([(param, group_of[param]) for param in loaded if is_new(self.state[param])])
        for param, values in loaded.items():
            copy_loaded_state(values, self.state[param], param)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "options": self.options, "max_grad_norm": self.max_grad_norm}
