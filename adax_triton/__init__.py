"""AdaX as one fused Triton kernel, behind the interface of `torch.optim`."""

from .flat_buffer import FlatBuffer
from .optimizer import Adam, AdamW, AdaX, AdaXW
from .reference import adax_update
from .schedule import StepScalars, step_scalars
from .version import __version__

__all__ = ["AdaX", "AdaXW", "Adam", "AdamW", "FlatBuffer", "StepScalars", "__version__", "adax_update", "step_scalars"]
