"""Test adapters of PEFT and the trainers of TRL, offline.

Oracle: torch.optim.AdamW in the same run, or an uninterrupted run. The first test takes more than 5 s, because it
imports transformers, PEFT and TRL.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from torch import Tensor, nn

from adax_triton import AdamW, AdaXW

pytest.importorskip("peft")
pytest.importorskip("trl")

from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from huggingface_oracle import build_model, deviation, random_tokens
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

# The large eps hides the rounding of gradients that are nearly 0, such as those of the biases of keys.
PARAMS = {"lr": 1e-2, "eps": 1e-4}
STEPS, RESUME_AT = 6, 4


@pytest.fixture(autouse=True)
def one_process(native_cpu: torch.device, one_thread: None) -> Iterator[None]:
    """Leave no process state of Accelerate."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# PEFT


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, **settings})


def with_adapter(**settings: Any) -> Any:
    model = build_model()
    torch.manual_seed(1)
    return get_peft_model(model, lora(**settings))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    rows = random_tokens()[:8]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


Make = Callable[..., torch.optim.Optimizer]


def train_all(make: Make) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Pass frozen parameters too, among them quantized ones."""
    model = with_adapter(modules_to_save=["lm_head"])
    quantized = [nn.Parameter(torch.ones(8, dtype=dtype), requires_grad=False) for dtype in (torch.uint8, torch.int8)]
    optimizer = make([*model.parameters(), *quantized])
    train(model, optimizer)
    assert all(bool((param == 1).all()) for param in quantized)
    return model, optimizer


def train_trained(make: Make) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = with_adapter()
    optimizer = make(param for param in model.parameters() if param.requires_grad)
    train(model, optimizer)
    return model, optimizer


def switch_adapters(make: Make) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = with_adapter()
    model.add_adapter("other", lora())
    optimizer = make(model.parameters())
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        train(model, optimizer)
    counts = {int(optimizer.state[param]["step"]) for param in optimizer.state}
    assert counts == {3, 6}
    return model, optimizer


def merge_adapters(make: Make) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train two adapters, merge and unmerge them, then train the merged model."""
    model = with_adapter()
    model.add_adapter("other", lora())
    model.base_model.set_adapter(["default", "other"])
    optimizer = make(model.parameters())
    train(model, optimizer)
    model.merge_adapter()
    model.unmerge_adapter()
    train(model, optimizer)
    merged = model.merge_and_unload().requires_grad_(True)
    train(merged, optimizer)
    return merged, optimizer


def loraplus(make: Make) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = with_adapter()
    arguments = {"lr": 1e-3, "loraplus_lr_ratio": 16, "eps": PARAMS["eps"], "loraplus_weight_decay": 0.1}
    # The class that `make` creates objects of.
    optimizer = create_loraplus_optimizer(model, optimizer_cls=type(make([nn.Parameter(torch.ones(1))])), **arguments)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-6, 1.6e-2, 1.6e-2]
    train(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("run", [train_all, train_trained, switch_adapters, merge_adapters, loraplus])
def test_adapters_train_as_with_torch(run: Callable[[Make], tuple[nn.Module, torch.optim.Optimizer]]) -> None:
    expected, torch_optimizer = run(lambda params: torch.optim.AdamW(params, **PARAMS))
    ours, _ = run(lambda params: AdamW(params, **PARAMS))
    assert deviation(weights_of(ours), weights_of(expected)) < 1e-6

    adapted, optimizer = run(lambda params: AdaXW(params, **PARAMS))
    assert type(optimizer) is AdaXW
    assert len(optimizer.state) == len(torch_optimizer.state)  # frozen parameters get no state
    initial, trained = weights_of(with_adapter()), weights_of(adapted)
    for name, param in adapted.named_parameters():
        if name in initial and not param.requires_grad and "lora" not in name:
            assert torch.equal(trained[name], initial[name])


@pytest.mark.parametrize("states", ["float32", "8bit"])
def test_saved_adapters_resume_bit_for_bit(states: str, tmp_path: Path) -> None:
    def optimizer_of(model: nn.Module) -> AdaXW:
        return AdaXW(model.parameters(), states=states, **PARAMS)

    settings = {"r": 128}  # lora_B has enough elements for quantized states
    whole = with_adapter(**settings)
    train(whole, optimizer_of(whole), STEPS)

    half = with_adapter(**settings)
    optimizer = optimizer_of(half)
    train(half, optimizer, RESUME_AT)
    half.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    resumed = PeftModel.from_pretrained(build_model(), tmp_path, is_trainable=True)
    optimizer = optimizer_of(resumed)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    train(resumed, optimizer, STEPS - RESUME_AT)
    assert deviation(weights_of(resumed), weights_of(whole)) == 0.0
    dtypes = {state["exp_avg"].dtype for state in optimizer.state.values()}
    assert dtypes == ({torch.float32} if states == "float32" else {torch.float32, torch.uint8})


# TRL

WORDS = [f"w{index}" for index in range(16)]
VOCABULARY = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def texts(seed: int) -> list[str]:
    rows = torch.randint(16, (32, 6), generator=torch.Generator().manual_seed(seed))
    return [" ".join(WORDS[index] for index in row) for row in rows]


def language_model(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    tokens = {"vocab_size": len(VOCABULARY), "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=16, n_layer=1, n_head=2, **tokens, **dropout))


def length_of(completions: list[str], **columns: Any) -> list[float]:
    """Return the reward of each completion."""
    return [float(len(completion)) for completion in completions]


def make_trl_trainer(kind: str, optimizer_class: Any, folder: Path, seed: int) -> Any:
    arguments = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "save_steps": RESUME_AT,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    model: Any = language_model(0 if "lora" in kind else seed)
    torch.manual_seed(seed)
    given: dict[str, Any] = {"processing_class": tokenizer()}
    if kind == "sft-lora":
        given |= {"peft_config": lora(task_type="CAUSAL_LM"), "optimizer_cls_and_kwargs": (optimizer_class, PARAMS)}
    else:
        model = get_peft_model(model, lora()) if kind == "dpo-lora" else model
        given |= {"optimizers": (optimizer_class(model.parameters(), **PARAMS), None)}
    if kind == "dpo-lora":
        dataset = Dataset.from_dict({"prompt": texts(0), "chosen": texts(1), "rejected": texts(2)})
        return DPOTrainer(model=model, args=DPOConfig(**arguments, max_length=32), train_dataset=dataset, **given)
    if kind == "grpo":
        dataset = Dataset.from_dict({"prompt": texts(0)})
        config = GRPOConfig(**arguments, num_generations=2, max_completion_length=6)
        return GRPOTrainer(model=model, args=config, train_dataset=dataset, reward_funcs=length_of, **given)
    dataset = Dataset.from_dict({"text": texts(0)})
    return SFTTrainer(model=model, args=SFTConfig(**arguments, max_length=32), train_dataset=dataset, **given)


def run_trl(kind: str, optimizer_class: Any, folder: Path, resume: bool = False) -> dict[str, Tensor]:
    """Train, or resume a checkpoint with another seed of the trained weights."""
    trainer = make_trl_trainer(kind, optimizer_class, folder, seed=int(resume))
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{RESUME_AT}" if resume else None)
    assert isinstance(trainer.optimizer.optimizer, optimizer_class)
    return weights_of(trainer.model)


@pytest.mark.parametrize("kind", ["sft", "sft-lora", "dpo-lora", "grpo"])
def test_trl_follows_torch_and_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    expected = run_trl(kind, torch.optim.AdamW, tmp_path / "torch")
    assert deviation(run_trl(kind, AdamW, tmp_path / "ours"), expected) < 1e-6
    whole = run_trl(kind, AdaXW, tmp_path)
    assert deviation(whole, expected) > 1e-3
    assert deviation(run_trl(kind, AdaXW, tmp_path, resume=True), whole) == 0.0


def test_example_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    import train_peft

    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {number} of a text\n" for number in range(300)))
    train_peft.main(["--data", str(text), "--steps", "30"])
    printed = re.findall(
        r"^AdaXW trains (\d+) of (\d+) weights: loss ([\d.]+), .* ([\d.]+)$", capsys.readouterr().out, re.M
    )
    trained, total, first, last = map(float, printed[0])
    assert trained < 0.5 * total
    assert last < first - 1.0
