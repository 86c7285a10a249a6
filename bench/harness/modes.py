"""Precision modes: dtypes of weights, states and master weights."""

from __future__ import annotations

from typing import NamedTuple

import torch

from adax_triton.state.precision import Precision, bytes_loaded, bytes_stored, state_bytes


class Mode(NamedTuple):
    """Precision of a table row; only rows of one mode are compared."""

    name: str  # as shown in tables, such as "bf16 + 8bit + 24-bit masters"
    param_dtype: torch.dtype  # of parameters and gradients
    precision: Precision  # of states and master weights

    @property
    def bytes_per_element(self) -> float:
        """Bytes that one fused update reads and writes per element."""
        loaded = bytes_loaded(self.param_dtype, self.param_dtype, self.precision)
        return loaded + bytes_stored(self.param_dtype, self.precision)

    @property
    def state_bytes(self) -> float:
        """Bytes of state per element."""
        return state_bytes(self.param_dtype, self.precision)

    @property
    def weight_rounding(self) -> str:
        """Stochastic for bfloat16 weights without masters, else nearest.

        Such weights would lose small updates if rounded to nearest.
        """
        alone = self.param_dtype == torch.bfloat16 and self.precision.master_weights is None
        return "stochastic" if alone else "nearest"


FP32 = Mode("fp32", torch.float32, Precision())
_MASTERS = {None: "", "float32": " + 32-bit masters", "24bit": " + 24-bit masters"}
MODES = {FP32.name: FP32} | {
    f"bf16 + {states}{masters}": Mode(f"bf16 + {states}{masters}", torch.bfloat16, Precision(states, master_weights))
    for states in ("float32", "bfloat16", "8bit_v16", "8bit")
    for master_weights, masters in _MASTERS.items()
    if master_weights != "float32" or states in ("float32", "bfloat16")
}
