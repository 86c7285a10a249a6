"""Save or load the checkpoints of an older version, on one rank.

Usage: RANK=0 WORLD_SIZE=1 python old_checkpoint_worker.py save|load FOLDER STATES

`save` ran with commit 13bbae0, the last one with the states "low" and "lowest", and wrote the files in
tests/support/old_checkpoints/. FOLDER gets or holds `state_dict.pt` of a plain optimizer, the DeepSpeed checkpoint
`deepspeed/`, and `expected.pt` with the tensors that a load has to restore. `load` compares and raises on a difference.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import adax_triton.integrations.deepspeed  # noqa: F401  registers the optimizer types
import deepspeed
import torch
from torch import Tensor, nn

from adax_triton import AdaXW


def gradient(step: int, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(shape, generator=generator).bfloat16()


def optimizer_with_state(states: str, steps: int) -> tuple[nn.Parameter, AdaXW]:
    """Return a bfloat16 parameter and its optimizer after some steps."""
    param = nn.Parameter(gradient(100, torch.Size((64, 80))))
    optimizer = AdaXW([param], states=states, master_weights="24bit", seed=7)
    for step in range(steps):
        take_step(param, optimizer, step)
    return param, optimizer


def take_step(param: nn.Parameter, optimizer: AdaXW, step: int) -> None:
    param.grad = gradient(step, param.shape)
    optimizer.step()


def start_engine(states: str) -> Any:
    torch.manual_seed(0)
    model = nn.Linear(80, 64)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdaXW", "params": {"states": states}},
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def train(engine: Any, steps: int) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(4, 80, generator=generator).bfloat16()
        engine.backward(engine(inputs).float().square().mean())
        engine.step()


def engine_tensors(engine: Any) -> dict[str, Any]:
    """Return float32 weights and states of the engine's only parameter group."""
    (group,) = engine.optimizer.single_partition_of_fp32_groups
    return cloned({"weights": group.detach(), **engine.optimizer.optimizer.state[group]})


def cloned(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return clones, because `torch.save` writes the whole storage of a view."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in tensors.items()}


def save(folder: Path, states: str) -> None:
    folder.mkdir(parents=True)
    param, optimizer = optimizer_with_state(states, 3)
    saved = optimizer.state_dict()
    saved["state"][0] = cloned(saved["state"][0])
    torch.save({"param": param.detach().clone(), "optimizer": saved}, folder / "state_dict.pt")
    for step in (3, 4):
        take_step(param, optimizer, step)
    engine = start_engine(states)
    train(engine, 3)
    engine.save_checkpoint(str(folder / "deepspeed"), tag="step3")
    plain = cloned(optimizer.state_dict()["state"][0])
    expected = {"param": param.detach(), "plain": plain, "engine": engine_tensors(engine)}
    torch.save(expected, folder / "expected.pt")
    for script in (folder / "deepspeed").glob("*.py"):  # DeepSpeed writes these files but does not load them
        script.unlink()


def load(folder: Path, states: str) -> None:
    expected = torch.load(folder / "expected.pt")
    saved = torch.load(folder / "state_dict.pt")
    param = nn.Parameter(saved["param"])
    optimizer = AdaXW([param], states=states, master_weights="24bit", seed=7)
    optimizer.load_state_dict(saved["optimizer"])
    for step in (3, 4):
        take_step(param, optimizer, step)
    compare({"param": param.detach(), **optimizer.state[param]}, {"param": expected["param"], **expected["plain"]})
    copy = Path("deepspeed").absolute()  # DeepSpeed writes next to what it loads
    shutil.copytree(folder / "deepspeed", copy)
    engine = start_engine(states)
    path, _ = engine.load_checkpoint(str(copy))
    assert path is not None, "no checkpoint was loaded"
    compare(engine_tensors(engine), expected["engine"])
    train(engine, 1)
    assert engine_tensors(engine)["step"] == 4


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected), (set(found), set(expected))
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value
        assert same, f"{name} differs"


if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    {"save": save, "load": load}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
