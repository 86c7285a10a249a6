"""Compile-time options of the step kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl

from .launch import LaunchShape

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,  # gradients only
}
# (exp_avg, exp_avg_sq). Kernels see the int16 codes of "8bit_v16" as unsigned.
STATE_DTYPES = {
    "float32": (tl.float32, tl.float32),
    "bfloat16": (tl.bfloat16, tl.bfloat16),
    "8bit_v16": (tl.int8, tl.uint16),
    "8bit": (tl.int8, tl.uint8),
}
MASTER_DTYPES = {None: None, "int16": tl.int16, "int8": tl.int8, "float32": tl.float32}


class StepVariant(NamedTuple):
    """Compile-time options of the step kernel.

    Args:
        param_dtype: float32, bfloat16 or float16.
        grad_dtype: float32, bfloat16, float16 or float64.
        states: `"float32"`, `"bfloat16"`, `"8bit_v16"` or `"8bit"`.
        master: None; `"int16"` or `"int8"`, a remainder next to bfloat16 parameters; `"float32"`, a master copy.
        stochastic: round the parameters themselves stochastically; only for bfloat16 without a master.
        skip_unchanged_v: store v only for groups of 32 in which at least one element changed.
        telemetry: write the sums of each chunk, see `telemetry.tile_sums`.
        aligned: every address is a multiple of 16 bytes.
        param_is_copy: the float32 master is the weight, and the kernel only writes the parameter.
    """

    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    states: str = "float32"
    master: str | None = None
    stochastic: bool = False
    skip_unchanged_v: bool = False
    telemetry: bool = False
    aligned: bool = True
    param_is_copy: bool = False

    def constants(self, shape: LaunchShape) -> dict[str, Any]:
        """Return the compile-time arguments of the kernel."""
        exp_avg_dtype, exp_avg_sq_dtype = STATE_DTYPES[self.states]
        param_dtype, master_dtype = TRITON_DTYPES[self.param_dtype], MASTER_DTYPES[self.master]
        stored = (param_dtype, exp_avg_dtype, exp_avg_sq_dtype, *([] if master_dtype is None else [master_dtype]))
        widest = max(dtype.primitive_bitwidth for dtype in stored)
        return {
            "PARAM_DTYPE": param_dtype,
            "GRAD_DTYPE": TRITON_DTYPES[self.grad_dtype],
            "STATES": self.states,
            "EXP_AVG_DTYPE": exp_avg_dtype,
            "EXP_AVG_SQ_DTYPE": exp_avg_sq_dtype,
            "MASTER_DTYPE": master_dtype,
            "STOCHASTIC": self.stochastic,
            "SKIP_UNCHANGED_V": self.skip_unchanged_v,
            "TELEMETRY": self.telemetry,
            "PARAM_IS_COPY": self.param_is_copy,
            "CHUNK_SIZE": shape.chunk_size,
            # The widest access is 16 bytes.
            "VECTOR": min(128 // widest, shape.elements_per_thread),
            "ALIGNED": self.aligned,
        }
