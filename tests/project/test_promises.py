"""Test that each documented guarantee is listed in promises.toml with its tests.

A guarantee is a sentence of the documentation with "always", "every", "any" or "in all".
"""

from __future__ import annotations

import ast
import re
import tomllib
from typing import Any

import pytest
from paths import ROOT, SUPPORT

# Pages with guarantees that other files state too, or that a program writes.
NOT_PAGES = {"api", "architecture", "changelog", "deepspeed-acceptance", "deepspeed-passes"}
PAGES = [
    "README.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")) if path.stem not in NOT_PAGES),
    "docs/benchmarks/index.md",
]
PROMISES: list[dict[str, Any]] = tomllib.loads((SUPPORT / "promises.toml").read_text())["promise"]
GUARANTEE = re.compile(r"(?<!`)\b(always|every|any|in all)\b", re.IGNORECASE)


def sentences(page: str) -> list[str]:
    text = re.sub(r"```.*?```", "\n\n", (ROOT / page).read_text(), flags=re.DOTALL)
    found = []
    for block in re.split(r"\n\s*\n|\n(?=[-|#])", text):
        found += re.split(r"(?<=[.:;!?])\s+(?=[A-Z`*\"])", " ".join(block.split()))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_each_guarantee_is_listed(page: str) -> None:
    guarantees = [sentence for sentence in sentences(page) if GUARANTEE.search(sentence)]
    missing = [sentence for sentence in guarantees if not any(promise["says"] in sentence for promise in PROMISES)]
    assert not missing


def test_guarantees_are_found() -> None:
    found = [sentence for page in PAGES for sentence in sentences(page) if GUARANTEE.search(sentence)]
    assert len(found) >= len(PROMISES)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise["says"])
def test_each_entry_has_a_sentence_and_existing_tests(promise: dict[str, Any]) -> None:
    assert any(promise["says"] in sentence for page in PAGES for sentence in sentences(page))
    assert bool(promise["tests"]) != bool(promise.get("because"))
    for test in promise["tests"]:
        file, _, name = test.partition("::")
        module = ast.parse((ROOT / "tests" / file).read_text())
        assert name in [node.name for node in module.body if isinstance(node, ast.FunctionDef)], test
