"""AdaX as one fused Triton kernel, used as a `torch.optim.Optimizer`."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING

from .version import __version__

# In a source tree kernels/ lies next to this folder, and only an installation of that tree finds it there.
_kernels = importlib.util.find_spec("adax_triton.kernels")
_folders = [os.path.dirname(folder) for folder in (_kernels and _kernels.submodule_search_locations) or ()]
if not {__path__[0], os.path.dirname(__path__[0])} & set(_folders):
    raise ImportError(
        f"adax_triton in {__path__[0]!r} is a source tree that is not installed; run `pip install .` in its root, or "
        "start Python in another folder if adax-triton is installed already"
    )

if TYPE_CHECKING:
    from adax_triton.convert.state_dicts import (
        adam_from_adax,
        adax_from_adam,
        from_released_adax,
        from_torch_adam,
        to_released_adax,
        to_torch_adam,
    )
    from adax_triton.step.external_grads import ExternalGrads
    from adax_triton.step.telemetry import StepTelemetry, Telemetry
    from adax_triton.update.coefficients import StepScalars, step_scalars
    from adax_triton.update.horizon import beta2_for_horizon, steps_until_frozen
    from adax_triton.update.reference import adax_update

    from .gradient_release import GradientRelease
    from .optimizers import Adam, AdamW, AdaX, AdaXW
    from .telemetry_loggers import JsonLinesLogger, TensorBoardLogger

__all__ = [
    "AdaX",
    "AdaXW",
    "Adam",
    "AdamW",
    "ExternalGrads",
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

# The modules of the public names, imported at first use: `import torch` takes seconds.
_MODULES = (
    *("convert.state_dicts", "gradient_release", "optimizers", "step.external_grads"),
    *("step.telemetry", "telemetry_loggers", "update.coefficients", "update.horizon", "update.reference"),
)

# Public names that were renamed before the first release.
_RENAMED = {"Beside": "ExternalGrads"}

if not TYPE_CHECKING:  # with a module __getattr__, type checkers accept any name

    def __getattr__(name: str) -> object:
        if name in _RENAMED:
            raise AttributeError(f"{__name__}.{name} was renamed to {_RENAMED[name]}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        modules = (importlib.import_module(f"{__name__}.{module}") for module in _MODULES)
        found = globals()[name] = next(vars(module)[name] for module in modules if name in vars(module))
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
