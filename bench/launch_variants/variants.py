"""The launch variants of the step kernel to time, in sections that are compared with each other."""

from __future__ import annotations

from typing import NamedTuple

from adax_triton.bench.harness.modes import MODES, Mode

WARP = 32  # threads, on NVIDIA
LATE_STEP = 1_000_000  # w_t is 0 in float32, so no second moment changes


class Variant(NamedTuple):
    """How the kernel is compiled and launched."""

    label: str  # `CHUNKxWARPS [rREGISTERS] [settled]`, as in tables and on the command line
    chunk: int  # elements per program
    options: dict[str, int]  # of Triton's compiler: warps, and the limit of registers per thread
    skip_unchanged_v: bool  # store only the second moments that changed; `settled` in the label

    @property
    def elements_per_thread(self) -> int:
        """Elements of a chunk per thread."""
        return self.chunk // (WARP * self.options["num_warps"])


def parse(label: str) -> Variant:
    """Return the variant of a label."""
    shape, *words = label.split()
    chunk, warps = map(int, shape.split("x"))
    options = {"num_warps": warps}
    if words and words[0].startswith("r"):
        options["maxnreg"] = int(words[0][1:])
    return Variant(label, chunk, options, "settled" in words)


class Section(NamedTuple):
    """Variants that are compared on the same tensors."""

    name: str  # the title of its table
    mode: Mode
    labels: str  # the most promising variants first, separated by commas
    steps: tuple[int, ...] = (1, 2)  # to run before comparing; the last one is timed

    def variants(self, chosen: list[str] | None = None) -> dict[str, Variant]:
        """Return the variants by label, of `chosen` only if given; first the one that the package launches."""
        from adax_triton.kernels.launch import current_backend, launch_shape

        shape = launch_shape(current_backend())
        others = [label for label in self.labels.split(", ") if not chosen or label in chosen]
        return {label: parse(label) for label in [f"{shape.chunk_size}x{shape.num_warps}", *others]}


_QUANTIZED = "1024x4, 2048x8 r48, 1024x8, 2048x4, 1024x4 r48, 2048x8 r64, 512x4, 4096x8"
_LATE = "2048x8 settled, 2048x8 r48, 2048x8 r48 settled, 1024x4 r48, 1024x4 r48 settled"
_LABELS = {
    "fp32": "2048x8 r48, 1024x8, 1024x4 r48, 2048x8 r40, 1024x4, 2048x8 r64, 2048x4, 512x4, 4096x16",
    "bf16 + float32 + 24-bit masters": "2048x8 r48, 1024x4 r48, 1024x8, 2048x8 r64, 1024x4, 2048x4, 4096x8",
    "bf16 + bfloat16": "2048x8 r48, 1024x4, 2048x4, 1024x8, 2048x8 r64, 1024x4 r48, 4096x8",
    "bf16 + 8bit_v16 + 24-bit masters": _QUANTIZED,
    "bf16 + 8bit + 24-bit masters": _QUANTIZED,
}
SECTIONS = {name: Section(name, MODES[name], labels) for name, labels in _LABELS.items()}
SECTIONS |= {
    f"{mode}, frozen": Section(f"{mode}, frozen", MODES[mode], _LATE, (1, 2, LATE_STEP))
    for mode in ("fp32", "bf16 + bfloat16")
}
