"""Train a small GPT-2 with the Trainer and DeepSpeed, configured by huggingface.json.

deepspeed examples/train_huggingface.py                        # one process per GPU
torchrun --nproc-per-node 1 examples/train_huggingface.py      # on a CPU the Trainer supports one process
"""

import logging
import tempfile

import adax_triton.integrations.huggingface  # noqa: F401  registers AdaX and AdaXW
import torch
from gpt2_on_text import DEEPSPEED_CONFIG, Windows, build_model, parse_arguments
from transformers import Trainer, TrainingArguments


def main(argv: list[str] | None = None) -> None:
    """Train from the command line, and print the losses."""
    args = parse_arguments(argv, __doc__)
    logging.basicConfig(level=logging.INFO)  # logs the optimizer in use
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            output_dir=folder,
            deepspeed=str(DEEPSPEED_CONFIG),
            per_device_train_batch_size=args.batch,
            max_steps=args.steps,
            # These values replace "auto". The configuration omits betas and eps to keep AdaXW's defaults.
            learning_rate=args.lr,
            weight_decay=args.weight_decay,
            bf16=torch.cuda.is_available(),
            warmup_steps=args.steps // 10,
            lr_scheduler_type="cosine",
            logging_steps=max(1, args.steps // 10),
            save_strategy="no",
            report_to="none",
        )
        trainer = Trainer(build_model(args.width), training, train_dataset=Windows(args.data))
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        optimizer_class = type(trainer.deepspeed.basic_optimizer)
        print(
            f"{optimizer_class.__module__}.{optimizer_class.__qualname__}: "
            f"loss {losses[0]:.3f}, after {args.steps} steps {losses[-1]:.3f}"
        )


if __name__ == "__main__":
    main()
