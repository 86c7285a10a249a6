"""Cache kernel audit results until a source file or compiler version changes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT, SUPPORT

# Inputs of the audits, in addition to Triton and PyTorch: kernels import nothing else of the package.
SOURCES = [
    *sorted((ROOT / "kernels").glob("*.py")),
    ROOT / "bench" / "launch_variants" / "compile.py",
    SUPPORT / "code_audit.py",
    SUPPORT / "small_kernels_audit.py",
]


def audit_facts(config: pytest.Config, script: Path, folder: Path, sources: Iterable[Path] = SOURCES) -> Any:
    """Return the JSON output of a script, cached by pytest.

    The result of a full audit (AUDIT=all) is also used by runs that need a few variants.

    Args:
        config: of the session.
        script: prints JSON; runs without Triton's interpreter.
        folder: an empty working folder.
        sources: files that invalidate the cache.
    """
    key = {"sources": digest(sources), "all": os.environ.get("AUDIT") == "all"}
    cache = getattr(config, "cache", None)  # absent with -p no:cacheprovider
    kept = None if cache is None else cache.get(f"audit/{script.stem}", None)
    if kept and kept["key"] in (key, {**key, "all": True}):
        return kept["facts"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    done = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, env=environment, cwd=folder, check=False)
    assert done.returncode == 0, "see the captured stderr"
    facts = json.loads(done.stdout)
    if cache is not None:
        cache.set(f"audit/{script.stem}", {"key": key, "facts": facts})
    return facts


def digest(sources: Iterable[Path]) -> str:
    """Return a hash of the files and of the compiler versions."""
    versions = [importlib.metadata.version(package) for package in ("triton", "torch")]
    found = hashlib.sha256(" ".join(versions).encode())
    for source in sources:
        found.update(source.name.encode() + source.read_bytes())
    return found.hexdigest()
