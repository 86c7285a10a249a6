"""AdaX as one fused Triton kernel, behind the interface of `torch.optim`."""

from .adam import Adam, AdamW
from .beside import Beside
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
from .telemetry import StepTelemetry, Telemetry
from .telemetry_logging import JsonLinesLogger, TensorBoardLogger
from .version import __version__

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
