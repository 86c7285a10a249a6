"""Compare docs/architecture.md with the source tree: modules, layers, imports, function names."""

from __future__ import annotations

import ast
import importlib.util
import re

import pytest
from paths import ROOT, TESTS

PAGE = (ROOT / "docs" / "architecture.md").read_text()
LAYERS = {
    name: int(layer)
    for layer, names in re.findall(r"^layer (\d+) +(.+)$", PAGE, re.MULTILINE)
    for name in names.split()
}
ROWS = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", PAGE, re.MULTILINE))


@pytest.fixture(scope="module")
def contract() -> dict[str, set[str]]:
    """Return the modules of test_layering.py, and the modules that each may import."""
    spec = importlib.util.spec_from_file_location("test_layering", TESTS / "project" / "test_layering.py")
    assert spec is not None and spec.loader is not None
    layering = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layering)
    return {
        name: allowed - {"adax_triton"}
        for name, allowed in layering.MAY_IMPORT.items()
        if name not in ("version", "adax_triton")
    }


def modules_of_the_tree() -> set[str]:
    inside = {
        path.stem
        for path in (ROOT / "adax_triton").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    return inside - {"__init__", "version"} | {"kernels", "integrations", "bench"}


def test_drawing_and_table_show_every_module_of_the_tree() -> None:
    assert set(LAYERS) == set(ROWS) == modules_of_the_tree()


def test_table_states_the_contract(contract: dict[str, set[str]]) -> None:
    for name, allowed in contract.items():
        named = set(re.findall(r"`(\w+)`", ROWS[name]))
        above = {other for other in ROWS if list(ROWS).index(other) < list(ROWS).index(name)}
        expected = (
            above - named
            if ROWS[name].startswith("all of the above")
            else set(ROWS)
            if ROWS[name].startswith("all")
            else named
        )
        assert allowed - {"version", name} == expected - {name}, name


def test_modules_import_lower_layers_only(contract: dict[str, set[str]]) -> None:
    for name, allowed in contract.items():
        assert all(LAYERS[other] < LAYERS[name] for other in allowed if other in LAYERS), name


@pytest.mark.parametrize("name", re.findall(r"`((?:step|state|update|kernels)/\w+\.py):([\w.]+)`", PAGE), ids=":".join)
def test_functions_of_the_page_exist(name: tuple[str, str]) -> None:
    path, function = name
    folder = ROOT if path.startswith("kernels/") else ROOT / "adax_triton"
    body: list[ast.stmt] = ast.parse((folder / path).read_text()).body
    for part in function.split("."):
        (found,) = [node for node in body if getattr(node, "name", None) == part]
        body = getattr(found, "body", [])


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:\w+/)*\w+\.(?:py|cpp|hpp))[:`]", PAGE))))
def test_files_of_the_page_exist(path: str) -> None:
    assert (ROOT / path).exists() or (ROOT / "adax_triton" / path).exists()
