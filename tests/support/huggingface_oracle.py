"""A small GPT-2 on random tokens and its single-process training.

Training uses neither DeepSpeed nor Accelerate. The oracle is a plain loop over the batches that the ranks' models were
called with. It computes each rank's gradients, averages and clips them, and steps the optimizer.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import adax_triton

WORLD_SIZE = 2
MAX_NORM = 0.3  # the gradients' norm is about 0.6


def build_model(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2, **tokens, **dropout)
    )


def random_tokens() -> list[dict[str, Tensor]]:
    tokens = torch.randint(32, (64, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


class Recorder:
    """Record the arguments of every call of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[dict[str, Any]] = []
        model.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append(copy.deepcopy(kwargs))


def by_decay(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the Trainer's groups: no decay for biases and norms.

    These are the vectors of this model.
    """
    vectors = [param for param in model.parameters() if param.ndim == 1]
    others = [param for param in model.parameters() if param.ndim > 1]
    return [{"params": others, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def single_process_weights(case: dict[str, Any], calls_of_ranks: list[list[dict[str, Any]]]) -> dict[str, Tensor]:
    model = build_model()
    by_trainer = case["given"] in ("class", "class-unforced")
    groups = by_decay(model, case["params"]["weight_decay"]) if by_trainer else model.parameters()
    optimizer = getattr(adax_triton, case["type"])(groups, **case["params"])
    params = list(model.parameters())
    for calls in zip(*calls_of_ranks, strict=True):
        # The Trainer divides a rank's loss by the tokens of all ranks, and rescales it because DeepSpeed averages.
        losses = [model(**call).loss * (WORLD_SIZE if "num_items_in_batch" in call else 1) for call in calls]
        gradients = [torch.autograd.grad(loss, params) for loss in losses]
        for param, *parts in zip(params, *gradients, strict=True):
            param.grad = sum(parts) / WORLD_SIZE
        nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=False)
        optimizer.step()
    return {name: param.detach() for name, param in model.named_parameters()}


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    # Unlike max(), the maximum of a tensor is NaN if a value is.
    return float(torch.stack([(found[name] - expected[name]).detach().abs().max() for name in expected]).max())
