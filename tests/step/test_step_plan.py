"""Reuse of step plans. Oracle: an equal optimizer that never reuses one."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adax_triton import AdaX, AdaXW
from adax_triton.moment_optimizer import MomentOptimizer
from adax_triton.step.backend import TRITON, backend_of

Shapes = tuple[tuple[int, ...], ...]
SHAPES = ((5,), (40,), (9, 4), (6, 6))
# The second has several chunks, and enough elements to be quantized.
LONG = ((5,), (4096,), (9, 4))
MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "8bit_v16": {"states": "8bit_v16"},
    "masters": {"states": "bfloat16", "master_weights": "24bit"},
    "stochastic": {"weight_rounding": "stochastic"},
    "clipped": {"max_grad_norm": 0.5},
    "capturable": {"capturable": True},
    "telemetry": {"telemetry": True},
}


def skip_capturable_without_triton(mode: str, backend: torch.device) -> None:
    if mode == "capturable" and backend_of(backend, torch.float32) != TRITON:
        pytest.skip("needs the Triton kernel")


def parameters(device: torch.device, dtype: torch.dtype, shapes: Shapes) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def gradient(param: Tensor, index: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + index)
    return torch.randn(param.shape, generator=generator).to(param.device, param.dtype)


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    for index, param in enumerate(params):
        param.grad = gradient(param, index, step)


class Pair:
    """An optimizer, and an equal twin that never reuses its plans."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype = torch.float32, shapes: Shapes = SHAPES, **options: Any
    ) -> None:
        self.params, self.twins = parameters(device, dtype, shapes), parameters(device, dtype, shapes)
        self.optimizer, self.twin = self._optimizer(self.params, options), self._optimizer(self.twins, options)

    @staticmethod
    def _optimizer(params: list[nn.Parameter], options: dict[str, Any]) -> MomentOptimizer:
        return AdaXW([{"params": params[:2]}, {"params": params[2:], "lr": 0.03}], lr=0.01, **options)

    def step(self, number: int, change: Callable[[MomentOptimizer, list[nn.Parameter]], None] | None = None) -> bool:
        """Step both after a change. Return whether the first reused its plan."""
        self.twin._plans.clear()
        for optimizer, params in ((self.optimizer, self.params), (self.twin, self.twins)):
            give_gradients(params, number)
            if change is not None:
                change(optimizer, params)
        planned = []
        original = self.optimizer._new_plan
        self.optimizer._new_plan = lambda *given: planned.append(given) or original(*given)  # type: ignore[method-assign]
        self.optimizer.step()
        self.twin.step()
        del self.optimizer._new_plan
        self.check()
        return not planned

    def check(self) -> None:
        for param, twin in zip(self.params, self.twins, strict=True):
            assert torch.equal(param, twin)
            found, expected = self.optimizer.state[param], self.twin.state[twin]
            assert set(found) == set(expected)
            assert all(torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name])) for name in expected)


@pytest.mark.parametrize("mode", MODES)
def test_steady_steps_reuse_their_plan(mode: str, backend: torch.device) -> None:
    skip_capturable_without_triton(mode, backend)
    pair = Pair(backend, torch.bfloat16 if mode in ("masters", "stochastic") else torch.float32, LONG, **MODES[mode])
    reused = [pair.step(number) for number in range(4)]
    assert reused == [False, True, True, True]


def freeze(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
    params[1].grad = None


def move_data(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
    params[2].data = params[2].data.clone()


def replace_state(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
    optimizer.state[params[3]]["exp_avg_sq"] = optimizer.state[params[3]]["exp_avg_sq"].clone()


def move_state_data(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
    optimizer.state[params[0]]["exp_avg"].data = optimizer.state[params[0]]["exp_avg"].data.clone()


def set_count(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
    optimizer.state[params[2]]["step"] = 99


def copy_state(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
    optimizer.state[params[2]] = copy.deepcopy(optimizer.state[params[2]])


def load(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def add_parameter(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
    params.append(nn.Parameter(torch.ones_like(params[0])))
    params[-1].grad = torch.ones_like(params[0])
    optimizer.add_param_group({"params": params[-1:]})


def transpose_gradient(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
    assert params[2].grad is not None
    params[2].grad = params[2].grad.T.contiguous().T


def make_sparse(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
    assert params[0].grad is not None
    params[0].grad = params[0].grad.to_sparse()


def misalign_gradient(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
    grad = params[1].grad
    assert grad is not None
    shifted = torch.empty(grad.numel() + 1, device=grad.device)[1:]
    params[1].grad = shifted.view_as(grad).copy_(grad)


def swap_groups(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
    optimizer.param_groups = optimizer.param_groups[:1]  # as ZeRO does around its steps


def clip(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
    optimizer.max_grad_norm = 0.1


def move_between_groups(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
    first, second = (group["params"] for group in optimizer.param_groups)
    second.insert(0, first.pop())  # keeps the order of all parameters


def shorten_data(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
    params[1].data, params[1].grad = params[1].data[:33], None
    for name in ("exp_avg", "exp_avg_sq"):
        state = optimizer.state[params[1]]
        state[name] = state[name][:33]
    params[1].grad = torch.ones_like(params[1])


def count_in_a_tensor(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
    count = optimizer.state[params[2]]["step"]
    optimizer.state[params[2]]["step"] = torch.tensor(count, device=params[2].device)


# Changes with permanent effects come last.
CHANGES = [
    *(freeze, move_data, replace_state, move_state_data, copy_state, load),
    *(transpose_gradient, make_sparse, misalign_gradient, move_between_groups),
    *(shorten_data, set_count, add_parameter, swap_groups),
]


# After `clip` or `count_in_a_tensor` the device counts steps, so each of them gets a new optimizer.
@pytest.mark.parametrize("changes", [CHANGES, [clip], [count_in_a_tensor]], ids=["most", "clip", "count_in_a_tensor"])
def test_each_change_needs_a_new_plan(changes: list[Callable[..., None]], backend: torch.device) -> None:
    pair = Pair(backend)
    pair.step(0)
    assert pair.step(1)
    # The native kernel reads any address, and the host computes its clipping.
    allowed = [misalign_gradient, clip] if backend_of(backend, torch.float32) != TRITON else []
    for number, change in enumerate(changes, 1):
        assert pair.step(2 * number, change) == (change in allowed), change.__name__
        # Reverting a change also needs a new plan.
        assert pair.step(2 * number + 1) or pair.step(2 * number + 1), change.__name__


def test_a_transposed_parameter_needs_a_new_plan(backend: torch.device) -> None:
    def transpose(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
        params[3].data = params[3].data.T  # the same address and number of elements

    pair = Pair(backend)
    pair.step(0)
    assert not pair.step(1, transpose)


def test_counts_that_become_equal_need_a_new_plan(backend: torch.device) -> None:
    def equalize(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
        for state in optimizer.state.values():
            state["step"] = 7

    pair = Pair(backend)
    pair.step(0, freeze)
    pair.step(1)
    assert pair.step(2)
    assert not pair.step(3, equalize)
    assert pair.step(4)


def test_a_count_that_is_set_within_one_group_takes_effect(backend: torch.device) -> None:
    params = parameters(backend, torch.float32, SHAPES)
    optimizer = AdaXW(params, lr=0.01)
    for number in range(2):
        give_gradients(params, number)
        optimizer.step()
    optimizer.state[params[1]]["step"] = 50
    give_gradients(params, 2)
    optimizer.step()
    assert [optimizer.state[param]["step"] for param in params] == [3, 51, 3, 3]


def test_swapped_states_need_a_new_plan(backend: torch.device) -> None:
    def swap(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
        first, second = optimizer.state.pop(params[1]), optimizer.state.pop(params[2])
        optimizer.state[params[2]], optimizer.state[params[1]] = first, second  # keeps the order of the dict's values

    pair = Pair(backend, shapes=((9, 4), (6, 6), (6, 6)))
    pair.step(0)
    assert pair.step(1)
    assert not pair.step(2, swap)


def test_replaced_parameters_are_freed(backend: torch.device) -> None:
    param = nn.Parameter(torch.zeros(5, device=backend))
    optimizer = AdaXW([param])
    replaced = []
    for _ in range(4):
        param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.step()
        replaced.append(weakref.ref(param))
        other = nn.Parameter(param.detach().clone())
        optimizer.state[other] = optimizer.state.pop(param)
        optimizer.param_groups[0]["params"][0] = param = other
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert [reference() for reference in replaced] == [None] * 4


def test_a_negative_count_raises(backend: torch.device) -> None:
    param = nn.Parameter(torch.zeros(5, device=backend))
    optimizer = AdaXW([param])
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
    optimizer.state[param]["step"] = -5
    with pytest.raises(TypeError, match="-5; expected a count"):
        optimizer.step()


def scale_lr(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[1]["lr"] *= 0.7


def change_rule(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0].update(betas=(0.8, 1e-3), weight_decay=0.3, eps=1e-6, seed=4, maximize=True)


@pytest.mark.parametrize("mode", ["float32", "stochastic", "clipped", "capturable"])
def test_reused_plans_read_hyperparameters(mode: str, backend: torch.device) -> None:
    skip_capturable_without_triton(mode, backend)
    pair = Pair(backend, torch.bfloat16 if mode == "stochastic" else torch.float32, **MODES[mode])
    pair.step(0)
    for number, change in enumerate([scale_lr, change_rule, scale_lr], 1):
        assert pair.step(number, change), change.__name__


def test_another_weight_rounding_needs_a_new_plan(backend: torch.device) -> None:
    def round_stochastically(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
        optimizer.param_groups[0]["weight_rounding"] = "stochastic"

    pair = Pair(backend, torch.bfloat16)
    pair.step(0)
    assert not pair.step(1, round_stochastically)


def test_rarely_changing_second_moments_need_another_kernel_variant(device: torch.device) -> None:
    def set_large_step_count(optimizer: MomentOptimizer, params: list[nn.Parameter]) -> None:
        for state in optimizer.state.values():
            state["step"] = 150_000

    pair = Pair(device, shapes=LONG)
    pair.step(0)
    pair.step(1)

    def skip_unchanged_v() -> list[bool]:
        (plan,) = pair.optimizer._plans.values()
        return [launch.key.skip_unchanged_v for launch, _ in plan._launches]

    assert skip_unchanged_v() == [False]
    assert not pair.step(2, set_large_step_count)
    assert skip_unchanged_v() == [True]
    assert pair.step(3)


def test_tables_of_a_step_that_raised_are_not_reused(backend: torch.device) -> None:
    pair = Pair(backend, max_grad_norm=1.0, error_if_nonfinite=True)
    pair.step(0)
    gradients = [param.grad for param in pair.params]  # keeps their memory during all following steps
    pair.params[0].grad, pair.params[1].grad = torch.full_like(pair.params[0], torch.inf), None
    with pytest.raises(RuntimeError, match="not finite"):
        pair.optimizer.step()  # its tables lack the second parameter
    for param, gradient in zip(pair.params, gradients, strict=True):
        param.grad = gradient
    pair.optimizer.step()
    pair.twin.step()
    pair.check()


def test_gradients_are_not_kept_alive(backend: torch.device) -> None:
    param = nn.Parameter(torch.ones(100, device=backend))
    optimizer = AdaX([param], telemetry=True, max_grad_norm=1.0)
    for _ in range(3):
        param.grad = torch.ones(100, device=backend)
        reference = weakref.ref(param.grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert reference() is None


def test_a_copied_optimizer_steps_its_own_parameters(backend: torch.device) -> None:
    pair = Pair(backend)
    pair.step(0)
    pair.step(1)
    twin = copy.deepcopy((pair.optimizer, pair.params))
    before = [param.detach().clone() for param in pair.params]
    give_gradients(twin[1], 5)
    twin[0].step()
    assert all(torch.equal(param, old) for param, old in zip(pair.params, before, strict=True))
    assert pair.step(5)
    for param, copied in zip(pair.params, twin[1], strict=True):
        assert torch.equal(param, copied)


def test_loading_keeps_the_tables_that_captured_graphs_read(backend: torch.device) -> None:
    pair = Pair(backend)
    pair.step(0)
    cache = pair.optimizer._launch_cache
    load(pair.optimizer, pair.params)
    assert pair.optimizer._launch_cache is cache
