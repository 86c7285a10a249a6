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
        warps: per program.
        registers: limit per thread; None leaves it to the compiler.
        programs: of the norm kernel; None in the step kernel.
        settled: store only the second moments that changed.
        rewrite: a key of `kernel_rewrites.REWRITES`, or None.
    """

    label: str
    chunk: int
    warps: int
    registers: int | None
    programs: int | None
    skip_unchanged_v: bool
    rewrite: str | None

    @property
    def elements_per_thread(self) -> int:
        """Elements of a chunk that one thread updates."""
        return self.chunk // (WARP * self.warps)

    @property
    def options(self) -> dict[str, int]:
        """Triton's compile options."""
        return {"num_warps": self.warps} | ({} if self.registers is None else {"maxnreg": self.registers})


def parse(label: str) -> Variant:
    """Return the variant of a label: `CHUNKxWARPS [rREGISTERS] [pPROGRAMS] [settled] [REWRITE]`."""
    shape, *words = label.split()
    chunk, warps = map(int, shape.split("x"))
    numbers = {word[0]: int(word[1:]) for word in words if word[1:].isdigit()}
    rewrite = next((word for word in words if not word[1:].isdigit() and word != "settled"), None)
    return Variant(label, chunk, warps, numbers.get("r"), numbers.get("p"), "settled" in words, rewrite)


class Section(NamedTuple):
    """Variants of one kernel, compared on the same tensors.

    Attributes:
        name: the title of its table.
        mode: dtypes of the tensors.
        labels: the most promising variants first, separated by commas.
        norm: the gradient norm kernel instead of the step kernel.
        steps: step numbers to run before comparing; the last one is timed.
    """

    name: str
    mode: Mode
    labels: str
    norm: bool = False
    steps: tuple[int, ...] = (1, 2)

    def variants(self, chosen: list[str] | None = None) -> dict[str, Variant]:
        """Return the variants by label, of `chosen` only if given; first the one that the package launches."""
        from adax_triton.kernels.grad_norm import MAX_PARTIALS
        from adax_triton.kernels.launch import current_backend, launch_shape

        shape = launch_shape(current_backend())
        baseline = f"{shape.chunk_size}x{shape.num_warps}" + (f" p{MAX_PARTIALS}" if self.norm else "")
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
SECTIONS = {
    section.name: section
    for section in (
        *(Section(name, MODES[name], labels) for name, labels in _STEPS.items()),
        *(
            Section(f"{name}, frozen", MODES[name], _LATE, steps=(1, 2, LATE_STEP))
            for name in ("fp32", "bf16 + bfloat16")
        ),
        Section("norm of float32", MODES["fp32"], _NORM, norm=True),
        Section("norm of bfloat16", MODES["bf16 + bfloat16"], _NORM, norm=True),
    )
}
