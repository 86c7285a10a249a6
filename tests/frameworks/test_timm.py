"""timm's optimizer factory, schedulers, scaler, Lookahead and weight averages.

Oracle: the same training with torch's AdamW. With AdaXW, a resumed run equals the uninterrupted one bit for bit. timm
imports torchvision; where that is missing, a stand-in takes its place during these tests. They use no code of it.
"""

from __future__ import annotations

import importlib.util
import io
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from paths import ROOT

from adax_triton import AdamW, AdaXW

TORCHVISION = (
    *("", ".datasets", ".models", ".models.feature_extraction", ".ops", ".ops.misc"),
    *(".transforms", ".transforms.functional", ".transforms.v2"),
)
pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, SAVED_AT = 8, 5
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight decay of all parameters": {"filter_bias_and_bn": False},
    "layer decay": {"layer_decay": 0.7},
    "frozen layers": {"layer_decay": 0.5, "layer_decay_no_opt_scale": 0.3},
    "lookahead": {"name": "lookahead_"},
    "foreach": {"foreach": True},
    **{f"sched {name}": {"layer_decay": 0.7, "sched": name} for name in ("tanh", "step", "multistep", "poly", "wsd")},
    "sched plateau": {"sched": "plateau"},
    "clip norm": {"clip": {"clip_grad": 0.1, "clip_mode": "norm"}},
    "clip value": {"clip": {"clip_grad": 1e-3, "clip_mode": "value"}},
    "clip agc, second-order graph": {"clip": {"clip_grad": 1e-2, "clip_mode": "agc", "create_graph": True}},
}


@pytest.fixture(scope="module", autouse=True)
def timm() -> Iterator[Any]:
    """Import timm, and register this package's optimizers as its users do."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchvision") is None:
            for name in TORCHVISION:
                patch.setitem(sys.modules, f"torchvision{name}", MagicMock())
        module = pytest.importorskip("timm")
        from timm.optim import OptimInfo
        from timm.optim._optim_factory import default_registry

        patch.setattr(default_registry, "_optimizers", {**default_registry._optimizers})
        for optimizer_class in (AdaXW, AdamW):
            default_registry.register(OptimInfo(f"our{optimizer_class.__name__}", optimizer_class, has_betas=True))
        yield module


class Run:
    """Trains a small vision transformer as timm's train.py does."""

    def __init__(self, case: str, optimizer: str, lr: float = 3e-3) -> None:
        from timm.models.vision_transformer import VisionTransformer
        from timm.optim import create_optimizer_v2
        from timm.scheduler import create_scheduler_v2
        from timm.utils import ModelEmaV3, NativeScaler

        options = {"clip": {"clip_grad": None}, "name": "", "sched": "cosine", "weight_decay": 0.05, **CASES[case]}
        self.clip, name, sched = (options.pop(key) for key in ("clip", "name", "sched"))
        torch.manual_seed(0)
        self.model = VisionTransformer(
            img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=4, qkv_bias=False
        )
        self.optimizer = create_optimizer_v2(self.model, f"{name}{optimizer}", lr=lr, **options)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched=sched, num_epochs=9, warmup_epochs=2, decay_epochs=2, decay_milestones=[3, 6]
        )
        self.scaler, self.average = NativeScaler(device="cpu"), ModelEmaV3(self.model, decay=0.5)

    def train(self, steps: Iterable[int]) -> Run:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(4, 3, 16, 16, generator=generator)
            self.optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(self.model(images), torch.arange(4))
            self.scaler(loss, self.optimizer, parameters=self.model.parameters(), **self.clip)
            self.average.update(self.model)
            self.scheduler.step(step + 1, metric=1.0)
        return self

    def parts(self) -> list[Any]:
        return [self.model, self.average, self.optimizer, self.scheduler, self.scaler]

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save([part.state_dict() for part in self.parts()], file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> Run:
        for part, state_dict in zip(self.parts(), torch.load(file, weights_only=False), strict=True):
            part.load_state_dict(state_dict)
        return self


def assert_close(found: Run, expected: Run, tolerance: float) -> None:
    for part, other in zip(found.parts()[:2], expected.parts()[:2], strict=True):
        for a, b in zip(part.state_dict().values(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=tolerance)
    assert [group["lr"] for group in found.optimizer.param_groups] == [
        group["lr"] for group in expected.optimizer.param_groups
    ]


@pytest.mark.parametrize("case", CASES)
def test_training_with_adamw_equals_torch(case: str, native_cpu: torch.device) -> None:
    start, expected = Run(case, "adamw"), Run(case, "adamw").train(range(STEPS))
    assert (start.model.head.weight - expected.model.head.weight).abs().max() > 1e-4  # it trains
    assert_close(Run(case, "ourAdamW").train(range(STEPS)), expected, 2e-6)


@pytest.mark.parametrize("case", CASES)
def test_training_with_adaxw_resumes_bit_for_bit(case: str, native_cpu: torch.device) -> None:
    uninterrupted = Run(case, "ourAdaXW").train(range(STEPS))
    saved = Run(case, "ourAdaXW").train(range(SAVED_AT)).saved()
    assert_close(Run(case, "ourAdaXW").load(saved).train(range(SAVED_AT, STEPS)), uninterrupted, 0.0)


def test_documented_block_runs(native_cpu: torch.device) -> None:
    (block,) = re.findall(r"```python\n([^`]*from timm[^`]*)```", (ROOT / "docs" / "frameworks.md").read_text())
    names: dict[str, Any] = {"model": torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))}
    exec(block.replace("optimizer = create", "by_name = create"), names)
    by_name, by_groups = (names[name].param_groups for name in ("by_name", "optimizer"))
    assert [type(names[name]) for name in ("by_name", "optimizer")] == [AdaXW, AdaXW]
    assert [(group["lr_scale"], group["weight_decay"]) for group in by_name] == [
        (group["lr_scale"], group["weight_decay"]) for group in by_groups
    ]
