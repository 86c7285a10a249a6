"""Train with Lightning on one rank, and the same in plain PyTorch.

python lightning_worker.py cases.json results.json

A case has some of the keys of `DEFAULTS`. Its result has the largest differences of the final weights:

    effect: against the first case
    plain: AdaXW in Lightning against AdaXW in a plain loop
    adamw: AdamW of adax_triton against torch's AdamW, both in Lightning
    resumed: against the run continued from the checkpoint of its first epoch; includes the optimizers' states
    converted: torch's AdamW for an epoch, then AdaXW from the converted checkpoint; against a plain loop

or the error, if "error" is True. "monitored" has the values of LearningRateMonitor for AdaXW and torch's AdamW.
"""

import functools
import json
import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.precision import MixedPrecision as FabricPrecision
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.data import DataLoader

from adax_triton import AdamW, AdaXW, adax_from_adam, from_torch_adam
from adax_triton.cli.main import main as adax_triton_command

DEFAULTS = {
    "precision": "32-true",  # "16-mixed" uses a GradScaler
    "clip": None,  # None, "norm", "value" or "optimizer" (max_grad_norm)
    "accumulate": 1,  # batches per step, or {epoch: batches}
    "returns": "optimizer",  # what configure_optimizers returns; see `configured`
    "manual": None,  # None, "closure", "toggle" or "gan"
    "callback": None,  # None, "ema", "swa" or "monitor"
    "fabric": False,
    "options": {},  # of AdaXW
    "compare": ["plain", "adamw"],  # of the results above
}
EPOCHS, BATCHES, MAX_NORM, MAX_VALUE = 2, 4, 0.5, 0.002
INIT_SCALE = 2.0**20  # large: the first steps overflow and are skipped
DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
Make = Callable[..., Optimizer]


def batches() -> list[Tensor]:
    # Gradients of different norms: the updates of AdaX do not depend on a constant factor.
    scales = torch.tensor([1.0, 8.0, 0.5, 4.0]).reshape(BATCHES, 1, 1)
    return list(scales * torch.randn(BATCHES, 8, 64, generator=torch.Generator().manual_seed(1)))


class Net(nn.Module):
    """Returns the loss of a batch; large enough for 8-bit states."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
        self.discriminator = nn.Linear(64, 8)

    def forward(self, batch: Tensor) -> Tensor:
        return self.discriminator(self.generator(batch)).square().mean()


def optimizers(net: Net, case: dict[str, Any], make: Make) -> list[Optimizer]:
    options = dict(case["options"]) if make is AdaXW else {}
    if case["clip"] == "optimizer":
        options["max_grad_norm"] = MAX_NORM
    parts = [net.generator, net.discriminator] if case["manual"] == "gan" else [net]
    return [make(part.parameters(), lr=3e-3, weight_decay=0.1, **options) for part in parts]


def schedule(returns: str, optimizer: Optimizer) -> tuple[Any, str, int]:
    """Return the scheduler, its interval and its frequency."""
    if returns == "plateau":
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=10.0), "epoch", 1
    if returns == "one-cycle":
        return lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=EPOCHS * BATCHES + 1), "step", 1
    if returns == "warm-up":
        ramp, decay = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, 5)
        return lr_scheduler.SequentialLR(optimizer, [ramp, decay], milestones=[3]), "step", 1
    interval, frequency = {"pair-per-step": ("step", 1), "dict-per-step": ("step", 2)}.get(returns, ("epoch", 1))
    return lr_scheduler.ExponentialLR(optimizer, 0.7), interval, frequency


def configured(returns: str, found: list[Optimizer]) -> Any:
    """Return each form that `configure_optimizers` may return."""
    if returns == "optimizer":
        return found[0] if len(found) == 1 else found
    if returns == "list":
        return found
    scheduler, interval, frequency = schedule(returns, found[0])
    forms = {
        "pair": (found, [scheduler]),
        "pair-per-step": (found, [{"scheduler": scheduler, "interval": "step"}]),
        "dict": {"optimizer": found[0], "lr_scheduler": scheduler},
        "dicts": ({"optimizer": found[0], "lr_scheduler": scheduler},),
        "plateau": {"optimizer": found[0], "lr_scheduler": scheduler, "monitor": "loss"},
    }
    setting = {"scheduler": scheduler, "interval": interval, "frequency": frequency}
    return forms.get(returns, {"optimizer": found[0], "lr_scheduler": setting})


class Module(lightning.LightningModule):
    def __init__(self, case: dict[str, Any], make: Make) -> None:
        super().__init__()
        self.net, self.case, self.make = Net(), case, make
        self.automatic_optimization = case["manual"] is None

    def configure_optimizers(self) -> Any:
        return configured(self.case["returns"], optimizers(self.net, self.case, self.make))

    def training_step(self, batch: Tensor) -> Tensor | None:
        if self.automatic_optimization:
            loss = self.net(batch)
            self.log("loss", loss, on_step=False, on_epoch=True)
            return loss
        found = self.optimizers()
        for optimizer in found if isinstance(found, list) else [found]:
            if self.case["manual"] == "closure":
                optimizer.step(closure=functools.partial(self.backward_and_clip, optimizer, batch))
                continue
            self.toggle_optimizer(optimizer)
            self.backward_and_clip(optimizer, batch)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        if self.lr_schedulers() is not None:
            self.lr_schedulers().step()
        return None

    def backward_and_clip(self, optimizer: Any, batch: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(self.net(batch))
        self.clip_gradients(optimizer, gradient_clip_val=MAX_NORM, gradient_clip_algorithm="norm")


def fit(case: dict[str, Any], make: Make, folder: Path, checkpoint: str | None = None) -> lightning.Trainer:
    """Train; save a checkpoint after each epoch."""
    arguments: dict[str, Any] = {"precision": case["precision"]}
    if case["precision"] == "16-mixed":
        arguments = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", INIT_SCALE))]}
    if case["clip"] in ("norm", "value"):
        arguments["gradient_clip_val"] = MAX_NORM if case["clip"] == "norm" else MAX_VALUE
        arguments["gradient_clip_algorithm"] = case["clip"]
    used: list[Any] = [lightning_callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1)]
    if isinstance(case["accumulate"], dict):
        scheduling = {int(epoch): number for epoch, number in case["accumulate"].items()}
        used.append(lightning_callbacks.GradientAccumulationScheduler(scheduling))
    else:
        arguments["accumulate_grad_batches"] = case["accumulate"]
    if case["callback"] == "ema":
        used.append(lightning_callbacks.EMAWeightAveraging(decay=0.5))
    if case["callback"] == "swa":
        used.append(lightning_callbacks.StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=2))
    if case["callback"] == "monitor":
        used.append(lightning_callbacks.LearningRateMonitor("step", log_momentum=True, log_weight_decay=True))
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=1,
        callbacks=used,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=CSVLogger(folder) if case["callback"] == "monitor" else False,
        **arguments,
    )
    dtype = torch.bfloat16 if case["precision"] == "bf16-true" else torch.float32
    data = DataLoader([batch.to(dtype) for batch in batches()], batch_size=None)
    ckpt_path = None if checkpoint is None else folder / checkpoint
    trainer.fit(Module(case, make), data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def fit_with_fabric(case: dict[str, Any], make: Make) -> dict[str, Tensor]:
    arguments: dict[str, Any] = {"precision": case["precision"]}
    if case["precision"] == "16-mixed":
        arguments = {"plugins": [FabricPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", INIT_SCALE))]}
    fabric = lightning.Fabric(accelerator="cpu", devices=1, **arguments)
    plain = Net()
    net, optimizer = fabric.setup(plain, *optimizers(plain, case, make))
    for _ in range(EPOCHS):
        for index, batch in enumerate(batches(), 1):
            last = index % case["accumulate"] == 0
            with fabric.no_backward_sync(net, enabled=not last):
                fabric.backward(net(batch) / case["accumulate"])
            if last:
                if case["clip"] == "norm":
                    fabric.clip_gradients(net, optimizer, max_norm=MAX_NORM, error_if_nonfinite=False)
                if case["clip"] == "value":
                    fabric.clip_gradients(net, optimizer, clip_val=MAX_VALUE)
                optimizer.step()
                optimizer.zero_grad()
    return net.state_dict()


def weights_of(trainer: lightning.Trainer) -> dict[str, Tensor]:
    return trainer.lightning_module.net.state_dict()


def plain_loop(case: dict[str, Any], start: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """Train AdaXW without Lightning; `start` is a checkpoint of torch's AdamW."""
    dtype = torch.bfloat16 if case["precision"] == "bf16-true" else torch.float32
    net = Net().to(dtype)
    found = optimizers(net, case, AdaXW)
    if start is not None:
        net.load_state_dict({name.removeprefix("net."): value for name, value in start["state_dict"].items()})
        for optimizer, saved in zip(found, start["optimizer_states"], strict=True):
            optimizer.load_state_dict(adax_from_adam(from_torch_adam(saved)))
    has_schedule = case["returns"] not in ("optimizer", "list")
    scheduler, interval, frequency = schedule(case["returns"], found[0]) if has_schedule else (None, "", 1)
    scaler = torch.amp.GradScaler("cpu", INIT_SCALE, enabled=case["precision"] == "16-mixed")
    average = AveragedModel(net, avg_fn=get_ema_avg_fn(0.5))
    for epoch in range(0 if start is None else 1, EPOCHS):
        losses, size = [], accumulated(case["accumulate"], epoch)
        for index, batch in enumerate(batches(), 1):
            if case["manual"] is not None:
                manual_steps(net, found, batch)
            else:
                loss = loss_of(net, case["precision"], batch.to(dtype))
                losses.append(loss.detach())
                scaler.scale(loss / size).backward()
                if index % size != 0 and index != BATCHES:
                    continue
                step(net, case, found[0], scaler)
                average.update_parameters(net)
            if interval == "step" and index % frequency == 0:
                scheduler.step()
        if interval == "epoch":
            scheduler.step(*[torch.stack(losses).mean()] if case["returns"] == "plateau" else [])
    return average.module.state_dict() if case["callback"] == "ema" else net.state_dict()


def accumulated(setting: Any, epoch: int) -> int:
    if isinstance(setting, dict):
        return next(number for start, number in reversed(setting.items()) if int(start) <= epoch)
    return setting


def loss_of(net: Net, precision: str, batch: Tensor) -> Tensor:
    with torch.autocast("cpu", DTYPES[precision], cache_enabled=False) if precision in DTYPES else nullcontext():
        return net(batch)


def step(net: Net, case: dict[str, Any], optimizer: Optimizer, scaler: torch.amp.GradScaler) -> None:
    if not case["options"].get("fused"):
        scaler.unscale_(optimizer)
    if case["clip"] == "norm":
        nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM)
    if case["clip"] == "value":
        nn.utils.clip_grad_value_(net.parameters(), MAX_VALUE)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def manual_steps(net: Net, found: list[Optimizer], batch: Tensor) -> None:
    for optimizer in found:
        params = optimizer.param_groups[0]["params"]
        net.requires_grad_(False)
        for param in params:
            param.requires_grad_(True)
        optimizer.zero_grad()
        net(batch).backward()
        nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
    net.requires_grad_(True)


def difference(found: Any, expected: Any) -> float:
    """Return the largest difference of two trees; infinite if not of tensors."""
    if isinstance(expected, Tensor):
        change = (found.double() - expected.double()).abs().nan_to_num(math.inf)
        return change.max().item() if expected.numel() else 0.0
    if isinstance(expected, dict):
        pairs = [(found[key], expected[key]) for key in expected] if found.keys() == expected.keys() else [(0, 1)]
    elif isinstance(expected, (list, tuple)):
        pairs = list(zip(found, expected, strict=True))
    else:
        return 0.0 if found == expected else float("inf")
    return max([difference(*pair) for pair in pairs], default=0.0)


def continued_after_conversion(case: dict[str, Any], folder: Path) -> float:
    fit(case, torch.optim.AdamW, folder)
    files = [str(folder / name) for name in ("epoch=0.ckpt", "adaxw.ckpt")]
    assert adax_triton_command(["convert", *files, "--key", "optimizer_states", "--to", "adaxw"]) == 0
    found = weights_of(fit(case, AdaXW, folder, "adaxw.ckpt"))
    return difference(found, plain_loop(case, start=torch.load(files[0], weights_only=True)))


def monitored(trainer: lightning.Trainer) -> list[Any]:
    (monitor,) = [used for used in trainer.callbacks if isinstance(used, lightning_callbacks.LearningRateMonitor)]
    return [monitor.lrs, monitor.last_momentum_values, monitor.last_weight_decay_values]


def run(
    case: dict[str, Any], first: dict[str, Tensor] | None, folder: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if case["fabric"]:
        return run_with_fabric(case, first)
    trainer = fit(case, AdaXW, folder / "adaxw")
    weights = weights_of(trainer)
    result: dict[str, Any] = {"effect": difference(weights, first or weights)}
    if "plain" in case["compare"]:
        result["plain"] = difference(weights, plain_loop(case))
    if "resumed" in case["compare"]:
        again = fit(case, AdaXW, folder / "adaxw", "epoch=0.ckpt")
        states = [[optimizer.state_dict() for optimizer in one.optimizers] for one in (again, trainer)]
        result["resumed"] = difference([weights_of(again), states[0]], [weights, states[1]])
    if "adamw" in case["compare"]:
        ours, theirs = (fit(case, make, folder / make.__module__) for make in (AdamW, torch.optim.AdamW))
        result["adamw"] = difference(weights_of(ours), weights_of(theirs))
        if case["callback"] == "monitor":
            result["monitored"] = [monitored(trainer), monitored(theirs)]
    if "converted" in case["compare"]:
        result["converted"] = continued_after_conversion(case, folder / "converted")
    return result, weights


def run_with_fabric(case: dict[str, Any], first: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    weights, ours, theirs = (fit_with_fabric(case, make) for make in (AdaXW, AdamW, torch.optim.AdamW))
    plain, adamw = difference(weights, plain_loop(case)), difference(ours, theirs)
    return {"effect": difference(weights, first), "plain": plain, "adamw": adamw}, weights


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    results: list[Any] = []
    first = None
    for given in json.loads(Path(sys.argv[1]).read_text()):
        case = {**DEFAULTS, **given}
        with tempfile.TemporaryDirectory() as folder:
            try:
                result, weights = run(case, first, Path(folder))
            except RuntimeError as error:
                results.append(str(error))
                continue
        first = first or weights
        results.append(result)
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
