"""The variants of kernels that `launch_variants` times, in sections of those that it compares."""

from __future__ import annotations

from typing import NamedTuple

from adax_triton.bench.harness.modes import FP32, MODES, Mode

_WARP = 32  # threads, on NVIDIA
FROZEN = 1_000_000  # a step whose w_t is 0 in float32: no second moment changes


class Variant(NamedTuple):
    """How a kernel is compiled and launched.

    Attributes:
        chunk: elements per program, or per iteration of the norm's kernel.
        warps: that share them.
        registers: per thread, at most; None leaves them to the compiler.
        rewrites: keys of `kernel_rewrites.REWRITES`.
        settled: store only the second moments that changed.
        programs: of the norm's kernel.
    """

    chunk: int
    warps: int
    registers: int | None = None
    rewrites: tuple[str, ...] = ()
    skip_unchanged_v: bool = False
    programs: int | None = None

    @property
    def label(self) -> str:
        """Its name in tables and on the command line, such as `"2048x8 r48 quotient"`."""
        words = [f"{self.chunk}x{self.warps}"]
        words += [f"r{self.registers}"] if self.registers is not None else []
        words += ["+".join(self.rewrites)] if self.rewrites else []
        words += ["settled"] if self.skip_unchanged_v else []
        words += [f"p{self.programs}"] if self.programs is not None else []
        return " ".join(words)

    @property
    def elements_per_thread(self) -> int:
        """Elements of a chunk that one thread has."""
        return self.chunk // (_WARP * self.warps)

    @property
    def options(self) -> dict[str, int]:
        """The options that Triton compiles it with."""
        return {"num_warps": self.warps} | ({} if self.registers is None else {"maxnreg": self.registers})


class Section(NamedTuple):
    """Variants of one kernel that are compared with each other.

    Attributes:
        name: of the table.
        mode: dtypes of the tensors.
        variants: the most promising first; `variants_of` puts the present one before them.
        norm: the gradient norm's kernel instead of the step's.
        steps: compared after all of these; the last is timed.
    """

    name: str
    mode: Mode
    variants: tuple[Variant, ...]
    norm: bool = False
    steps: tuple[int, ...] = (1, 2)


def variants_of(section: Section) -> list[Variant]:
    """Return a section's variants, the one that the package launches first."""
    from adax_triton.kernels.grad_norm import MAX_PARTIALS
    from adax_triton.kernels.launch import current_backend, launch_shape

    shape = launch_shape(current_backend())
    present = Variant(shape.chunk_size, shape.num_warps, programs=MAX_PARTIALS if section.norm else None)
    return list(dict.fromkeys([present, *section.variants]))


_QUOTIENT = ("quotient",)
_RANDOM = ("constant-random",)
_ABS = ("abs-product",)
_FP32 = (
    Variant(2048, 8, 48),
    Variant(1024, 8),
    Variant(1024, 4, 48),
    Variant(2048, 8, 40),
    Variant(1024, 4),
    Variant(2048, 8, 64),
    Variant(2048, 4),
    Variant(2048, 8, None, _QUOTIENT),
    Variant(512, 4),
    Variant(4096, 16),
)
_MASTERS = (
    Variant(2048, 8, 48),
    Variant(1024, 4, 48),
    Variant(1024, 8),
    Variant(2048, 8, 64),
    Variant(1024, 4),
    Variant(2048, 4),
    Variant(2048, 8, None, _QUOTIENT),
    Variant(2048, 8, None, _RANDOM),
    Variant(4096, 8),
)
_BFLOAT16 = (
    Variant(2048, 8, 48),
    Variant(1024, 4),
    Variant(2048, 4),
    Variant(1024, 8),
    Variant(2048, 8, None, _QUOTIENT),
    Variant(2048, 8, 64),
    Variant(1024, 4, 48),
    Variant(2048, 8, None, _RANDOM),
    Variant(4096, 8),
)
_CODES = (
    Variant(1024, 4),
    Variant(2048, 8, 48),
    Variant(2048, 8, None, _ABS),
    Variant(1024, 8),
    Variant(2048, 4),
    Variant(1024, 4, 48),
    Variant(2048, 8, 64),
    Variant(2048, 8, None, _RANDOM),
    Variant(2048, 8, None, _QUOTIENT),
    Variant(512, 4),
    Variant(4096, 8),
)
_SETTLED = (
    Variant(2048, 8, skip_unchanged_v=True),
    Variant(2048, 8, 48),
    Variant(2048, 8, 48, skip_unchanged_v=True),
    Variant(1024, 4, 48),
    Variant(1024, 4, 48, skip_unchanged_v=True),
)
_NORM = (
    Variant(2048, 8, programs=4096),
    Variant(4096, 8, programs=1024),
    Variant(4096, 8, programs=4096),
    Variant(8192, 8, programs=1024),
    Variant(2048, 8, programs=528),
    Variant(8192, 16, programs=528),
    Variant(2048, 4, programs=2048),
    Variant(8192, 8, programs=4096),
    Variant(4096, 16, programs=1024),
    Variant(2048, 8, programs=16384),
    Variant(1024, 4, programs=4096),
)
_STEPS = {
    FP32.name: _FP32,
    "bf16 + float32 + 24-bit masters": _MASTERS,
    "bf16 + bfloat16": _BFLOAT16,
    "bf16 + 8bit_v16 + 24-bit masters": _CODES,
    "bf16 + 8bit + 24-bit masters": _CODES,
}
_BF16 = MODES["bf16 + bfloat16"]
SECTIONS = {
    section.name: section
    for section in (
        *(Section(name, MODES[name], variants) for name, variants in _STEPS.items()),
        *(Section(f"{mode.name}, frozen", mode, _SETTLED, steps=(1, 2, FROZEN)) for mode in (FP32, _BF16)),
        *(
            Section(f"norm of {name}", mode, _NORM, norm=True)
            for name, mode in (("float32", FP32), ("bfloat16", _BF16))
        ),
    )
}
