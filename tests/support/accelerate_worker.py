"""Train with Accelerate; compare with torch's AdamW and with plain PyTorch.

Usage, once per rank: RANK=... LOCAL_RANK=... WORLD_SIZE=2 python accelerate_worker.py CASES.json STORE FOLDER

CASES.json is a list of dictionaries (see `CASE_DEFAULTS`). Rank r writes {case name: result} to r.json next to it.
Oracles: the same run with torch.optim.AdamW; for AdaXW a loop that calls neither Accelerate nor DDP nor FSDP.
"""

import json
import os
import sys
import traceback
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

import adax_triton

STEPS, RESUME_AT, MICRO_BATCH, INITIAL_SCALE = 6, 4, 4, 2.0**8
PARAMS = {"lr": 1e-2, "weight_decay": 0.1}
CASE_DEFAULTS: dict[str, Any] = {
    "run": "train",  # or the name of another function in `RUNS`
    "sharding": "ddp",  # or "fsdp1", "fsdp2"
    "plugin": {},  # settings of the FSDP plugin
    "precision": "no",
    "scaled": False,  # train with a GradScaler
    "overflow_at": None,  # step with infinite inputs
    "clip": None,
    "clip_value": None,
    "accumulate": 1,
    "split_batches": False,
    "frozen": False,  # freeze a parameter, and pass it to the optimizer
    "options": {},  # of AdaXW
    "keep_first": False,  # keep_float32 of the first weight
}


class Net(nn.Module):
    """Two layers and a norm; the first weight can have quantized states."""

    def __init__(self, seed: int = 0, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.last = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8, bias=False)
        self.norm.weight.requires_grad_(not frozen)

    def forward(self, batch: Tensor) -> Tensor:
        return self.last(self.norm(self.first(batch).relu())).square().mean()


def make_schedule(optimizer: torch.optim.Optimizer) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=PARAMS["lr"], total_steps=4 * STEPS)


def make_loader() -> DataLoader[Tensor]:
    data: Any = torch.randn(128, 64, generator=torch.Generator().manual_seed(1))
    return DataLoader(data, batch_size=MICRO_BATCH)


def adaxw(case: dict[str, Any], model: Net) -> adax_triton.AdaXW:
    # Accelerate replaces the parameters later, so the function must read the model when it is called.
    keep = (lambda param: param is model.first.weight) if case["keep_first"] else None
    return adax_triton.AdaXW(model.parameters(), **PARAMS, keep_float32=keep, **case["options"])


def adamw_of(module: Any) -> Callable[[dict[str, Any], Net], torch.optim.Optimizer]:
    return lambda case, model: module.AdamW(model.parameters(), **PARAMS)


class Run:
    """One training with Accelerate.

    Args:
        case: see `CASE_DEFAULTS`.
        make: function of case and model that returns the optimizer.
        seed: seed of the weights.
    """

    def __init__(self, case: dict[str, Any], make: Callable[[dict[str, Any], Net], Any], seed: int = 0) -> None:
        self.case, self.step = case, 0
        self.accelerator = accelerator = new_accelerator(case)
        model = Net(seed, case["frozen"])
        optimizer = make(case, model)
        self.model, self.optimizer, self.loader, self.schedule = accelerator.prepare(
            model, optimizer, make_loader(), make_schedule(optimizer)
        )
        self.batches: list[Tensor] = []
        self.norms: list[float] = []
        self.events: list[tuple[bool, float]] = []  # whether a step was skipped, and the learning rate

    def train(self, until: int = STEPS) -> "Run":
        loader = self.accelerator.skip_first_batches(self.loader, self.step)
        for _, batch in zip(range(self.step, until), loader, strict=False):
            scale = float("inf") if self.step == self.case["overflow_at"] else 1.0
            self.batches.append(batch * scale)
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(self.batches[-1]))
                self.clip()
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            lr = self.optimizer.param_groups[0]["lr"]
            self.events.append((self.accelerator.optimizer_step_was_skipped, lr))
            self.step += 1
        return self

    def clip(self) -> None:
        if self.accelerator.sync_gradients and self.case["clip"]:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.case["clip"])
            self.norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        if self.accelerator.sync_gradients and self.case["clip_value"]:
            self.accelerator.clip_grad_value_(self.model.parameters(), self.case["clip_value"])

    def weights(self) -> dict[str, Tensor]:
        """Return the whole weights, on all ranks."""
        if self.case["sharding"] == "fsdp1":
            with FullyShardedDataParallel.summon_full_params(self.model, writeback=False):
                return named_weights(self.model)
        return named_weights(self.accelerator.unwrap_model(self.model))


def new_accelerator(case: dict[str, Any]) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._prepare_backend = original_backend
    plugin = None
    if case["sharding"] != "ddp":
        # Accelerate shards models only on GPUs. Without this check its logic is the same on CPUs.
        PartialState._prepare_backend = lambda self, cpu, sagemaker_dp, backend: ("gloo", DistributedType.MULTI_GPU)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=int(case["sharding"][-1]), **case["plugin"])
    accelerator = Accelerator(
        cpu=plugin is None,
        mixed_precision=case["precision"],
        gradient_accumulation_steps=case["accumulate"],
        dataloader_config=DataLoaderConfiguration(split_batches=case["split_batches"]),
        fsdp_plugin=plugin,
    )
    if case["scaled"]:
        # Accelerate creates a scaler and enables float16 only on GPUs.
        accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=INITIAL_SCALE), True
    return accelerator


original_backend = PartialState._prepare_backend


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        for name, param in model.named_parameters()
    }


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    # Unlike max(), the maximum of a tensor is NaN if a value is.
    return float(torch.stack([(found[name] - expected[name]).abs().max() for name in expected]).max())


def train_plainly(
    case: dict[str, Any], batches_of_ranks: list[list[Tensor]], measured: list[float]
) -> tuple[dict[str, Tensor], list[float]]:
    """Train in one process on the batches of all ranks.

    Args:
        case: see `CASE_DEFAULTS`.
        batches_of_ranks: one list per rank.
        measured: norms of the run. The gradients are clipped by these, because a norm of shards sums in another order.

    Returns:
        The weights, and the norms of the whole gradients.
    """
    norms: list[float] = []
    model = Net(frozen=case["frozen"])
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = adaxw(case, model)
    schedule, world_size = make_schedule(optimizer), len(batches_of_ranks)
    scaler = torch.amp.GradScaler("cpu", init_scale=INITIAL_SCALE, enabled=case["scaled"])
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case["precision"])
    sums = [[torch.zeros_like(param) for param in params] for _ in batches_of_ranks]
    for step, batches in enumerate(zip(*batches_of_ranks, strict=True)):
        for rank_sums, batch in zip(sums, batches, strict=True):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = model(batch).float()
            gradients = torch.autograd.grad(scaler.scale(loss / case["accumulate"]), params)
            for total, gradient in zip(rank_sums, gradients, strict=True):
                total += gradient
        if (step + 1) % case["accumulate"]:
            continue
        for param, *parts in zip(params, *sums, strict=True):
            param.grad = sum(parts) / world_size
        scaler.unscale_(optimizer)
        if case["clip"]:
            norm = torch.tensor(measured[len(norms)])
            norms.append(float(nn.utils.get_total_norm([param.grad for param in params])))
            nn.utils.clip_grads_with_norm_(params, case["clip"], norm)
        if case["clip_value"]:
            nn.utils.clip_grad_value_(params, case["clip_value"])
        scaler.step(optimizer)
        scaler.update()
        for _ in range(1 if case["split_batches"] else world_size):
            if step != case["overflow_at"]:
                schedule.step()
        sums = [[torch.zeros_like(param) for param in params] for _ in batches_of_ranks]
    return named_weights(model), norms


# The runs.


def train(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compare with torch's AdamW, with plain PyTorch and with a resumed run."""
    expected, ours = Run(case, adamw_of(torch.optim)).train(), Run(case, adamw_of(adax_triton)).train()
    whole = Run(case, adaxw).train()
    weights = whole.weights()
    plain_weights, plain_norms = train_plainly(case, gathered(whole.batches), whole.norms)
    result = {
        "deviation": deviation(ours.weights(), expected.weights()),
        "norm_deviation": max((abs(a - b) for a, b in zip(ours.norms, expected.norms, strict=True)), default=0.0),
        "same_events": ours.events == expected.events,
        "skipped": [step for step, (skipped, _) in enumerate(whole.events) if skipped],
        "plain_deviation": deviation(weights, plain_weights),
        "norms": whole.norms,
        "plain_norms": plain_norms,
        "moved": deviation(weights, named_weights(Net(frozen=case["frozen"]))),
    }
    if case["sharding"] == "fsdp1":
        makes = {"adaxw": adaxw, "adamw": adamw_of(torch.optim)}
        return {**result, "restored": [restored_states(case, make, folder / name) for name, make in makes.items()]}
    return {**result, **resumed(case, folder, weights)}


def restored_states(case: dict[str, Any], make: Callable[..., Any], folder: Path) -> int:
    """Save and load; return the number of loaded states."""
    accelerator = Run(case, make).train(RESUME_AT).accelerator
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    run = Run(case, make, seed=1)
    run.accelerator.load_state(str(folder))
    return len(run.optimizer.state)


def resumed(case: dict[str, Any], folder: Path, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Save, load with another seed, and compare with the uninterrupted run."""
    accelerator = Run(case, adaxw).train(RESUME_AT).accelerator
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    run = Run(case, adaxw, seed=1)
    run.accelerator.load_state(str(folder))
    run.step = RESUME_AT
    states = run.train().optimizer.state
    model = run.accelerator.unwrap_model(run.model)
    exp_avg = states[model.first.weight]["exp_avg"]
    return {
        "resume_deviation": deviation(run.weights(), weights),
        "exp_avg": f"{type(exp_avg).__name__} {exp_avg.dtype}",
        "frozen_state": model.norm.weight in states,
    }


def gathered(value: Any) -> list[Any]:
    """Return the value of each rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def two_models(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train two models with one scaler; the second skips a step."""
    whole, skipped = train_two_models(case, adaxw, STEPS)
    train_two_models(case, adaxw, RESUME_AT, save_to=str(folder))
    again, _ = train_two_models(case, adaxw, STEPS, load_from=str(folder))
    ours, _ = train_two_models(case, adamw_of(adax_triton), STEPS)
    expected, _ = train_two_models(case, adamw_of(torch.optim), STEPS)
    return {
        "deviation": max(map(deviation, ours, expected)),
        "skipped": skipped,
        "resume_deviation": max(map(deviation, again, whole)),
    }


def train_two_models(
    case: dict[str, Any], make: Callable[..., Any], stop: int, save_to: str = "", load_from: str = ""
) -> tuple[list[dict[str, Tensor]], list[tuple[int, int]]]:
    """Return the weights of both models, and the skipped (step, model)."""
    accelerator = new_accelerator(case)
    models = [Net(seed) for seed in ((2, 3) if load_from else (0, 1))]
    optimizers = [make(case, model) for model in models]
    prepared = accelerator.prepare(*models, *optimizers, *map(make_schedule, optimizers), make_loader())
    start, skipped = 0, []
    if load_from:
        accelerator.load_state(load_from)
        start = RESUME_AT
    batches = accelerator.skip_first_batches(prepared[-1], start)
    for step, batch in zip(range(start, stop), batches, strict=False):
        for index in range(2):
            model, optimizer, schedule = prepared[index:-1:2]
            scale = float("inf") if (step, index) == (1, 1) else 1.0
            accelerator.backward(model(batch * scale))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if optimizer.step_was_skipped:
                skipped.append((step, index))
    if save_to:
        accelerator.save_state(save_to)
        accelerator.wait_for_everyone()
    return [named_weights(accelerator.unwrap_model(model)) for model in prepared[:2]], skipped


def fused_overflow(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Overflow a step of fused optimizers."""
    result: dict[str, Any] = {}
    for module in (torch.optim, adax_triton):
        run = Run(case, lambda case, model, module=module: module.AdamW(model.parameters(), **PARAMS, fused=True))
        skipped, rates = zip(*run.train().events, strict=True)
        counts = {int(state["step"]) for state in run.optimizer.state.values()}
        result[module.__name__] = {"seen": any(skipped), "counts": sorted(counts), "rates": rates}
    return result


def local_sgd(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Average the weights of the ranks after each second step."""

    def weights(make: Callable[..., Any]) -> dict[str, Tensor]:
        run = Run(case, make)
        with LocalSGD(run.accelerator, run.model, local_sgd_steps=2) as averaging:
            for _, batch in zip(range(STEPS), run.loader, strict=False):
                run.accelerator.backward(run.model(batch))
                run.optimizer.step()
                run.optimizer.zero_grad()
                averaging.step()
        return run.weights()

    ours = weights(adamw_of(adax_triton))
    return {
        "deviation": deviation(ours, weights(adamw_of(torch.optim))),
        "between_ranks": max(deviation(other, ours) for other in gathered(ours)),
    }


def keeps_states(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Prepare an optimizer with states, register it for checkpoints, free it."""
    accelerator = new_accelerator(case)
    model = Net()
    optimizer = adaxw(case, model)
    model(torch.ones(2, 64)).backward()
    optimizer.step()
    before = copy_of_states(optimizer)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    kept = before == copy_of_states(optimizer)
    accelerator.register_for_checkpointing(other := adaxw(case, Net(1)))
    for owned, parameters in ((other, other.param_groups[0]["params"]), (wrapped, model.parameters())):
        for param in parameters:
            param.grad = torch.ones_like(param)
        owned.step()
    saved = copy_of_states(optimizer), copy_of_states(other)
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    wrapped.step(), other.step()
    accelerator.load_state(str(folder))
    restored = saved == (copy_of_states(optimizer), copy_of_states(other))
    dead = weakref.ref(optimizer)
    del optimizer, model, owned, parameters, param
    prepared, wrapped = accelerator.free_memory(prepared, wrapped)
    return {"kept": kept, "restored": restored, "freed": dead() is None}


def copy_of_states(optimizer: adax_triton.AdaXW) -> str:
    """Return the bits of an optimizer's states as text."""
    return str(
        [
            [value.tolist() if isinstance(value, Tensor) else value for value in state.values()]
            for state in optimizer.state.values()
        ]
    )


RUNS: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    function.__name__: function for function in (train, two_models, fused_overflow, local_sgd, keeps_states)
}


def main(cases_path: str, store: str, folder: str) -> None:
    """Run the cases, and write this rank's results after each."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=60), world_size, rank)
    results: dict[str, Any] = {}
    for given in json.loads(Path(cases_path).read_text()):
        case = {**CASE_DEFAULTS, **given}
        try:
            results[case["name"]] = RUNS[case["run"]](case, Path(folder) / case["name"])
        except Exception:
            results[case["name"]] = {"failure": traceback.format_exc()}
        Path(cases_path).with_name(f"{rank}.json").write_text(json.dumps(results))
        if "failure" in results[case["name"]]:
            sys.exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
