"""Train a small GPT with Lightning.

python examples/train_lightning.py                # the source of Python's standard library
python examples/train_lightning.py --stop 100     # saves runs/train_lightning.ckpt after step 100
python examples/train_lightning.py --resume runs/train_lightning.ckpt
"""

import argparse
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import lightning
from gpt import GPT
from text_data import TextData, read_text
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from adax_triton import AdaXW


class Model(lightning.LightningModule):
    """A GPT with its optimizer, schedule and data."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.args, self.gpt = args, GPT(args.layers, args.width, heads=4, context=128)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss."""
        loss = self.gpt(*batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdaXW with warm-up and cosine decay."""
        optimizer = AdaXW(self.parameters(), self.args.lr, states="8bit_v16")
        schedule = OneCycleLR(optimizer, self.args.lr, self.args.steps, pct_start=0.12, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the batches that follow; a resumed Lightning run skips none."""
        data = TextData(read_text(self.args.data, max_bytes=8_000_000), context=128, seed=0)
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        return (data.batch(step, rank, ranks, size=16) for step in count(self.global_step + 1))


def main(argv: list[str] | None = None) -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="text file or folder (default: source of Python's standard library)")
    parser.add_argument("--steps", type=int, default=400, help="length of the learning rate schedule")
    parser.add_argument("--stop", type=int, help="save and exit after this step (default: --steps)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help="model width; a multiple of 4")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/train_lightning.ckpt"))
    parser.add_argument("--resume", type=Path, help="checkpoint to continue from")
    args = parser.parse_args(argv)
    args.stop = args.steps if args.stop is None else args.stop
    if not 0 < args.stop <= args.steps:
        parser.error(f"--stop {args.stop}: expected 1 to {args.steps} (--steps)")
    lightning.seed_everything(0)
    trainer = lightning.Trainer(  # main saves once, at the end
        max_steps=args.stop, precision="bf16-mixed", gradient_clip_val=1.0, logger=False, enable_checkpointing=False
    )
    trainer.fit(Model(args), ckpt_path=args.resume)
    if "loss" in trainer.callback_metrics:  # absent if the resumed run had no steps left
        trainer.print(f"step {trainer.global_step}: loss {trainer.callback_metrics['loss']:.3f}")
    trainer.save_checkpoint(args.checkpoint)


if __name__ == "__main__":
    main()
