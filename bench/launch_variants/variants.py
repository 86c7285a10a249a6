"""The kernel variants to time, in sections that are compared with each other."""

from __future__ import annotations

from typing import NamedTuple

from adax_triton.bench.harness.modes import MODES, Mode

WARP = 32  # threads, on NVIDIA
LATE_STEP = 1_000_000  # w_t is 0 in float32, so no second moment changes


class Variant(NamedTuple):
    """How a kernel is compiled and launched.

    Attributes:
        label: the name in tables and on the command line, see `parse`.
        chunk: elements per program; in the norm kernel, per iteration.
        elements_per_thread: of a chunk.
        options: of Triton's compiler: warps, and the limit of registers per thread.
        programs: of the norm kernel; None in the step kernel.
        settled: store only the second moments that changed.
        rewrite: a key of `kernel_rewrites.REWRITES`, or None.
    """

    label: str
    chunk: int
    elements_per_thread: int
    options: dict[str, int]
    programs: int | None
    skip_unchanged_v: bool
    rewrite: str | None


def parse(label: str) -> Variant:
    """Return the variant of a label: `CHUNKxWARPS [rREGISTERS] [pPROGRAMS] [settled] [REWRITE]`."""
    shape, *words = label.split()
    chunk, warps = map(int, shape.split("x"))
    numbers = {word[0]: int(word[1:]) for word in words if word[1:].isdigit()}
    options = {"num_warps": warps} | ({"maxnreg": numbers["r"]} if "r" in numbers else {})
    rewrite = next((word for word in words if not word[1:].isdigit() and word != "settled"), None)
    return Variant(label, chunk, chunk // (WARP * warps), options, numbers.get("p"), "settled" in words, rewrite)


class Section(NamedTuple):
    """Variants of one kernel, compared on the same tensors.

    Attributes:
        name: the title of its table.
        mode: dtypes of the tensors.
        labels: the most promising variants first, separated by commas.
        steps: step numbers to run before comparing; the last one is timed. None: the gradient norm kernel.
    """

    name: str
    mode: Mode
    labels: str
    steps: tuple[int, ...] | None = (1, 2)

    def variants(self, chosen: list[str] | None = None) -> dict[str, Variant]:
        """Return the variants by label, of `chosen` only if given; first the one that the package launches."""
        from adax_triton.kernels.grad_norm import MAX_PARTIALS
        from adax_triton.kernels.launch import current_backend, launch_shape

        shape = launch_shape(current_backend())
        baseline = f"{shape.chunk_size}x{shape.num_warps}" + ("" if self.steps else f" p{MAX_PARTIALS}")
        others = [label for label in self.labels.split(", ") if not chosen or label in chosen]
        return {label: parse(label) for label in [baseline, *others]}


_QUANTIZED = (
    "1024x4, 2048x8 r48, 2048x8 abs-product, 1024x8, 2048x4, 1024x4 r48, 2048x8 r64, 2048x8 constant-random, "
    "2048x8 quotient, 512x4, 4096x8"
)
_LATE = "2048x8 settled, 2048x8 r48, 2048x8 r48 settled, 1024x4 r48, 1024x4 r48 settled"
_NORM = (
    "2048x8 p4096, 4096x8 p1024, 4096x8 p4096, 8192x8 p1024, 2048x8 p528, 8192x16 p528, 2048x4 p2048, 8192x8 p4096, "
    "4096x16 p1024, 2048x8 p16384, 1024x4 p4096"
)
_STEPS = {
    "fp32": "2048x8 r48, 1024x8, 1024x4 r48, 2048x8 r40, 1024x4, 2048x8 r64, 2048x4, 2048x8 quotient, 512x4, 4096x16",
    "bf16 + float32 + 24-bit masters": "2048x8 r48, 1024x4 r48, 1024x8, 2048x8 r64, 1024x4, 2048x4, 2048x8 quotient, "
    "2048x8 constant-random, 4096x8",
    "bf16 + bfloat16": "2048x8 r48, 1024x4, 2048x4, 1024x8, 2048x8 quotient, 2048x8 r64, 1024x4 r48, "
    "2048x8 constant-random, 4096x8",
    "bf16 + 8bit_v16 + 24-bit masters": _QUANTIZED,
    "bf16 + 8bit + 24-bit masters": _QUANTIZED,
}
_FP32, _BF16 = MODES["fp32"], MODES["bf16 + bfloat16"]
SECTIONS = {name: Section(name, MODES[name], labels) for name, labels in _STEPS.items()} | {
    section.name: section
    for section in (
        *(Section(f"{mode.name}, frozen", mode, _LATE, (1, 2, LATE_STEP)) for mode in (_FP32, _BF16)),
        Section("norm of float32", _FP32, _NORM, None),
        Section("norm of bfloat16", _BF16, _NORM, None),
    )
}
