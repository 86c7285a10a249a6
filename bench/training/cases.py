"""Optimizers and frameworks of `adax-triton bench train`, with their DeepSpeed configurations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CLIPPING = 1.0
# By optimizer name, which is also its type in a DeepSpeed configuration.
RULES: dict[str, dict[str, Any]] = {
    "AdaXW": {"betas": (0.9, 1e-4), "eps": 1e-12, "weight_decay": 0.05},
    "AdamW": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05},
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str  # `framework / optimizer`
    stage: int | None = None  # of ZeRO; None is plain PyTorch
    offload: bool = False  # ZeRO keeps the optimizer states on the CPU and steps there
    states: str = "float32"  # of AdaXW
    bfloat16_weights: bool = False  # of plain PyTorch; otherwise weights are float32, and autocast converts them
    master_weights: str | None = None  # of AdaXW with bfloat16 weights

    @property
    def framework(self) -> str:
        """The part of the name before the optimizer.

        Cases of one framework are compared.
        """
        return self.name.partition(" / ")[0]

    @property
    def optimizer(self) -> str:
        """`"AdaXW"`, or `"AdamW"` of torch or DeepSpeed."""
        return "AdaXW" if "AdaXW" in self.name else "AdamW"


def cases(dtype: str) -> dict[str, Case]:
    """Return all cases with a forward pass in `dtype`, by name."""
    found = [Case("plain / torch AdamW"), Case("plain / AdaXW")]
    if dtype == "float32":
        found += [Case(f"plain / AdaXW {states}", states=states) for states in ("bfloat16", "8bit_v16", "8bit")]
    else:
        found.append(Case("plain / torch AdamW, bfloat16 weights", bfloat16_weights=True))
        for states, masters, bits in (("float32", "float32", 32), ("8bit_v16", "24bit", 24), ("8bit", "24bit", 24)):
            name = f"plain / AdaXW {states}, bfloat16 weights, {bits}-bit masters"
            found.append(Case(name, states=states, bfloat16_weights=True, master_weights=masters))
    for offload, stages in ((False, (0, 1, 2, 3)), (True, (1, 2, 3))):
        for stage in stages:
            framework = f"ZeRO-{stage}{' offload' if offload else ''}"
            found += [Case(f"{framework} / {name}", stage, offload) for name in ("DeepSpeed AdamW", "AdaXW")]
    found.append(Case("ZeRO-2 / AdaXW 8bit_v16", 2, states="8bit_v16"))
    return {case.name: case for case in found}


def choose(found: dict[str, Case], only: list[str] | None) -> list[Case]:
    """Return the cases named in `only`, in full or by part.

    Raises ValueError if there are none.
    """

    def is_chosen(name: str) -> bool:
        return not only or any(part == name if part in found else part in name for part in only)

    chosen = [case for name, case in found.items() if is_chosen(name)]
    if not chosen:
        raise ValueError(f"--only {only}: expected names, or parts of names, of {list(found)}")
    return chosen


def deepspeed_config(case: Case, batch: int, dtype: str, lr: float, device: str) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a case.

    AdaXW's and AdamW's differ only in "optimizer".
    """
    states = {"states": case.states} if case.optimizer == "AdaXW" else {}
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": device == "cuda"}} if case.offload else {}
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_clipping": CLIPPING,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": case.stage, **offload},
        "bf16": {"enabled": dtype == "bfloat16"},
        "optimizer": {"type": case.optimizer, "params": {"lr": lr, **RULES[case.optimizer], **states}},
    }
