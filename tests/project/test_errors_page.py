"""Provoke each message of docs/errors.md and compare it with its heading."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from torch import nn

from adax_triton import AdamW, AdaX, AdaXW, GradientRelease, JsonLinesLogger
from adax_triton.convert.files import reject_unsafe_pickles
from adax_triton.step import backend, cpu_kernel

PAGE = (ROOT / "docs" / "errors.md").read_text()
HEADINGS = re.findall(r"^### `(.+)`$", PAGE, flags=re.MULTILINE)

# Each line raises an error of DeepSpeed or of the adapter; all run in one process.
DEEPSPEED = {
    "is not a supported DeepSpeed Optimizer": "initialize(config)",
    "optimizer.params has unknown keys": "check(optimizer={'type': 'AdaXW', 'params': {'torch_adam': True}})",
    "is too large for AdaX": "check(optimizer={'type': 'AdaX', 'params': {'betas': [0.9, 0.999]}})",
    "does not support it under DeepSpeed": "check(optimizer={'type': 'AdaX', 'params': {'max_grad_norm': 1.0}})",
    "never scales the loss": "check(fp16={'enabled': True})",
}
DEEPSPEED_PROGRAM = """
import json, sys
import deepspeed, torch

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdaX", "params": {"lr": 1e-3}}}

def initialize(config):
    model = torch.nn.Linear(2, 2)
    deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

def check(**changes):
    from adax_triton.integrations.deepspeed import check_config
    check_config({**config, **changes})

messages = {}
for heading, line in json.loads(sys.argv[1]).items():
    try:
        exec(line)
    except Exception as error:
        messages[heading] = str(error)
open(sys.argv[2], "w").write(json.dumps(messages))
"""


def message_of(run: Callable[[], Any]) -> str:
    """Return the error or the warning of a function."""
    with pytest.raises(Exception) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        run()
    return str(caught.value)


def stepping(make: Callable[[nn.Module], Any] = lambda model: AdaXW(model.parameters())) -> str:
    """Return a first step's message; check that nothing changed."""
    model = nn.Linear(3, 2)
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = make(model)
    model(torch.ones(1, 3)).sum().backward()
    message = message_of(optimizer.step)
    assert all(map(torch.equal, before, model.parameters())) and not any(
        int(state.get("step", 0)) for state in optimizer.state.values()
    )
    return message


def constructing(optimizer_class: type, **options: Any) -> str:
    return message_of(lambda: optimizer_class(nn.Linear(3, 2).parameters(), **options))


def import_from_source_tree(patch: pytest.MonkeyPatch) -> str:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import adax_triton"
    return subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True).stderr


def step_without_triton(patch: pytest.MonkeyPatch) -> str:
    patch.setattr(backend, "has_triton", lambda: False)
    cuda = message_of(lambda: backend.backend_of(torch.device("cuda", 0), torch.float32))
    assert "cuda:0" in cuda and "train on the CPU" in cuda
    patch.setattr(backend, "_interpreting", lambda: True)
    return stepping()


def build_problem(patch: pytest.MonkeyPatch, cxx: str | None, path: str | None = None) -> str:
    patch.setattr(backend, "cpu_kernel", cpu_kernel.cpu_kernel.__wrapped__)
    patch.setattr(backend, "_failed", set())
    patch.setattr(backend, "_warned", [])
    patch.delenv("CXX", raising=False)
    if cxx is not None:
        patch.setenv("CXX", cxx)
    if path is not None:
        patch.setenv("PATH", path)
    message = stepping()
    assert message.startswith("adax_triton updates CPU tensors with uncompiled PyTorch, several times slower: ")
    return message


def step_with_infinite_gradient(patch: pytest.MonkeyPatch) -> str:
    def make(model: nn.Module) -> AdaXW:
        model.weight.register_hook(lambda grad: grad * torch.inf)
        return AdaXW(model.parameters(), max_grad_norm=1.0, error_if_nonfinite=True)

    return stepping(make)


def step_when_frozen(patch: pytest.MonkeyPatch) -> str:
    optimizer = AdaXW([torch.ones(3, requires_grad=True)])
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[param]["step"] = 200_000
    return message_of(optimizer.step)


def release_with_scaler(patch: pytest.MonkeyPatch) -> str:
    model = nn.Linear(3, 2)
    optimizer, scaler = AdaXW(model.parameters()), torch.amp.GradScaler("cpu")
    GradientRelease(optimizer)
    scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    return message_of(lambda: scaler.step(optimizer))


def scale_float16(patch: pytest.MonkeyPatch) -> str:
    param, scaler = nn.Parameter(torch.ones(3, dtype=torch.float16)), torch.amp.GradScaler("cpu")
    optimizer = AdaXW([param])
    scaler.scale(param.sum()).backward()
    return message_of(lambda: scaler.step(optimizer))


def loading(optimizer_class: type, saved_class: type) -> str:
    param = nn.Parameter(torch.ones(3))
    saved = saved_class([param]).state_dict()
    return message_of(lambda: optimizer_class([param]).load_state_dict(saved))


def load_without_exponents(patch: pytest.MonkeyPatch) -> str:
    param = nn.Parameter(torch.ones(4096))
    param.grad = torch.ones(4096)
    saved, optimizer = AdaXW([param], states="8bit"), AdaXW([param])
    saved.step()
    state_dict = saved.state_dict()
    del state_dict["state"][0]["group_exponents"]
    return message_of(lambda: optimizer.load_state_dict(state_dict))


def quantize_under_fsdp1(patch: pytest.MonkeyPatch) -> str:
    param = nn.Parameter(torch.ones(3))
    param._fsdp_flattened = True  # as FSDP1 marks its parameters
    return message_of(lambda: AdaXW([param], states="8bit"))


def read_unsafe_file(patch: pytest.MonkeyPatch) -> str:
    def read() -> None:
        with reject_unsafe_pickles(Path("checkpoint.pt")):
            raise EOFError

    return message_of(read)


MESSAGES: dict[str, Callable[[pytest.MonkeyPatch], str]] = {
    "is a source tree that is not installed": import_from_source_tree,
    "needs Triton, which is not installed": step_without_triton,
    "No C++ compiler was found": lambda patch: build_problem(patch, None, path="/nonexistent"),
    "CXX names the compiler": lambda patch: build_problem(patch, "no-such-compiler"),
    "failed to build the CPU kernel": lambda patch: build_problem(patch, "false"),
    "the Triton kernel does not support its parameter": lambda _: stepping(
        lambda model: AdaXW(model.parameters(), capturable=True)
    ),
    "AdaX's betas[1] is the growth rate of its memory": lambda _: constructing(AdaXW, betas=(0.9, 0.999)),
    "Adam's betas[1] is a decay near 1": lambda _: constructing(AdamW, betas=(0.9, 1e-4)),
    "got an unexpected keyword argument": lambda _: constructing(AdaXW, max_norm=1.0),
    "it was renamed, use": lambda _: constructing(AdaXW, states="low"),
    "error_if_nonfinite=True needs a number": lambda _: constructing(AdaXW, error_if_nonfinite=True),
    "logs telemetry, but the optimizer records none": lambda _: message_of(
        lambda: AdaX([torch.ones(3)]).register_step_post_hook(JsonLinesLogger(None))
    ),
    "AMSGrad is not supported": lambda _: constructing(AdaXW, amsgrad=True),
    "Attempting to unscale FP16 gradients": scale_float16,
    "The norm of the gradients is not finite": step_with_infinite_gradient,
    "are frozen: they no longer change": step_when_frozen,
    "GradientRelease accepts adax_triton's AdaX, AdaXW, Adam and AdamW": lambda _: message_of(
        lambda: GradientRelease(torch.optim.AdamW([torch.ones(3)]))
    ),
    "GradientRelease does not support GradScaler": release_with_scaler,
    "GradientRelease does not support clipping": lambda _: message_of(
        lambda: GradientRelease(AdaXW([torch.ones(3)], max_grad_norm=1.0))
    ),
    "has no 'second_moment', so adax_triton did not save it": lambda _: loading(AdaXW, torch.optim.AdamW),
    "load it into an optimizer with the saved rule": lambda _: loading(AdaXW, AdamW),
    "cannot be loaded by torch.load(weights_only=True)": read_unsafe_file,
    "then load its state_dict() into this one": load_without_exponents,
    "FSDP1 (FullyShardedDataParallel)": quantize_under_fsdp1,
}


def test_every_heading_has_an_entry() -> None:
    assert sorted(HEADINGS) == sorted([*MESSAGES, *DEEPSPEED])


@pytest.mark.parametrize("heading", MESSAGES)
def test_message_contains_the_heading(heading: str, native_cpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    message = MESSAGES[heading](monkeypatch)
    assert heading in message, message


@pytest.mark.deepspeed
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_messages_contain_the_headings(tmp_path: Path) -> None:
    results = tmp_path / "messages.json"
    command = [sys.executable, "-P", "-c", DEEPSPEED_PROGRAM, json.dumps(DEEPSPEED), str(results)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    messages = json.loads(results.read_text())
    assert [heading for heading in DEEPSPEED if heading not in messages.get(heading, "")] == [], messages


def test_examples_parse() -> None:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    parsers = {"python": ast.parse, "json": json.loads, "sh": str}
    for language, block in blocks:
        parsers[language](block)
    assert len(blocks) >= len(HEADINGS)


def test_converted_state_dicts_load_as_the_page_shows() -> None:
    from adax_triton import adam_from_adax, adax_from_adam, from_torch_adam

    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    saved = {}
    for optimizer in (torch.optim.AdamW([param]), AdamW([param]), AdaXW([param])):
        optimizer.step()
        saved[type(optimizer)] = optimizer.state_dict()
    AdaXW([param]).load_state_dict(adax_from_adam(from_torch_adam(saved[torch.optim.AdamW])))
    AdamW([param]).load_state_dict(from_torch_adam(saved[torch.optim.AdamW]))
    AdaXW([param]).load_state_dict(adax_from_adam(saved[AdamW]))
    AdamW([param]).load_state_dict(adam_from_adax(saved[AdaXW]))
