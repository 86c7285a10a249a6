"""What a user would step parameters with, ours and the others', each behind one call."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adax_triton import AdamW, AdaXW

from .modes import FP32, MODES, Mode

Rule = dict[str, Any]
Step = Callable[[], Any]

OURS = "adax_triton.AdaXW"
# What steps are timed with.
ADAX_RULE: Rule = {"lr": 1e-3, "betas": (0.9, 1e-4), "eps": 1e-12, "weight_decay": 0.05}
ADAM_RULE: Rule = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}
_MOST_COMPILED = 1000
RULES = {"adax": ADAX_RULE, "adam": ADAM_RULE}


@dataclass(frozen=True)
class Provider:
    """One way to step parameters, in one mode.

    Attributes:
        name: as shown in tables.
        mode: its dtypes.
        build: makes the step of a list of parameters under a rule: `lr`, `betas`, `eps`, decoupled `weight_decay`. What
            it raises says why it cannot here.
        second_moment: the rule its result is checked against.
        bytes_per_element: bytes that one pass over its own formats moves. Default: those of the mode.
        device_types: where it runs.
        package: what must be installed for it.
        most_tensors: of a list on a GPU that it is timed on by default, and 1 on a CPU; for what compiles a list for
            minutes. Default: any number.
    """

    name: str
    mode: Mode
    build: Callable[[list[Tensor], Rule], Step]
    second_moment: str = "adam"
    bytes_per_element: float = 0.0
    device_types: tuple[str, ...] = ("cuda", "cpu")
    package: str = "torch"
    most_tensors: int | None = None

    def __post_init__(self) -> None:
        if not self.bytes_per_element:
            object.__setattr__(self, "bytes_per_element", self.mode.bytes_per_element)

    @property
    def label(self) -> str:
        """The name, and the mode unless it is fp32; unique among providers."""
        return self.name if self.mode == FP32 else f"{self.name}, {self.mode.name}"

    def missing_on(self, device: torch.device) -> str | None:
        """Return why it cannot be built for a device, without importing it; or None."""
        if device.type not in self.device_types:
            return f"not for {'a CPU' if device.type == 'cpu' else 'a GPU'}"
        return None if importlib.util.find_spec(self.package) else f"{self.package} is not installed"


def ours(name: str, kind: type[AdaXW] | type[AdamW], mode: Mode) -> Provider:
    """Return one of our optimizers in a mode."""

    def build(params: list[Tensor], rule: Rule) -> Step:
        states, master_weights = mode.precision
        rounding = mode.weight_rounding
        optimizer = kind(params, states=states, master_weights=master_weights, weight_rounding=rounding, **rule)
        return optimizer.step

    return Provider(name, mode, build, second_moment="adax" if kind is AdaXW else "adam", package="adax_triton")


def _fused(params: list[Tensor], rule: Rule) -> Step:
    return torch.optim.AdamW(params, fused=True, **rule).step


def _foreach(params: list[Tensor], rule: Rule) -> Step:
    return torch.optim.AdamW(params, foreach=True, **rule).step


def _compiled(params: list[Tensor], rule: Rule) -> Step:
    optimizer = torch.optim.AdamW(params, foreach=True, **rule)
    # Every optimizer is another compilation of one function; past the limit PyTorch would run them uncompiled.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _MOST_COMPILED)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, _MOST_COMPILED)
    return torch.compile(lambda: optimizer.step())


# The states of torch's AdamW have the dtype of the parameters.
PROVIDERS = (
    *(ours(OURS, AdaXW, mode) for mode in MODES.values()),
    ours("adax_triton.AdamW", AdamW, FP32),
    *(
        Provider(f"torch AdamW {name}", mode, build, most_tensors=most_tensors)
        for name, build, most_tensors in (
            ("fused", _fused, None),
            ("foreach", _foreach, None),
            ("compiled", _compiled, 150),
        )
        for mode in (FP32, MODES["bf16 + bfloat16"])
    ),
)
