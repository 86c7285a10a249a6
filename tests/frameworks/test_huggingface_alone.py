"""Test the Trainer of transformers without DeepSpeed, in one process.

Oracles: torch.optim.AdamW in the same run; for AdaXW a plain loop over the batches that the model was called with.
test_huggingface.py trains on two ranks with DistributedDataParallel and FSDP2. The first test takes more than 5 s,
because it imports transformers.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR, LRScheduler

import adax_triton

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from accelerate.state import AcceleratorState, GradientState
from huggingface_oracle import MAX_NORM, Recorder, build_model, by_decay, deviation, random_tokens
from transformers import Trainer, TrainingArguments, get_scheduler

STEPS, RESUME_AT, WARMUP, WEIGHT_DECAY = 6, 4, 2, 0.1
# The large eps hides the rounding of gradients that are nearly 0, such as those of the biases of keys.
PARAMS = {"lr": 1e-2, "eps": 1e-4}
CASES: dict[str, dict[str, Any]] = {
    # `optim` names the Trainer's own optimizers; a class replaces it.
    "class": {"given": "class", "arguments": {"optim": "adafactor", "optim_args": "scale_parameter=True"}},
    "class-bfloat16-own-clipping": {
        "given": "class",
        "arguments": {"bf16": True, "max_grad_norm": 0.0},
        "options": {"max_grad_norm": MAX_NORM},
    },
    "object-both-clip": {
        "given": "object",
        "arguments": {"max_grad_norm": MAX_NORM},
        "options": {"max_grad_norm": MAX_NORM / 2},
    },
    "override-accumulation": {
        "given": "override",
        "arguments": {"gradient_accumulation_steps": 2, "max_grad_norm": MAX_NORM},
    },
}


@pytest.fixture(autouse=True)
def one_process(native_cpu: torch.device, one_thread: None) -> Iterator[None]:
    """Leave no process state of Accelerate."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class OverridingTrainer(Trainer):
    """A Trainer with its own `create_optimizer`."""

    make: Callable[..., torch.optim.Optimizer]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.make(self.model.parameters())
        return self.optimizer


def make_schedule(case: dict[str, Any], optimizer: torch.optim.Optimizer) -> LRScheduler:
    if case["given"] == "object":
        return LinearLR(optimizer, total_iters=STEPS)
    return get_scheduler("cosine", optimizer, WARMUP, STEPS)


def make_trainer(case: dict[str, Any], optimizer_class: Any, folder: Path, seed: int = 0) -> tuple[Trainer, Recorder]:
    model = build_model(seed)
    recorder = Recorder(model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=4,
        max_steps=STEPS,
        save_strategy="steps" if optimizer_class is adax_triton.AdaXW and not seed else "no",
        save_steps=RESUME_AT,
        weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **case["arguments"],
    )
    params = {**PARAMS, **(case.get("options", {}) if optimizer_class is adax_triton.AdaXW else {})}
    trainer_class, given = Trainer, {}
    if case["given"] == "class":
        given = {"optimizer_cls_and_kwargs": (optimizer_class, params)}
    elif case["given"] == "object":
        optimizer = optimizer_class(model.parameters(), weight_decay=WEIGHT_DECAY, **params)
        given = {"optimizers": (optimizer, make_schedule(case, optimizer))}
    else:
        trainer_class = OverridingTrainer
        trainer_class.make = lambda self, groups: optimizer_class(groups, weight_decay=WEIGHT_DECAY, **params)
    return trainer_class(model=model, args=arguments, train_dataset=random_tokens(), **given), recorder


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def train(
    case: dict[str, Any], optimizer_class: Any, folder: Path, resume: bool = False
) -> tuple[dict[str, Tensor], Trainer, Recorder]:
    """Train, or resume a checkpoint with another seed of the weights."""
    trainer, recorder = make_trainer(case, optimizer_class, folder, seed=int(resume))
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{RESUME_AT}" if resume else None)
    assert isinstance(trainer.optimizer.optimizer, optimizer_class)
    return weights_of(trainer.model), trainer, recorder


def plain_weights(case: dict[str, Any], calls: list[dict[str, Any]]) -> dict[str, Tensor]:
    model = build_model()
    groups = by_decay(model, WEIGHT_DECAY) if case["given"] == "class" else model.parameters()
    optimizer = adax_triton.AdaXW(groups, weight_decay=WEIGHT_DECAY, **PARAMS, **case.get("options", {}))
    schedule, arguments = make_schedule(case, optimizer), case["arguments"]
    accumulated, max_norm = arguments.get("gradient_accumulation_steps", 1), arguments.get("max_grad_norm", 1.0)
    assert len(calls) == STEPS * accumulated
    for index, call in enumerate(calls, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.get("bf16", False)):
            model(**call).loss.backward()
        if index % accumulated == 0:
            if max_norm:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return weights_of(model)


@pytest.mark.parametrize("name", CASES)
def test_trainer_follows_torch_and_plain_pytorch_and_resumes(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    expected, torch_trainer, _ = train(case, torch.optim.AdamW, tmp_path / "torch")
    ours, trainer, _ = train(case, adax_triton.AdamW, tmp_path / "ours")
    # A rounding error may change the bfloat16 rounding of an activation.
    tolerance = 1e-5 if case["arguments"].get("bf16") else 1e-6
    assert deviation(ours, expected) < tolerance
    for line, other in zip(trainer.state.log_history, torch_trainer.state.log_history, strict=True):
        assert line.get("learning_rate") == other.get("learning_rate")
        assert line.get("grad_norm") == pytest.approx(other.get("grad_norm"), abs=tolerance)

    whole, _, recorder = train(case, adax_triton.AdaXW, tmp_path)
    assert deviation(whole, plain_weights(case, recorder.calls)) == 0.0
    assert deviation(whole, weights_of(build_model())) > 5e-3
    resumed, trainer, _ = train(case, adax_triton.AdaXW, tmp_path, resume=True)
    assert deviation(resumed, whole) == 0.0
    assert {state["step"] for state in trainer.optimizer.state.values()} == {STEPS}
