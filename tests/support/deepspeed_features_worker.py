"""Train with features of DeepSpeed: torch's AdamW, then this package's.

Usage, once per rank: RANK=... WORLD_SIZE=2 python deepspeed_features_worker.py CASES.json RESULTS.json

Both optimizers are given to `deepspeed.initialize` as objects, with the same configuration. The run of this package's
AdamW is saved in the middle and continued by a second engine.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import adax_triton.integrations.deepspeed  # noqa: F401  registers the optimizer types
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed_cases import run_cases, start
from deepspeed_oracle import CASE_DEFAULTS, DTYPES, OPTIMIZERS, VOCABULARY, WORLD_SIZE, TiedModel, batch
from deepspeed_worker import deviation, master_weights, start_engine
from torch import Tensor, nn

from adax_triton import AdamW

OURS, TORCHS = "AdamW", "torch.AdamW"
OPTIMIZERS |= {OURS.lower(): AdamW, TORCHS.lower(): torch.optim.AdamW}
WIDTH = 16
HALF, ALL = range(2), range(4)
DEFAULTS = {
    **CASE_DEFAULTS,
    "client": "instance",
    "model": "tied",
    "do": "compare",
    "save": {},  # arguments of save_checkpoint
    "load": {},  # arguments of load_checkpoint
    "node_local": False,  # each rank is a node with a folder of its own
    "boundary": False,  # the program sets the boundaries of accumulation
}
WEIGHTS_ALONE: dict[str, dict[str, bool]] = {
    "no states": {"load_optimizer_states": False},
    "module": {"load_module_only": True},
    "neither states nor schedule": {"load_optimizer_states": False, "load_lr_scheduler_states": False},
}


class Embedding(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(VOCABULARY, WIDTH)


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Pipeline(PipelineModule):
    """Two stages, tied at the ends."""

    def __init__(self) -> None:
        super().__init__(
            [
                TiedLayerSpec("embed", Embedding),
                *[LayerSpec(Hidden)] * 3,
                TiedLayerSpec("embed", Embedding, forward_fn=lambda embed, x: nn.functional.linear(x, embed.weight)),
            ],
            num_stages=WORLD_SIZE,
            loss_fn=lambda logits, targets: nn.functional.cross_entropy(logits.float(), targets),
            partition_method="uniform",
        )

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters())}]


class Adapters(nn.Module):
    """A frozen model and two trained low-rank matrices, as in LoRA."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)  # a pretrained model, the same in each process
            self.base = TiedModel(WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.base.embed(tokens)
        return nn.functional.cross_entropy(self.base.out(x + self.up(self.down(x))).float(), targets)

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.down.weight, self.up.weight]}]


class Checkpointed(TiedModel):
    """Recomputes activations in the backward pass."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        inner = deepspeed.checkpointing.checkpoint(lambda x: torch.tanh(self.hidden(self.frozen(x))), x)
        return nn.functional.cross_entropy(self.out(x + self.gain * inner).float(), targets)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads))
    model.groups = lambda: [{"params": list(model.parameters())}]
    return model


MODELS: dict[str, Any] = {
    "tied": lambda: TiedModel(WIDTH),
    "pipeline": Pipeline,
    "adapters": Adapters,
    "checkpointed": lambda: Checkpointed(WIDTH),
    "unfrozen": lambda: TiedModel(WIDTH, frozen=False),
    "llama": llama,
}


def build(case: dict[str, Any], seed: int = 0, weights: dict[str, Tensor] | None = None) -> Any:
    torch.manual_seed(seed)
    model = MODELS[case["model"]]()
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    own = os.environ["LOCAL_RANK"]
    os.environ["LOCAL_RANK"] = "0" if case["node_local"] else own
    engine = start_engine(case, model)
    os.environ["LOCAL_RANK"] = own
    return engine


def train(engine: Any, steps: range, case: dict[str, Any]) -> dict[str, Tensor]:
    for step in steps:
        # A program that sets the boundaries may accumulate another number of batches in each step.
        count = 1 + step % 2 if case["boundary"] else engine.gradient_accumulation_steps()
        if case["model"] == "pipeline":
            engine.train_batch(iter([batch(step, micro_step, 0) for micro_step in range(count)]))
            continue
        for micro_step in range(count):
            tokens, targets = batch(step, micro_step, 0 if case["model"] == "llama" else dist.get_rank())
            if case["boundary"]:
                engine.set_gradient_accumulation_boundary(micro_step == count - 1)
            if case["model"] == "llama":
                loss = engine(input_ids=tokens[None], labels=targets[None]).loss
            else:
                loss = engine(tokens, targets)
            engine.backward(loss)
            engine.step()
    return master_weights(engine)


@contextmanager
def shared_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        yield Path(shared[0])
        dist.barrier()


def largest(value: float) -> float:
    """Return the largest value of all ranks."""
    values: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(values, value)
    return max(values)


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """Compare both optimizers, and the resumed run with the uninterrupted one."""
    engine = build({**case, "type": TORCHS})
    expected = train(engine, ALL, case)
    engine.destroy()
    ours = {**case, "type": OURS}
    with shared_folder() as folder:
        own_folder = str(folder / f"node{dist.get_rank()}" if case["node_local"] else folder)
        engine = build(ours)
        before = train(engine, HALF, case)
        engine.save_checkpoint(own_folder, **case["save"])
        found = train(engine, range(2, 4), case)
        result = {"wrapper": type(engine.optimizer).__name__, "fused_step": engine.adax_fused_step.extent}
        engine.destroy()
        engine = build(ours, seed=1)
        path, _ = engine.load_checkpoint(own_folder, **case["load"])
        resumed = train(engine, range(2, 4), case)
        engine.destroy()
    differences = {
        "difference": deviation(found, expected),
        "resume_difference": deviation(resumed, found) if path else float("inf"),
        "moved": deviation(found, before),
    }
    return {**result, **{name: largest(value) for name, value in differences.items()}}


def load_weights_alone(case: dict[str, Any]) -> dict[str, float]:
    """Compare with engines that start from the saved, rounded weights."""
    ours, differences = {**case, "type": OURS}, {}
    with shared_folder() as folder:
        engine = build(ours)
        weights = {name: each.to(DTYPES[case["dtype"]]).float() for name, each in train(engine, HALF, case).items()}
        engine.save_checkpoint(str(folder))
        engine.destroy()
        engine = build(ours, weights=weights)
        expected = train(engine, HALF, case)
        engine.destroy()
        for name, options in WEIGHTS_ALONE.items():
            engine = build(ours, seed=1)
            engine.load_checkpoint(str(folder), **options)
            differences[name] = largest(deviation(train(engine, HALF, case), expected))
            engine.destroy()
    return differences


def train_two(case: dict[str, Any]) -> dict[str, float]:
    """Compare two engines in turns with one after the other."""
    ours, alone = {**case, "type": OURS}, []
    for seed in (0, 1):
        engine = build(ours, seed)
        alone.append(train(engine, ALL, case))
        engine.destroy()
    with shared_folder() as folder:
        engines = [build(ours, seed) for seed in (0, 1)]
        for step in HALF:
            for engine in engines:
                train(engine, range(step, step + 1), case)
        for name, engine in enumerate(engines):
            engine.save_checkpoint(str(folder / str(name)))
            engine.destroy()
        engines = [build(ours, seed) for seed in (2, 3)]
        for name, engine in enumerate(engines):
            engine.load_checkpoint(str(folder / str(name)))
        together = [train(engine, range(2, 4), case) for engine in engines]
        for engine in engines:
            engine.destroy()
    return {"difference": largest(max(map(deviation, together, alone)))}


def save_16bit(case: dict[str, Any]) -> dict[str, float]:
    """Compare the file of `save_16bit_model` with the master weights."""
    with shared_folder() as folder:
        engine = build({**case, "type": OURS})
        weights = train(engine, HALF, case)
        engine.save_16bit_model(str(folder), "weights.pt")
        dist.barrier()
        saved = torch.load(folder / "weights.pt", weights_only=True)
        engine.destroy()
    expected = {name: each.to(DTYPES[case["dtype"]]).float() for name, each in weights.items()}
    return {"difference": largest(deviation({name: saved[name].float() for name in expected}, expected))}


def save_under_two_tags(case: dict[str, Any]) -> dict[str, Any]:
    """Save with another tag on each rank."""
    with shared_folder() as folder:
        engine = build({**case, "type": OURS})
        try:
            engine.save_checkpoint(str(folder), tag=f"of-rank-{dist.get_rank()}")
            error = ""
        except ValueError as raised:
            error = str(raised)
        engine.destroy()
        dist.barrier()
        return {"error": error, "left": [path.name for path in folder.iterdir()]}


ACTIONS = {each.__name__: each for each in (compare, load_weights_alone, train_two, save_16bit, save_under_two_tags)}


def main(cases_path: str, results_path: str) -> None:
    start()
    torch.set_num_threads(1)
    get_accelerator().is_fp16_supported = lambda: True
    run_cases(cases_path, results_path, DEFAULTS, lambda case: ACTIONS[case["do"]](case))


if __name__ == "__main__":
    main(*sys.argv[1:])
