"""The modes in which steps are compared: dtypes of the weights, of the states and of masters."""

from __future__ import annotations

from typing import NamedTuple

import torch

from adax_triton.state.precision import Precision, bytes_loaded, bytes_stored, state_bytes


class Mode(NamedTuple):
    """What a row of a table must have in common with another to be compared with it.

    Attributes:
        name: as shown, such as `"bf16 + low + 24-bit masters"`.
        param_dtype: of parameters and gradients.
        precision: of the states.
    """

    name: str
    param_dtype: torch.dtype
    precision: Precision

    @property
    def bytes_per_element(self) -> float:
        """Bytes that one pass over parameter, gradient and states reads and writes per element, by our formats."""
        loaded = bytes_loaded(self.param_dtype, self.param_dtype, self.precision)
        return loaded + bytes_stored(self.param_dtype, self.precision)

    @property
    def state_bytes(self) -> float:
        """Bytes of state per element, by our formats."""
        return state_bytes(self.param_dtype, self.precision)

    @property
    def weight_rounding(self) -> str:
        """How our optimizers round weights: 16-bit ones without masters would lose small updates to nearest."""
        alone = self.param_dtype == torch.bfloat16 and self.precision.master_weights is None
        return "stochastic" if alone else "nearest"


def _bfloat16(states: str, master_weights: str | None = None) -> Mode:
    masters = {None: "", "float32": " + 32-bit masters", "24bit": " + 24-bit masters"}[master_weights]
    return Mode(f"bf16 + {states}{masters}", torch.bfloat16, Precision(states, master_weights))


FP32 = Mode("fp32", torch.float32, Precision())
MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        FP32,
        _bfloat16("float32"),
        _bfloat16("float32", "float32"),
        _bfloat16("float32", "24bit"),
        _bfloat16("bfloat16"),
        _bfloat16("bfloat16", "float32"),
        _bfloat16("bfloat16", "24bit"),
        _bfloat16("8bit_v16"),
        _bfloat16("8bit_v16", "24bit"),
        _bfloat16("8bit"),
        _bfloat16("8bit", "24bit"),
    )
}
