"""Run the code blocks of README.md and of the documentation.

The Python blocks of a page run in order, in one process, on a CPU. Commands are checked, not run: their files, targets
and options exist. tests/deepspeed_runs/test_guide.py runs the blocks of docs/deepspeed.md.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from paths import ROOT

from adax_triton.cli.main import BENCHMARKS, COMMANDS

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
GUIDE = DOCS / "deepspeed.md"
BLOCK = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
# What the pages assume: a model, and batches that it takes.
PREAMBLE = """
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
batches = [torch.randn(8, 64) for _ in range(3)]
"""
# docs/errors.md shows remedies in programs that exist already.
OWN_PREAMBLES = {
    "errors.md": """
from adax_triton import *
inputs, total_steps = batches[0], 1000
state_dict = torch.optim.AdamW(model.parameters()).state_dict()
"""
}
# A page imports these only where its blocks use them; without them the page's test is skipped.
OPTIONAL = ("deepspeed", "lightning", "tensorboard", "transformers", "accelerate")
# A block that imports one of these is left out if a package that it needs is missing. tests/frameworks runs them too.
OPTIONAL_BLOCKS = {"timm": ("timm", "torchvision"), "pytorch_optimizer": ("pytorch_optimizer",)}


def blocks(page: Path, language: str) -> list[str]:
    found = BLOCK.findall(page.read_text())
    return [re.sub(f"^{indent}", "", text, flags=re.MULTILINE) for indent, name, text in found if name == language]


def imports(program: str, module: str) -> bool:
    return re.search(rf"^\s*(import|from) {module}\b", program, re.MULTILINE) is not None


def can_run(block: str) -> bool:
    needed = [packages for module, packages in OPTIONAL_BLOCKS.items() if imports(block, module)]
    return all(importlib.util.find_spec(package) is not None for package in sum(needed, ()))


def environment() -> dict[str, str]:
    """One rank on a CPU, with the native kernel."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kept |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return kept | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if page != GUIDE and blocks(page, "python")], ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    program = PREAMBLE + OWN_PREAMBLES.get(page.name, "") + "\n".join(filter(can_run, blocks(page, "python")))
    for module in OPTIONAL:
        if imports(program, module):
            pytest.importorskip(module)
    (tmp_path / "page.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "json")], ids=name_of)
def test_json_blocks_are_valid(page: Path) -> None:
    for block in blocks(page, "json"):
        assert json.loads(block)


def check_make(words: list[str]) -> None:
    targets = [word for word in words if "=" not in word]
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install"
    for extra in re.findall(r"\.\[(.*?)\]", " ".join(words)):
        assert set(extra.split(",")) <= set(extras)


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        done = subprocess.run([sys.executable, "-m", words[1], "--help"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        known = done.stdout
    else:
        known = (ROOT / words[0]).read_text()
    for option in re.findall(r" --([a-z-]+)", " ".join(words)):
        assert option in known or option.replace("-", "_") in known, f"{words[:2]} has no option --{option}"


def check_torchrun(words: list[str]) -> None:
    check_python(words[next(index for index, word in enumerate(words) if word.endswith(".py")) :])


def check_adax_triton(words: list[str]) -> None:
    assert words[0] in {*COMMANDS, "bench", "--version", "--help"}
    if words[0] == "bench" and not words[1].startswith("-"):
        assert words[1] in BENCHMARKS
        words = words[1:]
    name = {"doctor": "cli/doctor", "convert": "cli/convert"}.get(words[0])
    if name is not None:
        source = (ROOT / "adax_triton" / f"{name}.py").read_text()
        assert all(f'"{word}"' in source for word in words if word.startswith("--"))


CHECKS: dict[str, Callable[[list[str]], None]] = {
    **{"make": check_make, "pip": check_pip, "python": check_python, "python3": check_python},
    **{"adax-triton": check_adax_triton, "torchrun": check_torchrun, "deepspeed": check_torchrun},
    **dict.fromkeys(["pytest", "unset", "apt-get"], lambda words: None),
}


def commands(page: Path) -> list[list[str]]:
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables of this command
            words = words[1:]
        if words:
            found.append(words)
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=name_of)
def test_commands_exist(page: Path) -> None:
    for program, *words in commands(page):
        assert program in CHECKS, f"{page.name}: unknown program {program!r}"
        CHECKS[program](words)


def test_blocks_name_a_known_language() -> None:
    for page in PAGES:
        for _, language, _ in BLOCK.findall(page.read_text()):
            assert language in {"python", "json", "sh", "text", "math"}, f"{page.name}: {language!r}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 140
