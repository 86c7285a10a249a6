"""Model and data of the Hugging Face examples: GPT-2 over bytes."""

import argparse
import os
from pathlib import Path

import deepspeed
import torch
from text_data import read_text
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

DEEPSPEED_CONFIG = Path(__file__).resolve().with_name("huggingface.json")


def parse_arguments(argv: list[str] | None, description: str | None) -> argparse.Namespace:
    """Return the parsed command line of an example."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="text file or folder (default: source of Python's standard library)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=16, help="windows of text per process and step")
    parser.add_argument("--width", type=int, default=128, help="model width; a multiple of 4")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--weight-decay", type=float, default=5e-2, help="decoupled weight decay")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    args = parser.parse_args(argv)
    if "WORLD_SIZE" not in os.environ:
        parser.error("no launcher found; start this script with torchrun or deepspeed, see --help")
    # On a CPU DeepSpeed would compile a C++ extension for an all-reduce that only inference uses.
    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    return args


def build_model(width: int, context: int = 64) -> GPT2LMHeadModel:
    """Return a GPT-2 over bytes with two layers."""
    torch.manual_seed(0)
    tokens = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**tokens, n_positions=context, n_embd=width, n_layer=2, n_head=4))


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of `context` bytes; each window is its own target.

    Args:
        path: a text file or a folder. None: the source of Python's standard library.
        context: window length in bytes. Default: 64.
    """

    def __init__(self, path: Path | None, context: int = 64) -> None:
        text = torch.frombuffer(bytearray(read_text(path, max_bytes=4_000_000)), dtype=torch.uint8)
        self.windows = text[: len(text) // context * context].view(-1, context)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.windows[index].long()
        return {"input_ids": window, "labels": window}
