"""docs/architecture.md against the tree: rooms, floors, imports, and the functions that it names."""

from __future__ import annotations

import ast
import importlib.util
import re

import pytest
from paths import ROOT, TESTS

PAGE = (ROOT / "docs" / "architecture.md").read_text()
FLOORS = {
    room: int(floor)
    for floor, rooms in re.findall(r"^floor (\d+) +(.+)$", PAGE, re.MULTILINE)
    for room in rooms.split()
}
ROWS = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", PAGE, re.MULTILINE))


@pytest.fixture(scope="module")
def contract() -> dict[str, set[str]]:
    """The rooms of test_layering.py, and what each may import."""
    spec = importlib.util.spec_from_file_location("test_layering", TESTS / "project" / "test_layering.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {
        room: allowed - {"adax_triton"}
        for room, allowed in module.ROOMS.items()
        if room not in ("version", "adax_triton")
    }


def rooms_of_the_tree() -> set[str]:
    inside = {
        path.stem
        for path in (ROOT / "adax_triton").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    return inside - {"__init__", "version"} | {"kernels", "integrations", "bench"}


def test_drawing_and_table_show_every_room_of_the_tree() -> None:
    assert set(FLOORS) == set(ROWS) == rooms_of_the_tree()


def test_table_states_the_contract(contract: dict[str, set[str]]) -> None:
    for room, allowed in contract.items():
        named = set(re.findall(r"`(\w+)`", ROWS[room]))
        above = {other for other in ROWS if list(ROWS).index(other) < list(ROWS).index(room)}
        expected = (
            above - named
            if ROWS[room].startswith("all of the above")
            else set(ROWS)
            if ROWS[room].startswith("all")
            else named
        )
        assert allowed - {"version", room} == expected - {room}, room


def test_rooms_import_lower_floors_only(contract: dict[str, set[str]]) -> None:
    for room, allowed in contract.items():
        assert all(FLOORS[other] < FLOORS[room] for other in allowed if other in FLOORS), room


@pytest.mark.parametrize("name", re.findall(r"`((?:step|state|update|kernels)/\w+\.py):([\w.]+)`", PAGE), ids=":".join)
def test_functions_on_the_way_of_a_gradient_exist(name: tuple[str, str]) -> None:
    path, function = name
    folder = ROOT if path.startswith("kernels/") else ROOT / "adax_triton"
    body: list[ast.stmt] = ast.parse((folder / path).read_text()).body
    for part in function.split("."):
        (found,) = [node for node in body if getattr(node, "name", None) == part]
        body = getattr(found, "body", [])


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:\w+/)*\w+\.(?:py|cpp|hpp))[:`]", PAGE))))
def test_files_of_the_page_exist(path: str) -> None:
    assert (ROOT / path).exists() or (ROOT / "adax_triton" / path).exists()
