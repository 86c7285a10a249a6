"""What a user would step parameters with, ours and the others', each behind one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adax_triton import AdamW, AdaXW

LR = 1e-3
ADAX_RULE: dict[str, Any] = {"lr": LR, "betas": (0.9, 1e-4), "eps": 1e-12, "weight_decay": 0.05}
ADAM_RULE: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}


@dataclass(frozen=True)
class Provider:
    """One way to step float32 parameters.

    Attributes:
        name: as shown in tables.
        second_moment: the rule its result is checked against.
        hyperparameters: `lr`, `betas`, `eps` and decoupled `weight_decay`.
        build: makes the optimizer of a list of parameters; an ImportError or RuntimeError says why it cannot here.
        device_types: where it runs.
    """

    name: str
    second_moment: str
    hyperparameters: dict[str, Any]
    build: Callable[[list[Tensor]], torch.optim.Optimizer]
    device_types: tuple[str, ...] = ("cuda", "cpu")


def _deepspeed_cpu_adam(params: list[Tensor]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(params, adamw_mode=True, **ADAM_RULE)


def _deepspeed_fused_adam(params: list[Tensor]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam(params, adam_w_mode=True, **ADAM_RULE)


PROVIDERS = (
    Provider("adax_triton.AdaXW", "adax", ADAX_RULE, lambda params: AdaXW(params, **ADAX_RULE)),
    Provider("adax_triton.AdamW", "adam", ADAM_RULE, lambda params: AdamW(params, **ADAM_RULE)),
    Provider("torch AdamW fused", "adam", ADAM_RULE, lambda params: torch.optim.AdamW(params, fused=True, **ADAM_RULE)),
    Provider(
        "torch AdamW foreach", "adam", ADAM_RULE, lambda params: torch.optim.AdamW(params, foreach=True, **ADAM_RULE)
    ),
    Provider("DeepSpeedCPUAdam", "adam", ADAM_RULE, _deepspeed_cpu_adam, device_types=("cpu",)),
    Provider("DeepSpeed FusedAdam", "adam", ADAM_RULE, _deepspeed_fused_adam, device_types=("cuda",)),
)
