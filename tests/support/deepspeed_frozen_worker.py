"""Train a model with frozen integer weights, fused and unfused, under DeepSpeed.

Usage, once per rank: RANK=... WORLD_SIZE=2 python deepspeed_frozen_worker.py RESULT.json

RESULT.json becomes {case: "equal", "differs" or the error}, written by rank 0.
"""

import json
import sys
from pathlib import Path
from typing import Any

import adax_triton.integrations.deepspeed
import deepspeed
import torch
from torch import Tensor, nn

DTYPES = {"uint8": torch.uint8, "int8": torch.int8, "bool": torch.bool}


class Quantized(nn.Module):
    """A model with a frozen integer weight and two trained layers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Parameter(torch.randint(0, 2, (16, 80)).to(dtype), requires_grad=False)
        self.first, self.second = nn.Linear(16, 80), nn.Linear(80, 64)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.first.weight.dtype)
        hidden = self.first(inputs) + inputs @ self.frozen.to(inputs.dtype)
        return self.second(hidden).float().square().mean()


def trained(dtype: torch.dtype, stage: int, precision: str, fuse: str) -> list[Tensor]:
    model = Quantized(dtype)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdaXW", "params": {"states": "8bit_v16"}},
        "adax_triton": {"fuse": fuse},
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        engine.backward(engine(torch.randn(4, 16, generator=generator)))
        engine.step()
    weights = [param.detach().clone() for param in model.parameters()]
    engine.destroy()
    return weights


def main(result: str) -> None:
    """Run all cases."""
    adax_triton.integrations.deepspeed.register()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    found = {}
    for stage in (0, 1):
        for precision in ("fp32", "bf16"):
            for name, dtype in DTYPES.items():
                try:
                    fused, plain = (trained(dtype, stage, precision, fuse) for fuse in ("auto", "off"))
                    moved = not torch.equal(fused[1].float(), Quantized(dtype).first.weight.detach())
                    equal = moved and all(torch.equal(one, other) for one, other in zip(fused, plain, strict=True))
                    found[f"ZeRO {stage}, {precision}, {name}"] = "equal" if equal else "differs"
                except Exception as error:
                    found[f"ZeRO {stage}, {precision}, {name}"] = f"{type(error).__name__}: {error}"
    if torch.distributed.get_rank() == 0:
        Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
