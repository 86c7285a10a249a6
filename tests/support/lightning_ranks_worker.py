"""Train with Lightning on two ranks, and the same in plain PyTorch.

Usage, once per rank: RANK=... LOCAL_RANK=... python lightning_ranks_worker.py cases.json results.json

A case has some of the keys of `DEFAULTS`. Its result has the largest differences of the final weights:

    plain: AdaXW against AdaXW in a plain loop on one rank
    adamw: torch's AdamW against AdamW of adax_triton in the plain loop
    resumed: against the run continued from the checkpoint of its first epoch
    converted: torch's AdamW for an epoch, then AdaXW from the converted checkpoint; against a plain loop

or the error message.
"""

import copy
import json
import logging
import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import adax_triton.integrations.deepspeed  # noqa: F401
import deepspeed
import lightning
import torch
import torch.distributed as dist
from lightning.fabric import accelerators as fabric_accelerators
from lightning.fabric import strategies as fabric_strategies
from lightning.pytorch import accelerators, strategies
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_worker import MAX_NORM, Net, difference
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

from adax_triton import AdamW, AdaXW, adax_from_adam, from_torch_adam
from adax_triton.cli.main import main as adax_triton_command

DEFAULTS = {
    "fabric": False,
    "strategy": "ddp",  # or "fsdp2" with a folder per checkpoint, "fsdp2-file", "deepspeed"
    "precision": "32-true",
    "clip": False,
    "schedule": False,  # a schedule per step; Trainer only
    "options": {},  # of AdaXW
    "settings": {},  # arguments of DeepSpeedStrategy
    "by_name": False,  # name the optimizer in DeepSpeed's configuration
    "compare": ["plain"],
}
WORLD_SIZE, EPOCHS, STEPS = 2, 2, 3
RANK = int(os.environ["RANK"])
ARGUMENTS = {"lr": 3e-3, "weight_decay": 0.1}
Case = dict[str, Any]


class OnCpu:
    """Makes Lightning run strategies for CUDA on a CPU."""

    def setup(self, *_: Any) -> None: ...

    def setup_device(self, *_: Any) -> None: ...

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: int) -> list[int]:
        return list(range(devices))

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("cpu", index) for index in devices]

    @staticmethod
    def is_available() -> bool:
        return True


class TrainerOnCpu(OnCpu, accelerators.CUDAAccelerator): ...


class FabricOnCpu(OnCpu, fabric_accelerators.CUDAAccelerator): ...


def batches(rank: int) -> list[Tensor]:
    scales = torch.tensor([1.0, 8.0, 0.5]).reshape(STEPS, 1, 1)
    return list(scales * torch.randn(STEPS, 8, 64, generator=torch.Generator().manual_seed(1 + rank)))


def optimizer_of(net: nn.Module, case: Case, make: Any) -> Optimizer:
    return make(net.parameters(), **ARGUMENTS, **(case["options"] if make is AdaXW else {}))


def schedule(optimizer: Optimizer) -> ExponentialLR:
    return ExponentialLR(optimizer, 0.7)


class Module(lightning.LightningModule):
    def __init__(self, case: Case, make: Any) -> None:
        super().__init__()
        self.net, self.case, self.make = Net(), case, make

    def configure_model(self) -> None:
        if self.case["strategy"].startswith("fsdp2"):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        if self.case["by_name"]:
            return None
        optimizer = optimizer_of(self, self.case, self.make)
        if not self.case["schedule"]:
            return optimizer
        return [optimizer], [{"scheduler": schedule(optimizer), "interval": "step"}]

    def training_step(self, batch: Tensor) -> Tensor:
        return self.net(batch)


def strategy_of(case: Case, make: Any) -> Any:
    owner = fabric_strategies if case["fabric"] else strategies
    if case["strategy"] == "deepspeed":
        settings = copy.deepcopy(case["settings"])
        if case["by_name"]:
            params = {**ARGUMENTS, **(case["options"] if make is AdaXW else {})}
            settings["config"]["optimizer"] = {"type": make.__name__, "params": params}
        return owner.DeepSpeedStrategy(**settings)
    if case["strategy"] == "ddp":
        return "ddp"
    if case["fabric"]:
        return owner.ModelParallelStrategy(
            lambda net, mesh: fully_shard(net, mesh=mesh["data_parallel"]), WORLD_SIZE, 1
        )
    in_folder = case["strategy"] == "fsdp2"
    return owner.ModelParallelStrategy(WORLD_SIZE, 1, save_distributed_checkpoint=in_folder)


def full_weights(net: nn.Module) -> list[Tensor]:
    found = []
    for param in net.parameters():
        with deepspeed.zero.GatheredParameters([param]) if hasattr(param, "ds_id") else nullcontext():
            found.append(param.full_tensor() if isinstance(param, DTensor) else param.detach().clone())
    return found


def fit(case: Case, make: Any, folder: Path, checkpoint: str | None = None) -> list[Tensor]:
    module = Module(case, make)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator=TrainerOnCpu() if case["strategy"] == "deepspeed" else "cpu",
        devices=WORLD_SIZE,
        strategy=strategy_of(case, make),
        precision=case["precision"],
        gradient_clip_val=MAX_NORM if case["clip"] else None,
        callbacks=[ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1)],
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    data = DataLoader(batches(RANK), batch_size=None)
    trainer.fit(module, data, ckpt_path=None if checkpoint is None else folder / checkpoint)
    return full_weights(module)


def fit_with_fabric(case: Case, make: Any, folder: Path, checkpoint: str | None = None) -> list[Tensor]:
    with_deepspeed = case["strategy"] == "deepspeed"
    fabric = lightning.Fabric(
        accelerator=FabricOnCpu() if with_deepspeed else "cpu",
        devices=WORLD_SIZE,
        strategy=strategy_of(case, make),
        precision=case["precision"],
    )
    fabric.launch()
    if case["strategy"] == "fsdp2":
        net = fabric.setup(Net())
        optimizer = fabric.setup_optimizers(optimizer_of(net, case, make))
    else:
        net = Net()
        net, optimizer = fabric.setup(net, optimizer_of(net, case, make))
    state = {"net": net, "optimizer": optimizer, "epochs": 0}
    if checkpoint is not None:
        fabric.load(folder / checkpoint, state)
    for epoch in range(state["epochs"], EPOCHS):
        for batch in batches(RANK):
            fabric.backward(net(batch))
            if case["clip"] and not with_deepspeed:
                fabric.clip_gradients(net, optimizer, max_norm=MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
        state["epochs"] = epoch + 1
        fabric.save(folder / f"epoch={epoch}.ckpt", state)
    return full_weights(net)


def plain_loop(case: Case, make: Any, converted: bool = False) -> list[Tensor]:
    """Train one process on the batches of both ranks.

    `converted` continues torch's AdamW with AdaXW.
    """
    net = Net()
    optimizer = optimizer_of(net, case, torch.optim.AdamW if converted else make)
    scheduler = schedule(optimizer) if case["schedule"] else None
    for epoch in range(EPOCHS):
        if converted and epoch == 1:
            saved = adax_from_adam(from_torch_adam(optimizer.state_dict()))
            optimizer = optimizer_of(net, case, AdaXW)
            optimizer.load_state_dict(saved)
        for of_ranks in zip(*map(batches, range(WORLD_SIZE)), strict=True):
            for batch in of_ranks:
                with torch.autocast("cpu", torch.bfloat16) if case["precision"] == "bf16-mixed" else nullcontext():
                    loss = net(batch) / WORLD_SIZE
                loss.backward()
            if case["clip"]:
                nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
    return full_weights(net)


def convert(case: Case, source: Path, target: Path) -> None:
    if RANK == 0:
        options = ["--key", "optimizer_states"] if source.is_file() else []
        options += ["--states", case["options"]["states"]] if "states" in case["options"] else []
        assert adax_triton_command(["convert", str(source), str(target), *options, "--to", "adaxw"]) == 0
    dist.barrier()


def run(case: Case, folder: Path) -> dict[str, float] | str:
    train = fit_with_fabric if case["fabric"] else fit
    result = {}
    try:
        if "plain" in case["compare"]:
            weights = train(case, AdaXW, folder)
            result["plain"] = difference(weights, plain_loop(case, AdaXW))
        if "resumed" in case["compare"]:
            result["resumed"] = difference(train(case, AdaXW, folder, "epoch=0.ckpt"), weights)
        if "adamw" in case["compare"] or "converted" in case["compare"]:
            adamw = train(case, torch.optim.AdamW, folder / "adamw")
        if "adamw" in case["compare"]:
            result["adamw"] = difference(adamw, plain_loop(case, AdamW))
        if "converted" in case["compare"]:
            convert(case, folder / "adamw/epoch=0.ckpt", folder / "adamw/adaxw.ckpt")
            weights = train(case, AdaXW, folder / "adamw", "adaxw.ckpt")
            result["converted"] = difference(weights, plain_loop(case, AdaXW, converted=True))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return result


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    cases, results = (Path(name) for name in sys.argv[1:3])
    found = [
        run({**DEFAULTS, **case}, results.parent / f"case{index}")
        for index, case in enumerate(json.loads(cases.read_text()))
    ]
    if RANK == 0:
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
