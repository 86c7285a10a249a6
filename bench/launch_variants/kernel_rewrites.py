"""Rewrites of the step kernel's source, which `launch_variants` times next to the kernel as it is."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# The first imports the second.
_STEP, _COMPACT = "adax_step", "quantization"
_KERNELS = "adax_triton.kernels"


class Edit(NamedTuple):
    """Replace all occurrences of a piece of source.

    Attributes:
        module: of `adax_triton.kernels`, `"adax_step"` or `"quantization"`.
        old: the piece; short, so that changes around it do not matter.
        new: what replaces it.
    """

    module: str
    old: str
    new: str


REWRITES: dict[str, tuple[Edit, ...]] = {
    # What the reciprocal root replaced: shows what that gains.
    "quotient": (Edit(_STEP, "exp_avg * tl.rsqrt(root * root)", "exp_avg / root"),),
    # A product more, for the same bits: shows what an instruction costs.
    "abs-product": (
        Edit(_COMPACT, "bits_of(direction) << 1", "bits_of(tl.abs(exp_avg) * from_bits(inverse & 0x7F800000)) << 1"),
    ),
    # Rounds to nearest: shows what the random bits cost.
    "constant-random": (
        Edit(
            _STEP,
            "random_bits(first_index + offsets.to(tl.uint32), key0, key1)",
            "tl.full([], 0x80808080, tl.uint32)",
        ),
    ),
}
# Those that must not change a bit of the result.
EXACT = frozenset({"abs-product"})


def rewritten_kernel(names: Sequence[str], folder: Path) -> Any:
    """Return `adax_step_kernel` with rewrites applied.

    Args:
        names: keys of `REWRITES`.
        folder: gets the source files. Triton reads them, in the interpreter at the first launch.

    Raises:
        ValueError: a name is unknown, or the source lacks a piece that it replaces.
    """
    sources = {module: _source(module) for module in (_COMPACT, _STEP)}
    for name in names:
        if name not in REWRITES:
            raise ValueError(f"Invalid rewrite: {name!r}; expected one of {list(REWRITES)}")
        for module, old, new in REWRITES[name]:
            if old not in sources[module]:
                raise ValueError(f"Rewrite {name!r} replaces {old!r}, which kernels/{module}.py does not contain")
            sources[module] = sources[module].replace(old, new)
    suffix = "_".join(["", *names]).replace("-", "_")
    sources[_STEP] = sources[_STEP].replace(f"from .{_COMPACT} import", f"from .{_COMPACT}{suffix} import")
    for module, source in sources.items():
        rewritten = _imported(f"{module}{suffix}", source, folder)
    return rewritten.adax_step_kernel


def _source(module: str) -> str:
    spec = importlib.util.find_spec(f"{_KERNELS}.{module}")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text()


def _imported(module: str, source: str, folder: Path) -> Any:
    path = folder / f"{module}.py"
    path.write_text(source)
    # Within the package, where its relative imports are found.
    spec = importlib.util.spec_from_file_location(f"{_KERNELS}.{module}", path)
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
