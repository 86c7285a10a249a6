"""Train a small GPT with FSDP2, on GPUs or on a CPU.

torchrun --nproc-per-node 2 examples/train_fsdp2.py               # the source of Python's standard library
torchrun --nproc-per-node 2 examples/train_fsdp2.py --stop 100    # saves runs/fsdp2/step100
torchrun --nproc-per-node 4 examples/train_fsdp2.py --resume runs/fsdp2/step100    # 1, 2, 4, 8 or 16
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gpt import GPT
from text_data import TextData, read_text
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim.lr_scheduler import LambdaLR

from adax_triton import AdaXW


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="text file or folder (default: source of Python's standard library)")
    parser.add_argument("--steps", type=int, default=400, help="length of the learning rate schedule")
    parser.add_argument("--stop", type=int, help="save and exit after this step (default: --steps)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help="model width; a multiple of 32, for the 8-bit states")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--out", type=Path, default=Path("runs/fsdp2"), help="folder of checkpoints")
    parser.add_argument("--resume", type=Path, help="checkpoint to continue from")
    args = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    data = TextData(read_text(args.data, max_bytes=8_000_000), context=128, seed=0)
    torch.manual_seed(0)
    model = GPT(args.layers, args.width, heads=4, context=128).to(device)
    # The sharded weights are float32; forward and backward use bfloat16.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in (*model.blocks, model):
        fully_shard(part, mp_policy=policy)
    optimizer = AdaXW(model.parameters(), args.lr, states="8bit_v16", max_grad_norm=1.0)  # after fully_shard
    warmup = max(1, args.steps // 10)
    schedule = LambdaLR(optimizer, lambda s: min((s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * s / args.steps)))

    def checkpoint(step: int) -> dict[str, Any]:
        weights, states = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": states, "schedule": schedule.state_dict(), "step": step}

    done = 0
    if args.resume:
        saved = checkpoint(0)
        dcp.load(saved, checkpoint_id=args.resume)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        done = saved["step"]
    stop = args.steps if args.stop is None else args.stop
    if not done <= stop <= args.steps:
        raise SystemExit(f"--stop {stop}: expected {done} (the steps done) to {args.steps} (--steps)")
    for step in range(done + 1, stop + 1):
        inputs, targets = (batch.to(device) for batch in data.batch(step, rank, ranks, size=16 // ranks))
        loss = model(inputs, targets)
        loss.backward()
        optimizer.step()  # clips by the norm over all ranks: max_grad_norm
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            dist.all_reduce(loss.detach_())
            if rank == 0:
                print(f"step {step}: loss {loss / ranks:.3f}, gradient norm {optimizer.grad_norm:.2f}", flush=True)
    dcp.save(checkpoint(stop), checkpoint_id=args.out / f"step{stop}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
