"""What `adax-triton bench train` trains: the same model, data and clipping under every framework and optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CLIPPING = 1.0
# By the optimizer's name, which is also its type in a DeepSpeed configuration; the learning rate is the run's.
RULES: dict[str, dict[str, Any]] = {
    "AdaXW": {"betas": (0.9, 1e-4), "eps": 1e-12, "weight_decay": 0.05},
    "AdamW": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05},
}
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: as shown, `framework / optimizer`.
        optimizer: `"AdaXW"`, of this package, or `"AdamW"`, of torch or of DeepSpeed.
        stage: of ZeRO; None is plain PyTorch.
        offload: ZeRO keeps and steps the optimizer's states on the CPU.
        bfloat16_weights: plain PyTorch trains bfloat16 weights; else float32 ones, under autocast in a bfloat16 run.
        states: of AdaXW in plain PyTorch.
        master_weights: of AdaXW beside bfloat16 weights.
    """

    name: str
    optimizer: str
    stage: int | None = None
    offload: bool = False
    bfloat16_weights: bool = False
    states: str = "float32"
    master_weights: str | None = None

    @property
    def framework(self) -> str:
        """Return what stands before the optimizer in the name: cases of one framework are compared."""
        return self.name.partition(" / ")[0]

    @property
    def is_ours(self) -> bool:
        """Whether the optimizer is of this package."""
        return self.optimizer == "AdaXW"


def cases(dtype: str) -> list[Case]:
    """Return every case of a run whose forward pass is in `dtype`.

    Raises:
        ValueError: `dtype` is not one of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {DTYPES}, got {dtype!r}")
    found = [*_plain(dtype == "bfloat16")]
    for offload in (False, True):
        for stage in range(1 if offload else 0, 4):
            framework = f"ZeRO-{stage}{' offload' if offload else ''}"
            found.append(Case(f"{framework} / DeepSpeed AdamW", "AdamW", stage, offload))
            found.append(Case(f"{framework} / AdaXW", "AdaXW", stage, offload))
    return found


def _plain(autocast: bool) -> list[Case]:
    both = [Case("plain / torch AdamW", "AdamW"), Case("plain / AdaXW", "AdaXW")]
    if not autocast:
        return both + [Case(f"plain / AdaXW {name}", "AdaXW", states=name) for name in ("bfloat16", "8bit_v16", "8bit")]
    weights = (("float32", "float32"), ("8bit_v16", "24bit"), ("8bit", "24bit"))
    return both + [
        Case(
            f"plain / AdaXW {states}, bfloat16 weights, {'32' if masters == 'float32' else '24'}-bit masters",
            *("AdaXW", None, False, True, states, masters),
        )
        for states, masters in weights
    ]


QUICK = ("plain / torch AdamW", "plain / AdaXW", "ZeRO-2 / DeepSpeed AdamW", "ZeRO-2 / AdaXW")


def choose(found: list[Case], only: list[str] | None, quick: bool) -> list[Case]:
    """Return the cases that are named by one of `only`, in full or by a part; of those of `QUICK` if `quick`.

    Raises:
        ValueError: there are none.
    """
    names = [case.name for case in found]

    def is_named(case: Case) -> bool:
        return not only or any(part == case.name if part in names else part in case.name for part in only)

    chosen = [case for case in found if is_named(case) and (not quick or case.name in QUICK)]
    if not chosen:
        raise ValueError(f"only: none of {names} is named by {only}" + (" in a quick run" if quick else ""))
    return chosen


def deepspeed_config(case: Case, batch: int, dtype: str, lr: float, device: str) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a case; only "optimizer" differs between ours and DeepSpeed's own."""
    zero: dict[str, Any] = {"stage": case.stage}
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_clipping": CLIPPING,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
        "optimizer": {"type": case.optimizer, "params": {"lr": lr, **RULES[case.optimizer]}},
    }
