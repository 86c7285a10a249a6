"""Train a small byte-level GPT with DeepSpeed and a configured optimizer.

Start it with any launcher that runs one process per device; `demo.py` starts it with two optimizers on the same data:

    torchrun --nproc-per-node 2 examples/train_gpt.py --config examples/zero2_adax.json --data my_text_folder

Run the same command again to resume from the last checkpoint; the results equal those of an uninterrupted run.
"""

import argparse
import math
import os
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from gpt import GPT
from run_folder import checkpoint_tag
from run_plan import Plan, add_run_arguments, make_plan
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

VALIDATION_BATCHES = 8  # per rank
LAUNCHER = os.getppid()


def import_deepspeed() -> ModuleType:
    """Import DeepSpeed with few log messages and register AdaX and AdaXW."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import adax_triton.integrations.deepspeed  # noqa: F401  registers the optimizer types
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*")  # torch 2.13 warns about it
    # On a CPU DeepSpeed would compile a C++ extension for an all-reduce that only inference uses.
    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    return deepspeed


def learning_rate_factor(warmup: int, steps: int) -> Callable[[int], float]:
    """Return the schedule: linear warm-up, then cosine decay to 0.1."""

    def factor(done: int) -> float:
        if done < warmup:
            return (done + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (done - warmup) / max(1, steps - warmup)))

    return factor


class Trainer:
    """A DeepSpeed engine with its data and its run folder.

    Args:
        plan: settings of the run.
        deepspeed: the module from `import_deepspeed`.
    """

    def __init__(self, plan: Plan, deepspeed: ModuleType) -> None:
        deepspeed.init_distributed(verbose=False)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.data, self.folder, self.settings = plan.data, plan.folder, plan.settings
        torch.manual_seed(self.settings["seed"])
        model = GPT(**{name: self.settings[name] for name in ("layers", "width", "heads", "context")})
        self.weights = sum(parameter.numel() for parameter in model.parameters())
        config = dict(plan.config)
        if torch.cuda.is_available() and not {"bf16", "fp16"} & config.keys():
            config["bf16"] = {"enabled": torch.cuda.is_bf16_supported()}
        factor = learning_rate_factor(self.settings["warmup"], self.settings["steps"])
        self.engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=model.parameters(),
            config=config,
            lr_scheduler=None if "scheduler" in config else lambda optimizer: LambdaLR(optimizer, factor),
        )
        self.batch_size = self.engine.train_micro_batch_size_per_gpu()

    def resume(self, fresh: bool) -> int:
        """Prepare the folder, load its last checkpoint, and return the steps done."""
        if self.rank == 0:
            self.folder.prepare(self.settings, fresh)
        dist.barrier()
        done = self.folder.last_step()
        if done:
            path, _ = self.engine.load_checkpoint(str(self.folder.checkpoints), tag=checkpoint_tag(done))
            if path is None:
                raise RuntimeError(
                    f"{self.folder.checkpoints}: checkpoint {checkpoint_tag(done)} is unreadable; pass --fresh"
                )
        return done

    def train_step(self, step: int) -> float:
        """Train step `step`, counted from 1; return its global loss."""
        accumulation = self.engine.gradient_accumulation_steps()
        total = torch.zeros((), device=self.engine.device)
        for micro_step in range((step - 1) * accumulation, step * accumulation):
            inputs, targets = self.data.batch(micro_step, self.rank, self.ranks, self.batch_size)
            loss = self.engine(inputs.to(self.engine.device), targets.to(self.engine.device))
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach()
        return self._mean_over_ranks(total / accumulation)

    @torch.no_grad()
    def validate(self) -> float:
        """Return the mean loss on the held-out text."""
        self.engine.eval()
        total = torch.zeros((), device=self.engine.device)
        for inputs, targets in self.data.held_out(self.rank, self.ranks, self.batch_size, VALIDATION_BATCHES):
            total += self.engine(inputs.to(self.engine.device), targets.to(self.engine.device))
        self.engine.train()
        return self._mean_over_ranks(total / VALIDATION_BATCHES)

    def save(self, step: int) -> None:
        """Write a checkpoint, then set `latest` when all ranks have finished."""
        self.engine.save_checkpoint(str(self.folder.checkpoints), tag=checkpoint_tag(step), save_latest=False)
        if self.rank == 0:
            self.folder.commit(step)

    def _mean_over_ranks(self, loss: torch.Tensor) -> float:
        dist.all_reduce(loss)
        return loss.item() / self.ranks


def train(trainer: Trainer, label: str, done: int, save_every: int, validate_every: int) -> None:
    """Train the steps after `done`; show progress, log losses, save checkpoints."""
    steps, rank, folder = trainer.settings["steps"], trainer.rank, trainer.folder
    tokens = trainer.engine.train_batch_size() * trainer.settings["context"]
    durations = []
    bar = tqdm(
        desc=f"{label:5}",
        total=steps,
        initial=done,
        disable=rank != 0,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )
    for step in range(done + 1, steps + 1):
        if os.getppid() != LAUNCHER:
            # Stop, because a new launcher may already use this folder.
            raise SystemExit("train_gpt.py: the launcher is gone; stopped")
        start = time.perf_counter()
        loss = trainer.train_step(step)
        durations.append(time.perf_counter() - start)
        typical = statistics.median(durations[-20:])
        bar.set_postfix_str(f"loss {loss:.3f}, {tokens / typical:,.0f} tokens/s, {1000 * typical:.0f} ms/step", False)
        bar.update()
        record = {"step": step, "loss": loss}
        if step % validate_every == 0 or step == steps:
            record["validation_loss"] = trainer.validate()
        if rank == 0:
            folder.append(record)
        if step % save_every == 0 or step == steps:
            trainer.save(step)
    bar.close()
    if rank == 0 and durations:
        typical = statistics.median(durations)
        folder.write_result({"milliseconds_per_step": 1000 * typical, "tokens_per_second": tokens / typical})


def announce(trainer: Trainer, label: str, done: int) -> None:
    """Print the optimizer, the sizes and the start step."""
    optimizer_class, steps = type(trainer.engine.basic_optimizer), trainer.settings["steps"]
    print(
        f"{label}: {optimizer_class.__module__}.{optimizer_class.__qualname__} "
        f"inside {type(trainer.engine.optimizer).__name__}, {trainer.ranks} processes, "
        f"{trainer.weights:,} weights, {len(trainer.data.train):,} bytes of training text"
    )
    if done == 0:
        where = f"starting at step 1 of {steps} in {trainer.folder.path}"
    elif done < steps:
        where = f"resuming after step {done} of {steps} in {trainer.folder.path}; --fresh starts over"
    else:
        where = f"all {steps} steps are done in {trainer.folder.path}; --fresh starts over"
    print(f"{label}: {where}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Train one run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.add_argument("--lr", type=float, help="replaces the learning rate of the config")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/<optimizer>)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    args = parser.parse_args(argv)
    if "WORLD_SIZE" not in os.environ:
        parser.error("no launcher found; start this script with torchrun, deepspeed or demo.py, see --help")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback per process on Ctrl-C; the launcher reports it
    try:
        plan = make_plan(args, int(os.environ["WORLD_SIZE"]))
    except ValueError as error:
        parser.error(str(error))
    trainer = Trainer(plan, import_deepspeed())
    done = trainer.resume(args.fresh)
    label = plan.config["optimizer"]["type"]
    if trainer.rank == 0:
        announce(trainer, label, done)
    train(trainer, label, done, args.save_every, args.validate_every)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # DeepSpeed holds on to the process groups, so gloo's threads outlive destroy_process_group. On a busy machine they
    # sometimes abort a finished rank while Python shuts down ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
