"""Run AdaX in every mode and the same rule in float64.

One optimizer has a parameter for every mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adax_triton import AdaX
from adax_triton.state.allocation import local_state_tensors
from adax_triton.update.coefficients import step_scalars
from adax_triton.update.quantized_update import load_moments
from adax_triton.update.reference import adax_update

EPS = 1e-12
NUMEL = 4096  # the fewest elements with low-precision states


class Mode(NamedTuple):
    """How moments are stored."""

    states: str = "float32"
    rounding: Callable[[Tensor, Tensor], None] | None = None  # of m and v in place after each step
    lr: float = 1.0  # factor of the learning rate


class Comparison:
    """Steps one parameter per mode, and the exact rule.

    Attributes:
        weights: (modes, *shape) float32, 0 at the start; writable.
        exact: (*shape) float64 weights of the exact rule.
        exact_moments: its m and v, float64.
    """

    def __init__(
        self, modes: Mapping[str, Mode], shape: tuple[int, ...], betas: tuple[float, float], seed: int
    ) -> None:
        self._modes, self._betas, self.steps = list(modes.values()), betas, 0
        self.weights = torch.zeros(len(modes), *shape)
        self._params = [torch.nn.Parameter(row) for row in self.weights]  # on the same memory
        groups = [{"params": [p], "states": mode.states} for p, mode in zip(self._params, self._modes, strict=True)]
        self.optimizer = AdaX(groups, betas=betas, eps=EPS, weight_decay=0.0, seed=seed)
        self.exact, *self.exact_moments = torch.zeros(3, *shape, dtype=torch.float64)

    def step(self, grads: Sequence[Tensor], lr: float) -> None:
        """Apply one step to every mode and to the exact rule.

        `grads` has a gradient per mode and a last one for the exact rule.
        """
        self.steps += 1
        for index, (param, mode) in enumerate(zip(self._params, self._modes, strict=True)):
            param.grad, self.optimizer.param_groups[index]["lr"] = grads[index], lr * mode.lr
        self.optimizer.step()
        for param, mode in zip(self._params, self._modes, strict=True):
            if mode.rounding is not None:
                state = self.optimizer.state[param]
                mode.rounding(state["exp_avg"], state["exp_avg_sq"])
        rule: Any = {"betas": self._betas, "eps": EPS, "eps_placement": "normalized", "second_moment": "adax"}
        rule |= {"weight_decay": 0.0, "decoupled_weight_decay": False, "maximize": False}
        scalars = step_scalars(step=self.steps, lr=lr, **rule)
        adax_update(self.exact, grads[-1].double(), *self.exact_moments, **scalars._asdict())

    def moments(self) -> list[tuple[Tensor, Tensor]]:
        """Return m and v of every mode, decoded to float32."""
        states = [local_state_tensors(self.optimizer.state[param]) for param in self._params]
        return [load_moments(one["exp_avg"], one["exp_avg_sq"], one.get("group_exponents")) for one in states]
