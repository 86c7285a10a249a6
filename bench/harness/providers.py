"""Optimizers to benchmark, of this package and of others, behind one interface."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from adax_triton import AdamW, AdaXW

from .modes import FP32, MODES, Mode

Rule = dict[str, Any]
Step = Callable[[], Any]
Build = Callable[[list[Tensor], Rule], Step]

OURS = "adax_triton.AdaXW"
# Hyper-parameters of timed steps.
ADAX_RULE: Rule = {"lr": 1e-3, "betas": (0.9, 1e-4), "eps": 1e-12, "weight_decay": 0.05}
ADAM_RULE: Rule = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}
RULES = {"adax": ADAX_RULE, "adam": ADAM_RULE}
# A bfloat16 parameter is read twice and written once; two 8-bit moments with their scales are read and written.
_BLOCKWISE_8BIT = 4 + 2 + 2 * 2 * (1 + 4 / 256)  # a float32 scale per 256 elements
_FLASHOPTIM = 4 + 2 + 2 * 2 * (1 + 2 / 32)  # a float16 scale per 32 elements
_RECOMPILE_LIMIT = 1000
_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Provider:
    """One optimizer in one mode."""

    name: str  # as shown in tables
    mode: Mode
    build: Build  # takes parameters, and lr, betas, eps and decoupled weight_decay; the table shows its error
    second_moment: str = "adam"  # the rule of the correctness check
    bytes_per_element: float = 0.0  # moved by one fused update in its own formats; 0: the bytes of the mode
    device_types: tuple[str, ...] = ("cuda", "cpu")
    package: str = "torch"  # import name of the required package
    compiles_long: bool = False  # compiling several tensors takes minutes; they are timed only with --only

    def __post_init__(self) -> None:
        if not self.bytes_per_element:
            object.__setattr__(self, "bytes_per_element", self.mode.bytes_per_element)

    @property
    def label(self) -> str:
        """Name, and mode unless fp32; unique among a device's providers."""
        return self.name if self.mode == FP32 else f"{self.name}, {self.mode.name}"

    def missing_on(self, device: torch.device) -> str | None:
        """Return why it cannot run on a device, or None; imports nothing."""
        if device.type not in self.device_types:
            return f"not for {'a CPU' if device.type == 'cpu' else 'a GPU'}"
        return None if importlib.util.find_spec(self.package) else f"{self.package} is not installed"


def adax_triton_provider(
    name: str, kind: type[AdaXW] | type[AdamW], mode: Mode, options: Mapping[str, Any] = _NO_OPTIONS
) -> Provider:
    """Return an optimizer of this package in a mode, with additional options."""

    def build(params: list[Tensor], rule: Rule) -> Step:
        kept: dict[str, Any] = {**mode.precision._asdict(), "weight_rounding": mode.weight_rounding}
        return kind(params, **kept, **rule, **options).step

    return Provider(name, mode, build, second_moment="adax" if kind is AdaXW else "adam", package="adax_triton")


def _imported(path: str, options: Mapping[str, Any] = _NO_OPTIONS) -> Build:
    """Return a builder that imports the class `path` when it is called."""
    module, _, name = path.rpartition(".")

    def build(params: list[Tensor], rule: Rule) -> Step:
        return getattr(importlib.import_module(module), name)(params, **rule, **options).step

    return build


def _compiled(params: list[Tensor], rule: Rule) -> Step:
    optimizer = torch.optim.AdamW(params, foreach=True, **rule)
    # Each optimizer compiles the function again; past the limit PyTorch would run it uncompiled.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _RECOMPILE_LIMIT)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, _RECOMPILE_LIMIT)
    return torch.compile(lambda: optimizer.step())


def _other(
    name: str,
    path: str,
    modes: tuple[str, ...],
    options: Mapping[str, Any] = _NO_OPTIONS,
    device_types: tuple[str, ...] = ("cuda", "cpu"),
    moved: float = 0.0,
    compiles_long: bool = False,
) -> list[Provider]:
    """Return the external optimizer `path` in modes with the closest dtypes."""
    package, build = path.partition(".")[0], _imported(path, options)
    return [Provider(name, MODES[mode], build, "adam", moved, device_types, package, compiles_long) for mode in modes]


_GPU = ("cuda",)
_LIKE_PARAMS = ("fp32", "bf16 + bfloat16")  # states have the dtype of the parameters
_FLOAT32 = ("fp32", "bf16 + float32")  # states are float32
_MASTERS_32, _MASTERS_24 = ("bf16 + float32 + 32-bit masters",), ("bf16 + bfloat16 + 24-bit masters",)
_8BIT, _8BIT_MASTERS = ("bf16 + 8bit",), ("bf16 + 8bit + 24-bit masters",)
_FUSED_ADAM = {"adam_w_mode": True}
_TE, _TE_PATH = "Transformer Engine FusedAdam", "transformer_engine.pytorch.optimizers.FusedAdam"
_TE_MASTERS = {"master_weights": True, "store_param_remainders": True}
_FLASH, _FLASH_PATH = "FlashOptim", "flashoptim.FlashAdamW"
PROVIDERS: tuple[Provider, ...] = (
    *(adax_triton_provider(OURS, AdaXW, mode) for mode in MODES.values()),
    adax_triton_provider("adax_triton.AdamW", AdamW, FP32),
    *_other("torch AdamW fused", "torch.optim.AdamW", _LIKE_PARAMS, {"fused": True}),
    *_other("torch AdamW foreach", "torch.optim.AdamW", _LIKE_PARAMS, {"foreach": True}),
    *(Provider("torch AdamW compiled", MODES[mode], _compiled, compiles_long=True) for mode in _LIKE_PARAMS),
    *_other("DeepSpeedCPUAdam", "deepspeed.ops.adam.DeepSpeedCPUAdam", _FLOAT32, {"adamw_mode": True}, ("cpu",)),
    *_other("DeepSpeed FusedAdam", "deepspeed.ops.adam.FusedAdam", _LIKE_PARAMS, _FUSED_ADAM, _GPU),
    *_other("Apex FusedAdam", "apex.optimizers.FusedAdam", _FLOAT32, _FUSED_ADAM, _GPU),
    *_other(_TE, _TE_PATH, _FLOAT32, _FUSED_ADAM | dict.fromkeys(_TE_MASTERS, False), _GPU),
    *_other(_TE, _TE_PATH, _MASTERS_32, _FUSED_ADAM | _TE_MASTERS, _GPU),
    *_other(_FLASH, _FLASH_PATH, ("fp32",), {"quantize": False, "master_weight_bits": None}, _GPU),
    *_other(_FLASH, _FLASH_PATH, _MASTERS_24, {"quantize": False, "master_weight_bits": 24}, _GPU),
    *_other(_FLASH, _FLASH_PATH, _8BIT, {"quantize": True, "master_weight_bits": None}, _GPU, _FLASHOPTIM),
    *_other(_FLASH, _FLASH_PATH, _8BIT_MASTERS, {"quantize": True, "master_weight_bits": 24}, _GPU, _FLASHOPTIM + 2),
    *_other("optimi AdamW", "optimi.AdamW", _LIKE_PARAMS, {"kahan_sum": False}),
    # Kahan's bfloat16 compensation moves as many bytes as a 16-bit master.
    *_other("optimi AdamW, Kahan", "optimi.AdamW", ("bf16 + bfloat16 + 32-bit masters",), {"kahan_sum": True}),
    *_other(
        "torchao AdamW8bit",
        "torchao.optim.AdamW8bit",
        _8BIT,
        {"bf16_stochastic_round": True},
        moved=_BLOCKWISE_8BIT,
        compiles_long=True,
    ),
    *_other("bitsandbytes AdamW8bit", "bitsandbytes.optim.AdamW8bit", _8BIT, moved=_BLOCKWISE_8BIT),
)
