"""The torch.optim contract shared by the four optimizers: groups, states, checkpoints, and the routing of one step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from adax_triton.state import master_weights
from adax_triton.state.allocation import STATE_TENSORS, allocate_states, is_new, state_mismatch
from adax_triton.state.checkpoint import (
    check_state_dict,
    keep_lr_tensors,
    params_with_wrapped_tensors,
    restore,
    with_int_counts,
    with_own_options,
    wrap_tensors,
)
from adax_triton.state.parameters import check_param, is_frozen
from adax_triton.state.precision import precision_for
from adax_triton.state.validation import OLD_CHECKPOINT_DEFAULTS, validate_group
from adax_triton.step.backend import uses_triton
from adax_triton.step.collect import Collected, ParamWithGrad, collect, normalize_counts
from adax_triton.step.conditions import OptimizerOptions, StepConditions, conditions_of
from adax_triton.step.external_grads import (
    ExternalGrads,
    ExternalStep,
    checked_external_grads,
    collect_external,
    params_with_external_grads,
)
from adax_triton.step.frozen_warning import FrozenWarning
from adax_triton.step.launch import LaunchCache
from adax_triton.step.plan import StepPlan
from adax_triton.step.scalars import HostScalars
from adax_triton.step.telemetry import StepSums, StepTelemetry
from adax_triton.update.horizon import FROZEN_WEIGHT

_FEW_PLANS = 64


class MomentOptimizer(Optimizer):
    """Steps parameters by a first moment over the root of a normalised second moment; see the four subclasses.

    State of a parameter, created at its first step with a gradient and from then on updated in place:

    - `step`: int, the steps it has taken; a frozen parameter's does not advance. A 0-d int64 tensor on the GPU if that
      schedules: with `capturable`, `max_grad_norm`, a `GradScaler`, or a learning rate there.
    - `exp_avg`: m, the shape of the parameter; float32 unless the group's `states` say otherwise (float64 and complex
      follow the parameter).
    - `exp_avg_sq`: v, likewise; the normalised second moment. A complex parameter's real and imaginary parts have their
      own.
    - `group_exponents`: beside the codes of `"8bit_v16"` and `"8bit"`, one per 32 elements.
    - `master`: with `master_weights`, what a 16-bit parameter lacks to be the float32 weight.

    `max_grad_norm` may be changed between steps.
    How a state is kept is settled when it is created; its tensors' dtypes say it from then on.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any], options: OptimizerOptions) -> None:
        validate_group(defaults)
        options.check()
        self.options = options
        self.max_grad_norm = options.max_grad_norm
        self._prepare()
        super().__init__(params, defaults)

    # Whether the class itself says that weight decay is decoupled, whatever checkpoint it loads, as torch's AdamW does.
    _is_decoupled = False
    # torch.amp.GradScaler then leaves unscaling and skipping to the step.
    _step_supports_amp_scaling = True

    def _prepare(self) -> None:
        self._launch_cache = LaunchCache()
        self._sums = StepSums() if self.options.telemetry else None
        # By kind and first parameter: ZeRO gives a step one group at a time, and gradient release one parameter.
        self._plans: dict[tuple[str, int], StepPlan] = {}
        self._most_plans = _FEW_PLANS
        self._external_step: ExternalStep | None = None
        self._grad_norm: Tensor | None = None
        self._frozen_warning = FrozenWarning()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with hyper-parameters of its own.

        Args:
            param_group: `{"params": tensor or iterable, ...}`; what it does not say comes from the constructor.

        Raises:
            TypeError: a trained parameter of integers, or a hyper-parameter of the wrong type.
            ValueError: a hyper-parameter out of range, a parameter that is in a group already, or a trained one whose
                states or weights cannot be kept as its group says.

        A frozen parameter may be of any dtype. It is checked when it has a gradient.
        """
        if isinstance(param_group, dict):
            group = {**self.defaults, **param_group}
            validate_group(group)
            if self._is_decoupled and not group["decoupled_weight_decay"]:
                name = type(self).__name__
                raise ValueError(
                    f"Invalid decoupled_weight_decay: False in a group of {name}, which always decouples it; use "
                    f"{name.removesuffix('W')}"
                )
            params = param_group.get("params", [])
            if not isinstance(params, (Tensor, set)):
                params = param_group["params"] = list(params)
            if group["capturable"] and self.options.error_if_nonfinite:
                raise ValueError(
                    "Invalid error_if_nonfinite: True beside capturable=True; the host cannot look at the norm"
                )
            for index, entry in enumerate([params] if isinstance(params, Tensor) else params):
                param, name = entry[1] if isinstance(entry, tuple) else entry, f"params[{index}]"
                if not isinstance(param, Tensor):
                    raise TypeError(
                        f"{name}: optimizer can only optimize Tensors, but one of the params is {type(param)}"
                    )
                if not is_frozen(param):  # else when it has a gradient
                    check_param(param, name, group, self.options.keep_float32)
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: clears gradients, recomputes the loss and returns it; called with gradients enabled.

        Returns:
            What the closure returned.

        Raises:
            TypeError, ValueError: a gradient or a state of the wrong dtype, shape or device; nothing has changed then.
            RuntimeError: the norm of the gradients is not finite, and `error_if_nonfinite` was asked for; or a CUDA
                graph is being captured without `capturable=True`, or without a step before it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            if torch.compiler.is_dynamo_compiling():
                self._step_as_written()
            else:
                self._step()
        return loss

    # In a function that torch.compile traces, a step breaks the graph once. Traced into, its counts and addresses would
    # be constants of what is compiled, and each step would compile again.
    @torch._disable_dynamo
    def _step_as_written(self) -> None:
        self._step()

    def _step(self) -> None:
        conditions = conditions_of(self)
        if self._external_step is not None:
            beside, self._external_step = self._external_step, None
            return self._step_external(beside, conditions)
        key = "step", next((id(group["params"][0]) for group in self.param_groups if group["params"]), 0)
        plan = self._plans.get(key)
        if plan is None or not plan.matches(self.param_groups, self.state, conditions):
            plan = self._planned(key, collect(self.param_groups, self.state, conditions, self.options.keep_float32))
        self._run(plan, conditions)

    def _planned(self, key: tuple[str, int], collected: Collected, is_whole: bool = True) -> StepPlan:
        """Return a new plan for parameters that are checked, and keep it for later steps if it can serve them."""
        normalize_counts(collected.params, self.state)
        host = HostScalars(
            [
                (one.group_index, 1 if is_new(state) else state["step"] + 1)
                for one in collected.params
                for state in [self.state.get(one.param, {})]
                if not (collected.on_device and uses_triton(one.param))
            ]
        )
        host.compute(self.param_groups)
        # Whatever the user may have got wrong has been refused by now; from here on things change.
        self._create_states([one[:2] for one in collected.params if is_new(self.state[one.param])])
        plan = StepPlan(
            collected,
            host,
            self.param_groups,
            self.state,
            self._launch_cache,
            self.options.telemetry,
            self.options.norm_process_group,
            is_whole,
        )
        self._plans.pop(key, None)
        if key[0] == "step" or len(self._plans) >= self._most_plans:
            # Plans keep their tensors alive, also those of parameters that have been replaced.
            self._plans = {other: kept for other, kept in self._plans.items() if kept.belongs_to(self.state)}
            self._most_plans = 2 * len(self._plans) + _FEW_PLANS
        if plan.is_reusable:
            self._plans[key] = plan
        return plan

    def _run(self, plan: StepPlan, conditions: StepConditions) -> None:
        result = plan.run(self.param_groups, conditions, self.options.error_if_nonfinite, self._sums)
        self._grad_norm = result.grad_norm
        warning = None
        if result.taken and any(row.exp_avg_sq_weight < FROZEN_WEIGHT for row in plan.host.rows):
            group_steps = zip(plan.host.groups, plan.host.steps, strict=True)
            warning = self._frozen_warning.after_host_step(group_steps, self.param_groups)
        if plan.device_rows:
            warning = warning or self._frozen_warning.after_device_step(plan.device_rows, self.param_groups)
        if warning is not None:
            warnings.warn(warning, stacklevel=5)

    def set_external_grads(self, parts: Sequence[ExternalGrads], grad_factor: Tensor | None = None) -> None:
        """Have the next `step()` update these parameters from gradients beside them, and no other parameters.

        Gradients are read once, in their own dtype, and multiplied in float32; the host does not wait for the factor.
        The numbers are those of a step whose `grad` is the product.

        Args:
            parts: the parameters, their gradients, and where to write their weights in another dtype.
            grad_factor: 1 element, any device; multiplies all gradients. Default: None, they are taken as they are.

        Raises:
            TypeError, ValueError: a tensor that does not fit, or an optimizer made with `telemetry`. `step()` raises
                ValueError for a parameter that is in no group or whose steps the device counts, and for clipping.
        """
        self._external_step = checked_external_grads(parts, grad_factor, self.options.telemetry)

    def _step_external(self, beside: ExternalStep, conditions: StepConditions) -> None:
        parts, group_of = beside.parts, self._group_indices()
        key = "external", id(parts[0].param) if parts else 0
        plan = self._plans.get(key)
        known = conditions.is_default and all(part.param in group_of for part in parts)
        if (
            plan is None
            or not known
            or not plan.matches(self.param_groups, self.state, conditions, params_with_external_grads(parts, group_of))
        ):
            checked_external_grads(parts, beside.grad_factor, telemetry=False)  # a tensor may have changed since
            collected = collect_external(parts, conditions, group_of, self.param_groups, self.state)
            plan = self._planned(key, collected, is_whole=False)
        self._run(plan, conditions._replace(grad_factor=beside.grad_factor))

    def _step_one(self, param: Tensor, group_index: int, grad_scale: Tensor | None) -> None:
        conditions, key = StepConditions(grad_scale), ("release", id(param))
        plan = self._plans.get(key)
        given = [ParamWithGrad(param, group_index, (param.grad,))] if param.grad is not None else []
        if plan is None or not plan.matches(self.param_groups, self.state, conditions, given):
            only = {param: group_index}
            collected = collect(self.param_groups, self.state, conditions, self.options.keep_float32, only)
            plan = self._planned(key, collected, is_whole=False)
        self._run(plan, conditions)

    def _create_states(self, params: list[tuple[Tensor, int]]) -> None:
        keep_float32 = self.options.keep_float32
        precisions = [precision_for(param, self.param_groups[index], keep_float32) for param, index in params]
        tensors = [param for param, _ in params]
        for param, state in zip(tensors, allocate_states(tensors, precisions), strict=True):
            self.state[param].update(state)

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients of the last step, unscaled: 0-d float32, a new tensor; None unless it was measured."""
        return None if self._grad_norm is None else self._grad_norm.clone()

    def read_telemetry(self, per_parameter: bool = False) -> StepTelemetry:
        """Return norms and counts of the last step; the host waits for it to be done.

        Where parameters are DTensors all ranks must call it, and get the numbers of the whole parameters.

        Args:
            per_parameter: whether to return those of single parameters too. Default: False.

        Raises:
            RuntimeError: the optimizer was made without `telemetry=True`, or has not stepped.
        """
        if self._sums is None:
            raise RuntimeError("read_telemetry(): the optimizer was made without telemetry=True")
        return self._sums.read(len(self.param_groups), per_parameter)

    def master_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a model's state dict with float32 weights: the masters, where this optimizer keeps them.

        Args:
            model: whose parameters this optimizer steps.

        Returns:
            The keys of `model.state_dict()`; new tensors. Floating-point parameters are float32, each the exact weight
            that the optimizer trains; all else is as in the model.
        """
        return master_weights.export(model, self.state)

    def load_master_state_dict(self, model: nn.Module, state_dict: dict[str, Tensor]) -> None:
        """Load float32 weights into a model and into the masters that this optimizer keeps.

        Args:
            model: whose parameters this optimizer steps.
            state_dict: as from `master_state_dict`; every parameter and buffer of the model.

        Raises:
            ValueError: keys or shapes that do not fit; nothing has changed then.
        """
        master_weights.check(model, state_dict)
        group_of = self._group_indices()
        owned = [param for param in model.parameters() if param in group_of and not is_frozen(param)]
        # A parameter that has not been stepped yet has nowhere to put what its 16 bits do not hold.
        self._create_states([(param, group_of[param]) for param in owned if is_new(self.state[param])])
        master_weights.load(model, self.state, state_dict)

    def _group_indices(self) -> dict[Tensor, int]:
        return {param: index for index, group in enumerate(self.param_groups) for param in group["params"]}

    def state_dict(self) -> dict[str, Any]:
        """Return states and groups as `torch.optim.Optimizer.state_dict` does; counts of steps as ints."""
        # As the first of the post-hooks, before the user's own make of it what they like.
        handle = self.register_state_dict_post_hook(lambda _, given: with_int_counts(given), prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the same rule; states keep their dtypes whatever the parameters'.

        Args:
            state_dict: from `state_dict()` of an optimizer with groups of the same sizes, in any precision. It is
                copied, never aliased. This optimizer's `states`, `master_weights` and `weight_rounding` stay as they
                are: states kept otherwise are converted, exactly where the new form can hold the old, else to nearest.

        Raises:
            ValueError, TypeError: it does not fit; nothing has changed then.
        """

        def check_and_hold(optimizer: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            check_state_dict(given, optimizer.param_groups)
            held = wrap_tensors(given, optimizer.state)
            return {**held, "param_groups": with_own_options(optimizer.param_groups, given)}

        # As the last of the pre-hooks it sees what the user's own have made of the state dict.
        handle = self.register_load_state_dict_pre_hook(check_and_hold)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        before, own_groups = self.__dict__.get("state", {}), self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        keep_lr_tensors(self.param_groups, own_groups)
        if "_memory" not in self.__dict__:  # unpickled; else captured graphs read its tables
            self._prepare()
        self._plans.clear()
        for group in self.param_groups:
            for key, value in OLD_CHECKPOINT_DEFAULTS.items():
                group.setdefault(key, value)
            group["decoupled_weight_decay"] |= self._is_decoupled
        held = {param: self.state[param] for param in params_with_wrapped_tensors(self.state)}
        group_of = self._group_indices()
        for param in held:
            # Into the tensors there are; but a framework may have emptied them, or the user moved the parameter.
            existing = before.get(param, {})
            own = {name: value for name, value in existing.items() if name in ("step", *STATE_TENSORS)}
            self.state[param] = own if state_mismatch(existing, param) is None else {}
        self._create_states([(param, group_of[param]) for param in held if is_new(self.state[param])])
        for param, values in held.items():
            restore(values, into=self.state[param], param=param)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "options": self.options, "max_grad_norm": self.max_grad_norm}
