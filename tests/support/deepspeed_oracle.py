"""The model, data and case defaults of deepspeed_worker.py, and its oracle.

The oracle is a plain loop in one process without DeepSpeed. It computes the gradients of all ranks, averages and clips
them, and steps AdaX on float32 master weights.
"""

import functools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adax_triton import AdaX, AdaXW

WORLD_SIZE = 2
MICRO_BATCH = 4
VOCABULARY = 12
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class CautiousAdaX(AdaX):
    """A subclass such as a user writes."""

    def __init__(self, params: Any, lr: float = 1e-2, weight_decay: float = 1e-2) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)


OPTIMIZERS = {"adax": AdaX, "adaxw": AdaXW, "cautiousadax": CautiousAdaX, "adamax": torch.optim.Adamax}
CASE_DEFAULTS = {
    "type": "AdaX",  # "optimizer.type" of the configuration
    "params": {"lr": 1e-2, "weight_decay": 1e-2},  # "optimizer.params"
    "stage": 0,
    "dtype": "fp32",
    "zero": {},  # more of "zero_optimization"
    "config": {},  # more of the configuration
    "client": None,  # "instance" or "callable": pass it to deepspeed.initialize instead of the section
    "width": 16,
    "frozen": True,  # freeze one layer
    "unused": False,  # add a parameter that the loss does not use
    "steps": 4,
    "resume_at": None,  # save after this many steps, load into a new engine, continue, and compare
    "overflow_at": None,  # the step at which rank 1 has an infinite gradient
    "hyperparameters": None,  # expected values of a scheduler, by step and group; the oracle uses them
    "client_scheduler": None,  # a factor: pass torch's StepLR to deepspeed.initialize
    "compile": False,  # call engine.compile
    "offload_at": None,  # after this step, offload the engine's states to the host and reload them
    "offload": None,  # kinds of states to offload; default all
    "moe": False,  # train the model of deepspeed_moe.py
    "reduce_each_micro_batch": False,  # the oracle adds gradients in DeepSpeed's order
    "accumulate_in_fp32": False,
    "bf16_masters": False,  # the optimizer keeps the master weights, not DeepSpeed
    "expect_error": False,
}


class TiedModel(nn.Module):
    """A model with tied, frozen and one-element parameters.

    The one-element parameter has a group of its own. One of two ranks owns only padding of that group.
    """

    def __init__(self, width: int, frozen: bool = True, unused: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.frozen = nn.Linear(width, width).requires_grad_(not frozen)
        self.hidden = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.ones(1))
        self.unused = nn.ParameterList([torch.ones(5)] if unused else [])
        self.out = nn.Linear(width, VOCABULARY, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.gain * torch.tanh(self.hidden(self.frozen(x)))
        return nn.functional.cross_entropy(self.out(x).float(), targets)

    def groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [self.embed.weight, *self.frozen.parameters(), self.hidden.weight]},
            {"params": [self.hidden.bias], "weight_decay": 0.0},
            {"params": [self.gain, *self.unused], "lr": 3e-3},
        ]


def build_model(case: dict[str, Any], seed: int = 0) -> TiedModel:
    torch.manual_seed(seed)
    return TiedModel(case["width"], case["frozen"], case["unused"])


def batch(step: int, micro_step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro_step + rank)
    tokens, targets = torch.randint(VOCABULARY, (2, MICRO_BATCH), generator=generator)
    return tokens, targets


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def averaged_gradients(model: TiedModel, step: int, case: dict[str, Any]) -> dict[str, Tensor]:
    micro_steps = case["config"].get("gradient_accumulation_steps", 1)
    names, params = zip(*trainable(model).items(), strict=True)
    # A power of two changes only the exponent of a normal number.
    scale = 2.0**8 if case["dtype"] == "fp16" else 1.0

    def gradients(micro_step: int, rank: int) -> list[Tensor]:
        loss = model(*batch(step, micro_step, rank)) / micro_steps
        found = torch.autograd.grad(loss * scale, params, materialize_grads=True)
        return [g.float() if case["accumulate_in_fp32"] else g for g in found]

    def total(parts: list[list[Tensor]]) -> list[Tensor]:
        return [functools.reduce(operator.add, tensors) for tensors in zip(*parts, strict=True)]

    def mean_over_ranks(parts: list[list[Tensor]]) -> list[Tensor]:
        # DeepSpeed communicates in the dtype of the model, even if it accumulates in float32.
        parts = [[g.to(p.dtype) for g, p in zip(part, params, strict=True)] for part in parts]
        return [g / WORLD_SIZE for g in total(parts)]

    micro, ranks = range(micro_steps), range(WORLD_SIZE)
    if case["reduce_each_micro_batch"]:
        found = total([mean_over_ranks([gradients(i, rank) for rank in ranks]) for i in micro])
    else:
        found = mean_over_ranks([total([gradients(i, rank) for i in micro]) for rank in ranks])
    return {name: g.float() / scale for name, g in zip(names, found, strict=True)}


def single_process_trajectory(case: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    model = build_model(case).to(DTYPES[case["dtype"]])
    lp_params = trainable(model)
    masters = {name: nn.Parameter(param.detach().float().clone()) for name, param in lp_params.items()}
    master_of = {id(param): masters[name] for name, param in lp_params.items()}
    groups = [
        {**group, "params": [master_of[id(p)] for p in group["params"] if p.requires_grad]} for group in model.groups()
    ]
    optimizer = OPTIMIZERS[case["type"].lower()](groups, **case["params"])
    hyperparameters = case["hyperparameters"] or [[{}] * len(groups)] * case["steps"]
    max_norm = case["config"].get("gradient_clipping", 0.0)
    for step in range(case["steps"]):
        if step != case["overflow_at"]:
            for name, grad in averaged_gradients(model, step, case).items():
                masters[name].grad = grad
            for group, values in zip(optimizer.param_groups, hyperparameters[step], strict=True):
                group.update(values)
            if max_norm:
                nn.utils.clip_grad_norm_(masters.values(), max_norm, foreach=False)
            optimizer.step()
            with torch.no_grad():
                for name, param in lp_params.items():
                    param.copy_(masters[name])
        seen = lp_params if case["bf16_masters"] else masters
        yield {name: weight.detach().float().clone() for name, weight in seen.items()}
