"""The table of DeepSpeed acceptance cases: its rules, and the committed page."""

import ast
import importlib.util
import re
from types import ModuleType

import pytest
from paths import SUPPORT, TESTS


@pytest.fixture(scope="module")
def acceptance() -> ModuleType:
    spec = importlib.util.spec_from_file_location("acceptance_table", SUPPORT / "acceptance_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_row_names_tests_that_exist(acceptance: ModuleType) -> None:
    assert len(acceptance.rows()) == 52
    for row in acceptance.rows():
        for test in row["tests"]:
            file, name = re.fullmatch(r"(\w+/test_\w+\.py)::(test_\w+)(?:\[[^\[\]]+\])?", test).groups()
            if (TESTS / file).exists():
                functions = ast.parse((TESTS / file).read_text()).body
                assert name in {node.name for node in functions if isinstance(node, ast.FunctionDef)}, test


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ({"f.py::a[1]": "passed", "f.py::a[2]": "passed", "f.py::b[1]": "passed", "f.py::b[2]": "failed"}, "passed"),
        ({"f.py::a[1]": "passed", "f.py::a[2]": "failed", "f.py::b[1]": "passed"}, "failed"),
        ({"f.py::a": "passed", "f.py::b[1]": "not run: no disk"}, "not run: no disk"),
        ({"f.py::a": "passed", "f.py::b[2]": "passed"}, "not run: f.py::b[1] is missing"),
        ({"f.py::another": "passed", "f.py::b[1]": "passed"}, "not run: f.py::a is missing"),
    ],
)
def test_row_passes_if_all_its_tests_pass(acceptance: ModuleType, outcomes: dict[str, str], expected: str) -> None:
    assert acceptance.outcome_of_row({"tests": ["f.py::a", "f.py::b[1]"]}, outcomes) == expected


def test_table_matches_the_committed_runs(acceptance: ModuleType) -> None:
    runs = acceptance.recorded_runs()
    assert acceptance.TABLE.read_text() == acceptance.table(acceptance.rows(), runs)
    for run in runs:
        assert len(run["rows"]) == 52
        assert "failed" not in run["rows"].values()
