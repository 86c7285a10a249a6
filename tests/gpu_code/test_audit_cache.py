"""Audit results are cached by a hash of their sources."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from audit_cache import SOURCES, audit_facts

SCRIPT = """
import os
from pathlib import Path
runs = Path(__file__).with_name("runs")
runs.write_text(runs.read_text() + "r" if runs.exists() else "r")
assert "TRITON_INTERPRET" not in os.environ
print(len(runs.read_text()))
"""


class Cache(dict[str, Any]):
    set = dict.__setitem__


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prints how often it was run."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("AUDIT", raising=False)
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_script_runs_again_when_a_source_or_a_version_has_changed(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, source = SimpleNamespace(cache=Cache()), tmp_path / "kernel.py"
    source.write_text("first")
    runs = [audit_facts(config, script, tmp_path, [source]) for _ in range(2)]
    source.write_text("second")
    runs += [audit_facts(config, script, tmp_path, [source]) for _ in range(2)]
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0")
    runs += [audit_facts(config, script, tmp_path, [source]) for _ in range(2)]
    assert runs == [1, 1, 2, 2, 3, 3]


def test_full_audit_is_used_for_partial_requests_but_not_the_reverse(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SimpleNamespace(cache=Cache())
    assert audit_facts(config, script, tmp_path, []) == 1
    monkeypatch.setenv("AUDIT", "all")
    assert [audit_facts(config, script, tmp_path, []) for _ in range(2)] == [2, 2]
    monkeypatch.delenv("AUDIT")
    assert audit_facts(config, script, tmp_path, []) == 2


def test_nothing_is_cached_without_a_cache_or_after_a_failure(script: Path, tmp_path: Path) -> None:
    assert [audit_facts(SimpleNamespace(), script, tmp_path, []) for _ in range(2)] == [1, 2]
    config = SimpleNamespace(cache=Cache())
    script.write_text("import sys; print(1); sys.exit(1)")
    with pytest.raises(AssertionError, match="see the captured stderr"):
        audit_facts(config, script, tmp_path, [])
    assert config.cache == {}


def test_sources_are_all_kernels_and_the_audit_scripts() -> None:
    names = {path.name for path in SOURCES}
    assert {"adax_step.py", "launch.py", "variants.py", "compile.py", "code_audit.py"} < names
    assert all(path.exists() for path in SOURCES)
