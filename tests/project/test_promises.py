"""Each sentence of the documentation that promises something of every case is listed with the tests that hold it."""

from __future__ import annotations

import ast
import re
import tomllib
from typing import Any

import pytest
from paths import ROOT, SUPPORT

PAGES = ["README.md", "docs/deepspeed.md"]
PROMISES: list[dict[str, Any]] = tomllib.loads((SUPPORT / "promises.toml").read_text())["promise"]
OF_ALL = re.compile(r"\b(always|every|any|in all)\b", re.IGNORECASE)


def sentences(page: str) -> list[str]:
    text = re.sub(r"```.*?```", "\n\n", (ROOT / page).read_text(), flags=re.DOTALL)
    found = []
    for block in re.split(r"\n\s*\n|\n(?=[-|#])", text):
        found += re.split(r"(?<=[.:;!?])\s+(?=[A-Z`*\"])", " ".join(block.split()))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_each_promise_is_listed(page: str) -> None:
    promised = [sentence for sentence in sentences(page) if OF_ALL.search(sentence)]
    missing = [sentence for sentence in promised if not any(promise["says"] in sentence for promise in PROMISES)]
    assert promised and not missing


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise["says"])
def test_each_entry_is_of_a_sentence_and_of_tests_that_are_there(promise: dict[str, Any]) -> None:
    assert any(promise["says"] in sentence for page in PAGES for sentence in sentences(page))
    assert bool(promise["tests"]) != bool(promise.get("because"))
    for test in promise["tests"]:
        file, _, name = test.partition("::")
        module = ast.parse((ROOT / "tests" / file).read_text())
        assert name in [node.name for node in module.body if isinstance(node, ast.FunctionDef)], test
