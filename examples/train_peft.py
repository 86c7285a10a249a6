"""Train LoRA adapters (PEFT) with the SFTTrainer of TRL.

The base model is a small random GPT-2.

pip install peft trl
python examples/train_peft.py
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from text_data import read_text
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel
from trl import SFTConfig, SFTTrainer

from adax_triton import AdaXW


def main(argv: list[str] | None = None) -> None:
    """Train from the command line, and print the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="text file or folder (default: source of Python's standard library)")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    args = parser.parse_args(argv)

    lines = read_text(args.data, max_bytes=200_000).decode(errors="ignore").splitlines()
    tokenizer = ByT5Tokenizer()  # one token per byte; needs no files
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=64, n_layer=2, n_head=4))
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                max_steps=args.steps,
                max_length=64,
                bf16=torch.cuda.is_available(),
                lr_scheduler_type="cosine",
                logging_steps=max(1, args.steps // 10),
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=Dataset.from_dict({"text": [line for line in lines if len(line) > 8]}),
            processing_class=tokenizer,
            # The SFTTrainer adds the adapters, then creates the optimizer.
            peft_config=LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
            optimizer_cls_and_kwargs=(AdaXW, {"lr": 1e-2}),
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = sum(param.numel() for param in trainer.optimizer.state)
    total = sum(param.numel() for param in model.parameters())
    print(f"AdaXW trains {trained} of {total} weights: loss {losses[0]:.3f}, after {args.steps} steps {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
