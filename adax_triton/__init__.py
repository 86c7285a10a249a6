"""AdaX as one fused Triton kernel, behind the interface of `torch.optim`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from .adam import Adam, AdamW
    from .conversion import (
        adam_from_adax,
        adax_from_adam,
        from_released_adax,
        from_torch_adam,
        to_released_adax,
        to_torch_adam,
    )
    from .flat_buffer import FlatBuffer
    from .gradient_release import GradientRelease
    from .horizon import beta2_for_horizon, steps_until_frozen
    from .optimizer import AdaX, AdaXW
    from .reference import adax_update
    from .schedule import StepScalars, step_scalars
    from .step.external_grads import Beside
    from .telemetry import StepTelemetry, Telemetry
    from .telemetry_logging import JsonLinesLogger, TensorBoardLogger

__all__ = [
    "AdaX",
    "AdaXW",
    "Adam",
    "AdamW",
    "Beside",
    "FlatBuffer",
    "GradientRelease",
    "JsonLinesLogger",
    "StepScalars",
    "StepTelemetry",
    "Telemetry",
    "TensorBoardLogger",
    "__version__",
    "adam_from_adax",
    "adax_from_adam",
    "adax_update",
    "beta2_for_horizon",
    "from_released_adax",
    "from_torch_adam",
    "step_scalars",
    "steps_until_frozen",
    "to_released_adax",
    "to_torch_adam",
]

# Where these names are. They are imported when one is asked for, because they import PyTorch, which takes seconds.
_MODULES = (
    *("adam", "conversion", "flat_buffer", "gradient_release", "horizon", "optimizer", "reference"),
    *("schedule", "step.external_grads", "telemetry", "telemetry_logging"),
)

if not TYPE_CHECKING:  # else a checker would take any name for one of these

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        modules = (importlib.import_module(f"{__name__}.{module}") for module in _MODULES)
        found = globals()[name] = next(vars(module)[name] for module in modules if name in vars(module))
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
