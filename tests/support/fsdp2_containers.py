"""The optimizer containers of torchtitan: several optimizers behind one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class OptimizersContainer(Optimizer):
    """One optimizer per model part, with one flat state dict."""

    def __init__(self, parts: Sequence[nn.Module], optimizer_class: type[Optimizer], options: dict[str, Any]) -> None:
        self.parts = parts
        self.optimizers_of = [self._build(part, optimizer_class, options) for part in parts]
        self.optimizers = [optimizer for optimizers in self.optimizers_of for optimizer in optimizers]
        # Gives the container the hooks of an optimizer.
        super().__init__([param for part in parts for param in part.parameters()], options)

    def _build(self, part: nn.Module, optimizer_class: type[Optimizer], options: dict[str, Any]) -> list[Optimizer]:
        return [optimizer_class(part.parameters(), **options)]

    def step(self, closure: None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for part, optimizers in zip(self.parts, self.optimizers_of, strict=True):
            found |= get_optimizer_state_dict(part, optimizers, options=FLAT)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, optimizers in zip(self.parts, self.optimizers_of, strict=True):
            set_optimizer_state_dict(part, optimizers, optim_state_dict=state_dict, options=FLAT)


class InBackwardContainer(OptimizersContainer):
    """One optimizer per parameter, which steps in the backward pass."""

    def _build(self, part: nn.Module, optimizer_class: type[Optimizer], options: dict[str, Any]) -> list[Optimizer]:
        of_param = {param: optimizer_class([param], **options) for param in part.parameters()}

        def step(param: Tensor) -> None:
            of_param[param].step()
            of_param[param].zero_grad()

        for param in of_param:
            param.register_post_accumulate_grad_hook(step)
        return list(of_param.values())

    def step(self, closure: None = None) -> None:
        pass
