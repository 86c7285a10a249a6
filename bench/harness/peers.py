"""The optimizers of other packages, each at its own dtypes, and in the mode of ours that comes nearest to them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .modes import FP32, MODES
from .providers import Provider, Rule, Step

Build = Callable[[list[Tensor], Rule], Step]
_CUDA = ("cuda",)
# bfloat16 parameter, gradient, and two 8-bit moments with a float32 scale per 256 elements each.
_BLOCKWISE_8BIT = 4 + 2 + 2 * 2 * (1 + 4 / 256)
# The same with a float16 scale per 32 elements.
_FLASHOPTIM = 4 + 2 + 2 * 2 * (1 + 2 / 32)


def _deepspeed_cpu_adam(params: list[Tensor], rule: Rule) -> Step:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(params, adamw_mode=True, **rule).step


def _deepspeed_fused_adam(params: list[Tensor], rule: Rule) -> Step:
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam(params, adam_w_mode=True, **rule).step


def _apex(params: list[Tensor], rule: Rule) -> Step:
    from apex.optimizers import FusedAdam

    return FusedAdam(params, adam_w_mode=True, **rule).step


def _transformer_engine(masters: bool) -> Build:
    def build(params: list[Tensor], rule: Rule) -> Step:
        from transformer_engine.pytorch.optimizers import FusedAdam

        return FusedAdam(params, adam_w_mode=True, master_weights=masters, store_param_remainders=masters, **rule).step

    return build


def _flashoptim(quantize: bool, master_weight_bits: int | None) -> Build:
    def build(params: list[Tensor], rule: Rule) -> Step:
        from flashoptim import FlashAdamW

        return FlashAdamW(params, quantize=quantize, master_weight_bits=master_weight_bits, **rule).step

    return build


def _optimi(kahan_sum: bool) -> Build:
    def build(params: list[Tensor], rule: Rule) -> Step:
        from optimi import AdamW

        return AdamW(params, kahan_sum=kahan_sum, **rule).step

    return build


def _torchao(params: list[Tensor], rule: Rule) -> Step:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, bf16_stochastic_round=True, **rule).step


def _bitsandbytes(params: list[Tensor], rule: Rule) -> Step:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, **rule).step


def _flash(mode: str, quantize: bool, bits: int | None, moved: float = 0.0) -> Provider:
    build = _flashoptim(quantize, bits)
    return Provider("FlashOptim", MODES[mode], build, bytes_per_element=moved, device_types=_CUDA, package="flashoptim")


PEERS = (
    *(
        Provider("DeepSpeedCPUAdam", mode, _deepspeed_cpu_adam, device_types=("cpu",), package="deepspeed")
        for mode in (FP32, MODES["bf16 + float32"])
    ),
    # Its states have the dtype of the parameters; those of the next two are float32.
    *(
        Provider("DeepSpeed FusedAdam", mode, _deepspeed_fused_adam, device_types=_CUDA, package="deepspeed")
        for mode in (FP32, MODES["bf16 + bfloat16"])
    ),
    *(
        Provider("Apex FusedAdam", mode, _apex, device_types=_CUDA, package="apex")
        for mode in (FP32, MODES["bf16 + float32"])
    ),
    *(
        Provider(
            "Transformer Engine FusedAdam",
            MODES[mode],
            _transformer_engine(masters="masters" in mode),
            device_types=_CUDA,
            package="transformer_engine",
        )
        for mode in ("fp32", "bf16 + float32", "bf16 + float32 + 32-bit masters")
    ),
    _flash("fp32", False, None),
    _flash("bf16 + bfloat16 + 24-bit masters", False, 24),
    _flash("bf16 + 8bit", True, None, _FLASHOPTIM),
    _flash("bf16 + 8bit + 24-bit masters", True, 24, _FLASHOPTIM + 2),
    Provider("optimi AdamW", FP32, _optimi(kahan_sum=False), package="optimi"),
    Provider("optimi AdamW", MODES["bf16 + bfloat16"], _optimi(kahan_sum=False), package="optimi"),
    # A bfloat16 compensation, read and written, has the bytes of a 16-bit remainder.
    Provider(
        "optimi AdamW, Kahan", MODES["bf16 + bfloat16 + 32-bit masters"], _optimi(kahan_sum=True), package="optimi"
    ),
    Provider(
        "torchao AdamW8bit",
        MODES["bf16 + 8bit"],
        _torchao,
        bytes_per_element=_BLOCKWISE_8BIT,
        package="torchao",
        most_tensors=150,
    ),
    Provider(
        "bitsandbytes AdamW8bit",
        MODES["bf16 + 8bit"],
        _bitsandbytes,
        bytes_per_element=_BLOCKWISE_8BIT,
        package="bitsandbytes",
    ),
)
