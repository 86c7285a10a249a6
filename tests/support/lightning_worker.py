"""Train with Lightning, clipped by the optimizer or the Trainer.

python lightning_worker.py cases.json results.json

A case has "precision", "clip" ("optimizer", "trainer" or "none") and "scaled" (train with a GradScaler). Its result is
the list of the weights, or the error message.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from adax_triton import AdaXW

MAX_NORM = 0.5


class Linear(lightning.LightningModule):
    def __init__(self, max_grad_norm: float | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.max_grad_norm = torch.nn.Linear(8, 8), max_grad_norm

    def training_step(self, batch: Tensor) -> Tensor:
        return 100 * self.layer(batch).square().mean()

    def configure_optimizers(self) -> AdaXW:
        return AdaXW(self.parameters(), max_grad_norm=self.max_grad_norm)


def run(case: dict[str, Any]) -> list[list[float]] | str:
    model = Linear(MAX_NORM if case["clip"] == "optimizer" else None)
    clipping = {"gradient_clip_val": MAX_NORM} if case["clip"] == "trainer" else {}
    if case.get("scaled"):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # small: no step overflows
        precision = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    else:
        precision = {"precision": case["precision"]}
    trainer = lightning.Trainer(
        max_steps=4,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **clipping,
        **precision,
    )
    # Gradients of different norms: the updates of AdaX do not depend on a constant factor.
    scales = torch.tensor([1.0, 8.0, 0.5, 4.0]).reshape(4, 1, 1)
    batches = scales * torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(1))
    if case.get("precision") == "bf16-true":
        batches = batches.bfloat16()
    try:
        trainer.fit(model, iter(batches))  # Lightning would treat a list as several loaders
    except RuntimeError as error:
        return str(error)
    assert trainer.optimizers[0].state_dict()["state"][0]["step"] == 4
    return model.layer.weight.tolist()


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cases = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([run(case) for case in cases]))
