"""A mixture-of-experts case with DeepSpeed's expert parallelism, for deepspeed_worker.py."""

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed_oracle import MICRO_BATCH, VOCABULARY, WORLD_SIZE, batch
from torch import Tensor, nn


class MixtureOfExperts(nn.Module):
    """One expert on each rank, without dropped tokens.

    The result therefore does not depend on random numbers.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        expert = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.experts = MoE(width, expert, WORLD_SIZE, ep_size=WORLD_SIZE, drop_tokens=False, use_rts=False)
        self.out = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.experts(x)[0]
        return nn.functional.cross_entropy(self.out(x).float(), targets)


def run_moe_case(case: dict[str, Any]) -> dict[str, Any]:
    """Train and return the results of this rank.

    Expert weights differ between ranks.
    """
    torch.manual_seed(dist.get_rank())  # DeepSpeed broadcasts all weights except those of experts
    model = MixtureOfExperts(case["width"])
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_clipping": 0.0,
        "optimizer": {"type": case["type"], "params": case["params"]},
        "zero_optimization": {"stage": case["stage"]},
        **case["config"],
    }
    parameters = [{"params": list(model.parameters()), "name": "all"}]
    engine = deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]
    losses = []
    for step in range(case["steps"]):
        loss = engine(*batch(step % 2, 0, dist.get_rank()))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    result = {
        "losses": losses,
        "weights": {name: param.detach().flatten().tolist() for name, param in engine.module.named_parameters()},
        "moe_groups": [bool(group.get("moe")) for group in engine.basic_optimizer.param_groups],
        "steps": sorted({int(state["step"]) for state in engine.basic_optimizer.state.values()}),
    }
    engine.destroy()
    return result
