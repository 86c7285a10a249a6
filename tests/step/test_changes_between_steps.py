"""Changes between two steps take effect. Oracle: the reference update."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adax_triton import AdaXW, GradientRelease
from adax_triton.moment_optimizer import MomentOptimizer
from adax_triton.step.external_grads import ExternalGrads
from adax_triton.update.coefficients import COEFFICIENT_KEYS, step_scalars
from adax_triton.update.reference import adax_update

STEP_KINDS = ["plain", "cpu", "clipped", "capturable", "scaler", "external", "release"]
LIMIT, SCALE = 0.5, 4.0
Change = Callable[[MomentOptimizer, nn.Parameter], None]


@pytest.fixture(params=STEP_KINDS)
def step_kind(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("native_cpu")
    return str(request.param)


class Run:
    """Compares every step of an optimizer with the reference update of copies."""

    def __init__(self, step_kind: str, device: torch.device) -> None:
        self.step_kind, self.number = step_kind, 0
        self.params = [nn.Parameter(torch.randn(shape, device=device)) for shape in ((5,), (6, 4), (3, 7))]
        options = {"clipped": {"max_grad_norm": LIMIT}, "capturable": {"capturable": True}}.get(step_kind, {})
        self.optimizer = AdaXW([{"params": self.params[:1]}, {"params": self.params[1:]}], lr=0.01, **options)
        if step_kind == "release":
            GradientRelease(self.optimizer)
        if step_kind == "scaler":
            self.optimizer.grad_scale = torch.tensor(SCALE, device=device)
            self.optimizer.found_inf = torch.zeros((), device=device)

    def gradients(self) -> list[Tensor]:
        self.number += 1
        generator = torch.Generator().manual_seed(self.number)
        return [torch.randn(param.shape, generator=generator).to(param) for param in self.params]

    def step(self, gradients: list[Tensor]) -> None:
        if self.step_kind == "release":
            sum((param * grad).sum() for param, grad in zip(self.params, gradients, strict=True)).backward()
        elif self.step_kind == "external":
            parts = [ExternalGrads(param, [grad]) for param, grad in zip(self.params, gradients, strict=True)]
            self.optimizer.set_external_grads(parts)
            self.optimizer.step()
        else:
            for param, grad in zip(self.params, gradients, strict=True):
                param.grad = grad
            self.optimizer.step()

    def check_step(self, change_gradient: Callable[[Tensor], Tensor] = lambda grad: grad) -> None:
        gradients = self.gradients()
        expected = [self.expected(param, grad) for param, grad in zip(self.params, gradients, strict=True)]
        factor = 1.0
        if self.step_kind == "clipped":
            norm = torch.stack([grad.norm() for grad in gradients]).norm()
            factor = min(1.0, LIMIT / (norm.item() + 1e-6))
        for update in expected:
            update.apply(factor)
        change = change_gradient if self.step_kind != "release" else lambda grad: grad  # autograd makes the gradients
        scale = SCALE if self.step_kind == "scaler" else 1.0
        self.step([change(grad * scale) for grad in gradients])
        for param, update in zip(self.params, expected, strict=True):
            update.check(param, self.optimizer.state[param])

    def expected(self, param: nn.Parameter, grad: Tensor) -> Expected:
        (group,) = (group for group in self.optimizer.param_groups if any(param is own for own in group["params"]))
        return Expected(param, grad, self.optimizer.state.get(param) or {}, group)


class Expected:
    """The expected parameter and state after a step."""

    def __init__(self, param: Tensor, grad: Tensor, state: dict, group: dict) -> None:
        zeros = torch.zeros_like(param)
        tensors = (param, grad, state.get("exp_avg", zeros), state.get("exp_avg_sq", zeros))
        self.tensors = [tensor.detach().resolve_neg().clone() for tensor in tensors]
        self.step = int(state.get("step", 0)) + 1
        known = {key: group[key] for key in COEFFICIENT_KEYS}
        self.scalars = step_scalars(step=self.step, **{**known, "lr": float(group["lr"])})

    def apply(self, factor: float) -> None:
        scalars = self.scalars._replace(grad_factor=self.scalars.grad_factor * factor)
        adax_update(*self.tensors, **scalars._asdict())

    def check(self, param: Tensor, state: dict) -> None:
        param, _, exp_avg, exp_avg_sq = param, *self.tensors[1:]
        torch.testing.assert_close(param.detach().resolve_neg(), self.tensors[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state["exp_avg"].resolve_neg(), exp_avg, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state["exp_avg_sq"].resolve_neg(), exp_avg_sq, rtol=1e-5, atol=1e-7)
        assert int(state["step"]) == self.step


def with_states(optimizer: MomentOptimizer, param: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
    param.data = change(param.data)
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[param][name] = change(optimizer.state[param][name])


def moved(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    param.data = param.data.clone()


def reshaped_in_place(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    with_states(optimizer, param, lambda tensor: tensor.view(tensor.shape[::-1]))


def shortened_in_place(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    with_states(optimizer, param, lambda tensor: tensor[:-1])


def grown_by_set(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    larger = torch.cat([param.data, param.data])
    with torch.no_grad():
        param.set_(larger)
    for name in ("exp_avg", "exp_avg_sq"):
        state = optimizer.state[param][name]
        state.set_(torch.cat([state, state]))


def transposed_in_place(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    with_states(optimizer, param, lambda tensor: tensor.t())


def transposed_without_its_states(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    param.data = param.data.t().contiguous().t()


def lazily_negated(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    param.data = torch._neg_view(param.data)


def made_float64(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    if not optimizer.param_groups[0]["capturable"]:  # capturable steps do not support float64
        with_states(optimizer, param, lambda tensor: tensor.double())


def made_float32_again(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    with_states(optimizer, param, lambda tensor: tensor.float())


def state_moved(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].clone()


def state_data_moved(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    optimizer.state[param]["exp_avg_sq"].data = optimizer.state[param]["exp_avg_sq"].clone()


def state_with_gaps(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    state = optimizer.state[param]["exp_avg"]
    optimizer.state[param]["exp_avg"] = torch.stack([state, state + 1], dim=-1)[..., 0]


def state_strides_changed_in_place(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    state = optimizer.state[param]["exp_avg"]
    rows, columns = state.shape
    state.as_strided_((rows, columns), (1, rows))


def state_lazily_negated(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    optimizer.state[param]["exp_avg"] = torch._neg_view(optimizer.state[param]["exp_avg"])


def states_of_zeros(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    optimizer.state[param].update(
        exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param), step=torch.tensor(0.0)
    )


def count_in_float32(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    optimizer.state[param]["step"] = torch.tensor([float(optimizer.state[param]["step"])])


def count_in_int32(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    count = int(optimizer.state[param]["step"])
    optimizer.state[param]["step"] = torch.tensor(count, dtype=torch.int32, device=param.device)


def count_shared_by_all(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    shared = torch.tensor(3.0)
    for other in optimizer.state.values():
        other["step"] = shared


def frozen_and_unfrozen(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    param.requires_grad_(False)
    param.requires_grad_(True)


def moved_to_a_new_group(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    optimizer.param_groups[1]["params"] = [other for other in optimizer.param_groups[1]["params"] if other is not param]
    optimizer.add_param_group({"params": [param], "lr": 0.03})


def groups_replaced(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    optimizer.param_groups = [{**group, "lr": 0.02} for group in optimizer.param_groups]


def rule_changed(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    optimizer.param_groups[1].update(betas=(0.8, 1e-3), weight_decay=0.3, eps=1e-6, maximize=True)


def lr_in_a_tensor(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    optimizer.param_groups[1]["lr"] = torch.tensor(0.05)


def state_deleted(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    del optimizer.state[param]


CHANGES: list[Change] = [
    *(moved, reshaped_in_place, shortened_in_place, grown_by_set, state_moved, state_data_moved),
    *(state_with_gaps, states_of_zeros, count_in_float32, count_in_int32, count_shared_by_all, frozen_and_unfrozen),
    *(
        groups_replaced,
        rule_changed,
        lr_in_a_tensor,
        state_deleted,
        state_strides_changed_in_place,
        moved_to_a_new_group,
    ),
    *(state_lazily_negated, made_float64, made_float32_again),
]
# External gradients need contiguous float32 parameters.
CHANGES_OF_LAYOUT: list[Change] = [transposed_in_place, transposed_without_its_states, lazily_negated]
GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "lazily negated": lambda grad: torch._neg_view(-grad),
    "transposed": lambda grad: grad if grad.ndim < 2 else grad.t().contiguous().t(),
    "with gaps": lambda grad: torch.stack([grad, grad], dim=-1)[..., 0],
    "sparse": lambda grad: grad.to_sparse(),
    "misaligned": lambda grad: torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view_as(grad),
}


def test_each_change_takes_effect_in_the_next_step(step_kind: str, device: torch.device) -> None:
    run = Run(step_kind, device)
    run.check_step()
    # External gradients need float32 parameters, and step counts that the host advances.
    unsupported = [made_float64, *([count_in_int32] if device.type == "cuda" else [])]
    for change in [*CHANGES, *([] if step_kind == "external" else CHANGES_OF_LAYOUT)]:
        if step_kind == "external" and change in unsupported:
            continue
        run.check_step()  # this step reuses the plan unless the last change forbids it
        change(run.optimizer, run.params[1])
        run.check_step()


def test_each_kind_of_gradient(step_kind: str, device: torch.device) -> None:
    run = Run(step_kind, device)
    run.check_step()
    for name, change in GRADIENTS.items():
        if step_kind == "external" and name == "sparse":
            continue
        run.check_step()
        run.check_step(change)


def gradient_of_another_shape(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    assert param.grad is not None
    param.grad.data = torch.zeros(1, device=param.device)


def state_in_float16(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].half()


def fractional_count(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    optimizer.state[param]["step"] = torch.tensor(2.5)


def count_that_is_no_number(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    optimizer.state[param]["step"] = "two"


def moment_deleted(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    del optimizer.state[param]["exp_avg_sq"]


def expanded_weight(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    param.data = torch.zeros(1, device=param.device).expand(param.shape)


def flattened_weight(optimizer: MomentOptimizer, param: nn.Parameter) -> None:
    param.data = param.data.flatten()
    param.grad = torch.zeros_like(param)


UNSUPPORTED: dict[Change, str] = {
    gradient_of_another_shape: "grad",
    state_in_float16: "exp_avg",
    fractional_count: "step",
    count_that_is_no_number: "step",
    moment_deleted: "exp_avg_sq",
    expanded_weight: "share memory",
    flattened_weight: "shape",
}


@pytest.mark.parametrize(
    "step_kind", [step_kind for step_kind in STEP_KINDS if step_kind not in ("external", "release")], indirect=True
)
@pytest.mark.parametrize("change", UNSUPPORTED, ids=lambda change: change.__name__)
def test_unsupported_changes_raise_before_anything_changes(
    step_kind: str, change: Change, device: torch.device
) -> None:
    run = Run(step_kind, device)
    run.check_step()
    run.check_step()
    change(run.optimizer, run.params[1])
    before = [(param.detach().clone(), int(run.optimizer.state[param]["step"])) for param in run.params[::2]]
    for param in run.params[::2]:
        param.grad = torch.ones_like(param)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=UNSUPPORTED[change]):
            run.optimizer.step()
    for param, (weights, count) in zip(run.params[::2], before, strict=True):
        assert torch.equal(param, weights)
        assert int(run.optimizer.state[param]["step"]) == count
