"""Train a small GPT-2 with Accelerate and DeepSpeed, configured by huggingface.json.

deepspeed examples/train_accelerate.py                         # one process per GPU
torchrun --nproc-per-node 1 examples/train_accelerate.py       # on a CPU Accelerate supports one process
"""

import logging
from itertools import islice

import adax_triton.integrations.deepspeed  # noqa: F401  registers AdaX and AdaXW
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DummyOptim
from gpt2_on_text import DEEPSPEED_CONFIG, Windows, build_model, parse_arguments
from torch.utils.data import DataLoader


def main(argv: list[str] | None = None) -> None:
    """Train from the command line, and print the losses."""
    args = parse_arguments(argv, __doc__)
    logging.basicConfig(level=logging.INFO)  # logs the optimizer in use
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=str(DEEPSPEED_CONFIG)),
        mixed_precision="bf16" if torch.cuda.is_available() else "no",
    )
    model = build_model(args.width)
    # Placeholder: DeepSpeed creates the configured optimizer; lr and weight_decay replace "auto".
    optimizer = DummyOptim(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    loader = DataLoader(Windows(args.data), batch_size=args.batch, shuffle=True)
    engine, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in islice(loader, args.steps):
        loss = engine(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach().reshape(1)).mean().item())
    optimizer_class = type(engine.basic_optimizer)
    name = f"{optimizer_class.__module__}.{optimizer_class.__qualname__}"
    accelerator.print(f"{name}: loss {losses[0]:.3f}, after {len(losses)} steps {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
