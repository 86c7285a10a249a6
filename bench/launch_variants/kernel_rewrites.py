"""Rewrites of the step kernel's source, timed next to the original."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

STEP, QUANTIZATION = "adax_step", "quantization"  # modules of adax_triton.kernels; the first imports the second
# By name: module, text to replace, new text. A short text survives changes around it.
REWRITES = {
    # A division instead of rsqrt: measures the gain of rsqrt.
    "quotient": (STEP, "exp_avg * tl.rsqrt(root * root)", "exp_avg / root"),
    # One more multiplication with equal results: measures the cost of an instruction.
    "abs-product": (
        *(QUANTIZATION, "bits_of(u) << 1"),
        "bits_of(tl.abs(exp_avg) * from_bits(inverse & 0x7F800000)) << 1",
    ),
    # Rounds to nearest: measures the cost of the random bits.
    "constant-random": (
        *(STEP, "random_bits(first_index + offsets.to(tl.uint32), key0, key1)"),
        "tl.full([], 0x80808080, tl.uint32)",
    ),
}
EXACT = {"abs-product"}  # must not change a bit of the result


def rewritten_kernel(name: str, folder: Path) -> Any:
    """Return `adax_step_kernel` with a rewrite applied.

    Args:
        name: a key of `REWRITES`.
        folder: gets the source files. Keep it: Triton's interpreter reads them at the first launch.

    Raises:
        ValueError: the name is unknown, or the source does not contain the text to replace.
    """
    if name not in REWRITES:
        raise ValueError(f"Invalid rewrite: {name!r}; expected one of {list(REWRITES)}")
    changed, old, new = REWRITES[name]
    suffix = f"_{name.replace('-', '_')}"
    for module in (QUANTIZATION, STEP):
        original = importlib.util.find_spec(f"adax_triton.kernels.{module}")
        assert original is not None and original.origin is not None
        source = Path(original.origin).read_text()
        if module == changed and old not in source:
            raise ValueError(f"Rewrite {name!r}: kernels/{module}.py does not contain {old!r}; update the rewrite")
        source = source.replace(old, new) if module == changed else source
        path = folder / f"{module}{suffix}.py"
        path.write_text(source.replace(f"from .{QUANTIZATION} import", f"from .{QUANTIZATION}{suffix} import"))
        # A name within the package, so that relative imports work.
        spec = importlib.util.spec_from_file_location(f"adax_triton.kernels.{path.stem}", path)
        assert spec is not None and spec.loader is not None
        sys.modules[spec.name] = rewritten = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(rewritten)
    return rewritten.adax_step_kernel
