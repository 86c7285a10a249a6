"""The torch.optim contract shared by the four optimizers: groups, states, checkpoints, and the routing of one step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .backends import Stepper, TensorStep
from .checkpoint import check_state_dict, held_params, hold_tensors, misfit, restore
from .flat_buffer import FlatBuffer
from .hyperparameters import as_float, validate_group
from .precision import PARAM_DTYPES, state_dtype
from .schedule import StepScalars, step_scalars

# Groups of checkpoints and pickles written before a key existed get its default.
_LATER_GROUP_DEFAULTS: dict[str, Any] = {"decoupled_weight_decay": False, "maximize": False}


class MomentOptimizer(Optimizer):
    """Steps parameters by a first moment over the root of a normalised second moment; see the four subclasses.

    State of a parameter, created at its first step with a gradient and from then on updated in place:

    - `step`: int, the steps it has taken; a frozen parameter's does not advance.
    - `exp_avg`: m, the shape of the parameter, float32 (float64 and complex follow the parameter).
    - `exp_avg_sq`: v, likewise; the normalised second moment. A complex parameter's real and imaginary parts have their
      own.
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
        maximize: bool,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "second_moment": second_moment,
            "eps_placement": eps_placement,
            "maximize": maximize,
        }
        validate_group(defaults)
        self._stepper = Stepper()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with hyper-parameters of its own.

        Args:
            param_group: `{"params": tensor or iterable, ...}`; what it does not say comes from the constructor.

        Raises:
            TypeError: an integer parameter, or a hyper-parameter of the wrong type.
            ValueError: a hyper-parameter out of range, or a parameter that is in a group already.
        """
        if isinstance(param_group, dict):
            validate_group({**self.defaults, **param_group})
            params = param_group.get("params", [])
            if not isinstance(params, (Tensor, set)):
                params = param_group["params"] = list(params)
            for index, entry in enumerate([params] if isinstance(params, Tensor) else params):
                _check_param(entry[1] if isinstance(entry, tuple) else entry, index)
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
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        # A dict, because a group may name a parameter twice (torch only warns): two updates in one launch would race.
        group_of = {
            param: group_index
            for group_index, group in enumerate(self.param_groups)
            for param in group["params"]
            if param.grad is not None
        }
        due = [(param, _checked_gradient(param), group_index) for param, group_index in group_of.items()]
        rows: dict[tuple[int, int], int] = {}
        for param, _, group_index in due:
            state = self.state.get(param)
            problem = misfit(state, param) if state else None
            if problem is not None:
                raise ValueError(problem)
            rows.setdefault((group_index, state["step"] + 1 if state else 1), len(rows))
        scalars = [self._scalars(group_index, step) for group_index, step in rows]
        # Whatever the user may have got wrong has been refused by now; from here on things change.
        self._create_states([param for param, _, _ in due if not self.state[param]])
        steps = []
        for param, grad, group_index in due:
            state = self.state[param]
            state["step"] += 1
            row = rows[group_index, state["step"]]
            step = TensorStep(param.detach(), grad, state["exp_avg"], state["exp_avg_sq"], row)
            steps.append(step.mapped(torch.view_as_real) if param.is_complex() else step)
        self._stepper.run(steps, scalars)

    def _scalars(self, group_index: int, step: int) -> StepScalars:
        group = self.param_groups[group_index]
        return step_scalars(
            step=step,
            lr=as_float(group["lr"], "lr"),
            betas=(as_float(group["betas"][0], "betas[0]"), as_float(group["betas"][1], "betas[1]")),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
            second_moment=group["second_moment"],
            eps_placement=group["eps_placement"],
            maximize=group["maximize"],
        )

    def _create_states(self, params: list[Tensor]) -> None:
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for param in params:
            by_kind[param.device, state_dtype(param.dtype).to_real()].append(param)
        for (_, dtype), alike in by_kind.items():
            reals = [torch.view_as_real(param.detach()) if param.is_complex() else param.detach() for param in alike]
            exp_avgs, exp_avg_sqs = (FlatBuffer(reals, dtype=dtype).views for _ in range(2))
            for param, exp_avg, exp_avg_sq in zip(alike, exp_avgs, exp_avg_sqs, strict=True):
                as_param = torch.view_as_complex if param.is_complex() else torch.Tensor.detach
                self.state[param].update(step=0, exp_avg=as_param(exp_avg), exp_avg_sq=as_param(exp_avg_sq))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the same rule; states keep float32 whatever the parameters' dtype.

        Args:
            state_dict: from `state_dict()` of an optimizer with groups of the same sizes. It is copied, never aliased.

        Raises:
            ValueError, TypeError: it does not fit; nothing has changed then.
        """

        def check_and_hold(optimizer: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            check_state_dict(given, optimizer.param_groups)
            return hold_tensors(given)

        # As the last of the pre-hooks it sees what the user's own have made of the state dict.
        handle = self.register_load_state_dict_pre_hook(check_and_hold)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("state", {})
        super().__setstate__(state)
        self._stepper = Stepper()
        for group in self.param_groups:
            for key, value in _LATER_GROUP_DEFAULTS.items():
                group.setdefault(key, value)
        held = {param: self.state[param] for param in held_params(self.state)}
        for param in held:
            # Into the tensors there are; but a framework may have emptied them, or the user moved the parameter.
            existing = before.get(param, {})
            self.state[param] = existing if misfit(existing, param) is None else {}
        self._create_states([param for param in held if not self.state[param]])
        for param, values in held.items():
            restore(values, into=self.state[param])


def _check_param(param: Any, index: int) -> None:
    if not isinstance(param, Tensor):
        raise TypeError(f"params[{index}]: optimizer can only optimize Tensors, but one of the params is {type(param)}")
    if is_traceable_wrapper_subclass(param):  # its data_ptr() is not that of its elements
        raise TypeError(f"params[{index}]: no step for {type(param)}, which wraps the tensors that hold its elements")
    if param.dtype.to_real() not in PARAM_DTYPES:
        raise TypeError(
            f"params[{index}]: no step for dtype {param.dtype}; expected float32, bfloat16, float16 or float64"
        )


def _checked_gradient(param: Tensor) -> Tensor:
    grad = param.grad
    assert grad is not None
    if grad.shape != param.shape:
        raise ValueError(f"grad: shape {tuple(grad.shape)} for a parameter of shape {tuple(param.shape)}")
    if grad.device != param.device:
        raise ValueError(f"grad: on {grad.device} for a parameter on {param.device}")
    if grad.is_complex() != param.is_complex() or not (grad.is_complex() or grad.is_floating_point()):
        raise TypeError(f"grad: dtype {grad.dtype} for a parameter of dtype {param.dtype}")
    if grad.dtype.to_real() not in PARAM_DTYPES:
        raise TypeError(f"grad: no step for dtype {grad.dtype}; expected float32, bfloat16, float16 or float64")
    # Every element decays and moves at every step, so a sparse gradient is a dense one with zeros.
    dense = grad if grad.layout == torch.strided else grad.to_dense()
    # The memory of a lazily conjugated or negated tensor, which is what the kernel reads, does not hold its values.
    return dense.resolve_conj().resolve_neg()
