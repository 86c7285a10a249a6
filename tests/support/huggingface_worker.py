"""Run the Trainer and Accelerate on one rank; compare with single-process AdaX.

Usage, once per rank: RANK=... LOCAL_RANK=... WORLD_SIZE=2 python huggingface_worker.py CASES.json RESULTS.json

CASES.json is a list of dictionaries (see `CASE_DEFAULTS`); RESULTS.json becomes {case name: result}. For the oracle see
huggingface_oracle.py.
"""

import contextlib
import io
import logging
import os
import runpy
import sys
import tempfile
from typing import Any

import adax_triton.integrations.deepspeed
import torch
import torch.distributed as dist
import transformers.trainer
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, DummyOptim
from adax_triton.integrations import huggingface
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed_cases import run_cases, start
from huggingface_oracle import (
    MAX_NORM,
    WORLD_SIZE,
    Recorder,
    build_model,
    deviation,
    random_tokens,
    single_process_weights,
)
from paths import ROOT
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import adax_triton

MICRO_BATCH = 4
STEPS = 4
CASE_DEFAULTS = {
    "through": "trainer",  # or "accelerate", or the file name of an example
    "given": "section",  # how the optimizer is passed: see `make_trainer` and `run_accelerate`
    "type": "AdaX",
    "params": {"lr": 1e-2, "weight_decay": 1e-2},  # of the optimizer and of the oracle
    "section": None,  # "optimizer.params" of the configuration. None: `params`
    "config": {"zero_optimization": {"stage": 2}},  # DeepSpeed configuration. None: without DeepSpeed
    "fsdp": False,  # shard with FSDP2, without DeepSpeed
    "arguments": {},  # more TrainingArguments, or arguments of the example's command line
    "resume_at": None,
    "only_deepspeed": False,  # simulate a user who imports integrations.deepspeed alone
    "expect_error": False,
}


class LogLines(logging.Handler):
    """The adapter's log of this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.logger = logging.getLogger("adax_triton")
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname}: {record.getMessage()}")

    def of_ranks(self) -> list[list[str]]:
        self.logger.removeHandler(self)
        return of_ranks(self.lines)


def of_ranks(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(gathered, value)
    return gathered


# The frameworks.


def start_over(case: dict[str, Any]) -> None:
    """Reset the frameworks' process state, and register as the case does."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    # Accelerate needs GPUs for DeepSpeed and FSDP on several ranks. Without this check its logic is the same on CPUs.
    distributed_type = DistributedType.MULTI_GPU if case["fsdp"] else DistributedType.MULTI_CPU
    PartialState._prepare_backend = lambda self, cpu, sagemaker_dp, backend: ("gloo", distributed_type)
    huggingface.unregister()
    if not case["only_deepspeed"]:
        huggingface.register()


def deepspeed_config(case: dict[str, Any]) -> dict[str, Any] | None:
    if case["config"] is None:
        return None
    filled = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 1, "gradient_clipping": MAX_NORM}
    config = {**filled, **case["config"]}
    if case["given"] == "section":
        config["optimizer"] = {"type": case["type"], "params": case["section"] or case["params"]}
    if case["given"] == "class-unforced":
        config["zero_force_ds_cpu_optimizer"] = False
    return config


class OverridingTrainer(Trainer):
    """A Trainer with its own `create_optimizer`."""

    adax: Any = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.adax(self.model.parameters())
        return self.optimizer


def make_trainer(case: dict[str, Any], model: nn.Module, folder: str, save_at: int | None) -> Trainer:
    optimizer_class, params = getattr(adax_triton, case["type"]), case["params"]
    arguments = {
        "learning_rate": params["lr"],
        "weight_decay": params["weight_decay"],
        "max_grad_norm": MAX_NORM,
        "lr_scheduler_type": "constant",
        **case["arguments"],
    }
    saving = {"save_strategy": "no"} if save_at is None else {"save_strategy": "steps", "save_steps": save_at}
    training = TrainingArguments(
        output_dir=folder,
        deepspeed=deepspeed_config(case),
        fsdp=case["fsdp"],
        per_device_train_batch_size=MICRO_BATCH,
        max_steps=STEPS,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        **saving,
        **arguments,
    )
    trainer_class, given = Trainer, {}
    if case["given"] in ("class", "class-unforced"):
        given = {"optimizer_cls_and_kwargs": (optimizer_class, params)}
    elif case["given"] == "object":
        given = {"optimizers": (optimizer_class(model.parameters(), **params), None)}
    elif case["given"] == "override":
        trainer_class = OverridingTrainer
        trainer_class.adax = staticmethod(lambda groups: optimizer_class(groups, **params))
    return trainer_class(model=model, args=training, train_dataset=random_tokens(), **given)


def run_trainer(case: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        folder = of_ranks(directory)[0]
        model = build_model()
        recorder = Recorder(model)
        trainer = make_trainer(case, model, folder, case["resume_at"])
        trainer.train()
        weights, calls = whole_weights(model), of_ranks(recorder.calls)
        result = described(trainer.model_wrapped, trainer.optimizer)
        result["deviation"] = deviation(weights, single_process_weights(case, calls))
        result["moved"] = deviation(weights, dict(build_model().named_parameters()))
        if case["resume_at"] is not None:
            start_over(case)
            model = build_model(seed=1)  # another seed, so only the checkpoint can restore the weights
            trainer = make_trainer(case, model, folder, None)
            trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{case['resume_at']}")
            result["resume_deviation"] = deviation(whole_weights(model), weights)
        dist.barrier()
    return result


def prepare(case: dict[str, Any], seed: int = 0) -> tuple[Accelerator, list[Any], Recorder]:
    """Return the accelerator, [model, optimizer, loader] and the recorder."""
    config = deepspeed_config(case)
    plugin = None if config is None else DeepSpeedPlugin(hf_ds_config=config)
    accelerator = Accelerator(deepspeed_plugin=plugin)
    model = build_model(seed)
    recorder = Recorder(model)
    if case["given"] == "section":
        optimizer = DummyOptim(model.parameters(), **case["params"])
    else:
        optimizer = getattr(adax_triton, case["type"])(model.parameters(), **case["params"])
    loader = DataLoader(random_tokens(), batch_size=MICRO_BATCH)
    return accelerator, list(accelerator.prepare(model, optimizer, loader)), recorder


def train_prepared(accelerator: Accelerator, parts: list[Any], steps: range) -> dict[str, Tensor]:
    wrapped, optimizer, loader = parts
    for _, batch in zip(steps, accelerator.skip_first_batches(loader, steps.start), strict=False):
        accelerator.backward(wrapped(**batch).loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return whole_weights(accelerator.unwrap_model(wrapped))


def run_accelerate(case: dict[str, Any]) -> dict[str, Any]:
    accelerator, parts, recorder = prepare(case)
    saved_at = case["resume_at"] or STEPS
    weights = train_prepared(accelerator, parts, range(saved_at))
    result = described(parts[0], parts[1])
    with tempfile.TemporaryDirectory() as directory:
        folder = of_ranks(directory)[0]
        if case["resume_at"] is not None:
            accelerator.save_state(folder)
            weights = train_prepared(accelerator, parts, range(saved_at, STEPS))
            start_over(case)
            # Another seed, so only the checkpoint can restore the weights.
            accelerator, parts, _ = prepare(case, seed=1)
            accelerator.load_state(folder)
            resumed = train_prepared(accelerator, parts, range(saved_at, STEPS))
            result["resume_deviation"] = deviation(resumed, weights)
        dist.barrier()
    result["deviation"] = deviation(weights, single_process_weights(case, of_ranks(recorder.calls)))
    result["moved"] = deviation(weights, dict(build_model().named_parameters()))
    return result


def described(model: Any, optimizer: Any) -> dict[str, Any]:
    """Return the class of the innermost optimizer, and of the wrapped model."""
    basic = getattr(model, "basic_optimizer", None) or optimizer.optimizer
    return {"optimizer": f"{type(basic).__module__}.{type(basic).__name__}", "wrapper": type(model).__name__}


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    whole = {}
    for name, param in model.named_parameters():
        full = safe_get_full_fp32_param(param) if hasattr(param, "_hp_mapping") or hasattr(param, "ds_id") else None
        full = param.full_tensor() if isinstance(param, DTensor) else param if full is None else full
        whole[name] = full.detach().clone()
    return whole


def run_example(case: dict[str, Any]) -> dict[str, Any]:
    path = ROOT / "examples" / case["through"]
    sys.argv = [str(path), *case["arguments"]]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(path), run_name="__main__")
    return {"printed": of_ranks(printed.getvalue())}


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    start_over(case)
    log = LogLines()
    run = {"trainer": run_trainer, "accelerate": run_accelerate}.get(case["through"], run_example)
    try:
        result = run(case)
    except (Exception, SystemExit) as error:
        if not case["expect_error"]:
            raise
        result = {"error": type(error).__name__, "message": str(error)}
    return {**result, "log": log.of_ranks()}


def registration() -> dict[str, bool]:
    """Call `register` and `unregister` twice each, and check the Trainer.

    Return whether the Trainer is as expected.
    """
    huggingface.unregister()
    original = transformers.trainer.deepspeed_init
    huggingface.register()
    wrapped = transformers.trainer.deepspeed_init
    huggingface.register()
    again = transformers.trainer.deepspeed_init
    huggingface.unregister()
    huggingface.unregister()
    restored = transformers.trainer.deepspeed_init
    return {"wrapped": wrapped is not original, "once": again is wrapped, "restored": restored is original}


def main(cases_path: str, results_path: str) -> None:
    start()
    sys.path.insert(0, str(ROOT / "examples"))
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    run_cases(cases_path, results_path, CASE_DEFAULTS, run_case, {"registration": registration()})


if __name__ == "__main__":
    main(*sys.argv[1:])
