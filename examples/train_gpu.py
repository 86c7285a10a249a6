"""Train a small bfloat16 GPT with plain PyTorch, on GPU or CPU.

python examples/train_gpu.py                               # the source of Python's standard library
python examples/train_gpu.py --data notes/ --steps 2000    # a text file or a folder
python examples/train_gpu.py --stop 100                    # saves runs/train_gpu.pt after step 100
python examples/train_gpu.py --resume                      # continues from runs/train_gpu.pt
"""

import argparse
import time
from pathlib import Path

import torch
from gpt import GPT
from text_data import TextData, read_text
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from adax_triton import AdaXW


def main(argv: list[str] | None = None) -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="text file or folder (default: source of Python's standard library)")
    parser.add_argument("--steps", type=int, default=400, help="length of the learning rate schedule")
    parser.add_argument("--stop", type=int, help="save and exit after this step (default: --steps)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help="model width; a multiple of 4")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/train_gpu.pt"))
    parser.add_argument("--resume", action="store_true", help="continue from --checkpoint")
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = TextData(read_text(args.data, max_bytes=8_000_000), context=128, seed=0)
    torch.manual_seed(0)
    model = GPT(args.layers, args.width, heads=4, context=128).to(device, torch.bfloat16)
    # 8 bytes per weight: weight 2, gradient 2, master weight 1, states 3.
    optimizer = AdaXW(model.parameters(), args.lr, states="8bit_v16", master_weights="24bit", max_grad_norm=1.0)
    warmup = args.steps // 10
    ramp = LinearLR(optimizer, 0.1, total_iters=warmup)
    decay = CosineAnnealingLR(optimizer, args.steps - warmup)
    schedule = SequentialLR(optimizer, [ramp, decay], milestones=[warmup])
    done, saved_parts = 0, {"model": model, "optimizer": optimizer, "schedule": schedule}
    if args.resume:
        saved = torch.load(args.checkpoint, map_location=device)
        done = saved["step"]
        for name, part in saved_parts.items():
            part.load_state_dict(saved[name])

    stop, start = args.steps if args.stop is None else args.stop, time.perf_counter()
    if not done <= stop <= args.steps:
        parser.error(f"--stop {stop}: expected {done} (the steps done) to {args.steps} (--steps)")
    for step in range(done + 1, stop + 1):
        inputs, targets = (batch.to(device) for batch in data.batch(step, rank=0, ranks=1, size=16))
        loss = model(inputs, targets)
        loss.backward()
        optimizer.step()  # clips the gradients: max_grad_norm
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:  # item() waits for the GPU
            print(f"step {step}: loss {loss.item():.3f}, ", end="")
            print(f"{(step - done) * inputs.numel() / (time.perf_counter() - start):,.0f} tokens/s", flush=True)
            done, start = step, time.perf_counter()
    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: part.state_dict() for name, part in saved_parts.items()} | {"step": stop}, args.checkpoint)


if __name__ == "__main__":
    main()
