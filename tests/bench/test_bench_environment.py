"""Environment of a result: commit with and without git, versions, driver."""

import subprocess
from pathlib import Path

import pytest
import torch
from adax_triton.bench.harness import environment


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    return subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "checkout"
    for name in ("bench/results", "kernels"):
        (folder / name).mkdir(parents=True)
    for name in ("bench/results/a.json", "kernels/a.py", "README.md"):
        (folder / name).write_text("1")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message=all")
    monkeypatch.delenv("COMMIT", raising=False)
    monkeypatch.setenv("CHECKOUT", str(folder))
    return folder


def test_commit_is_marked_dirty_if_code_differs(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "--short=12", "HEAD").strip()
    assert environment.commit() == head
    (checkout / "bench" / "results" / "a.json").write_text("2")
    (checkout / "README.md").write_text("2")
    assert environment.commit() == head
    (checkout / "kernels" / "a.py").write_text("2")
    assert environment.commit() == f"{head}-dirty"


def test_commit_comes_from_the_environment_or_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKOUT", str(tmp_path))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("COMMIT", raising=False)
    assert environment.commit() == "unknown"
    monkeypatch.setenv("COMMIT", "abc123")
    assert environment.commit() == "abc123"
    assert environment.describe(torch.device("cpu"))["commit"] == "abc123"


def test_versions_match_installed_packages() -> None:
    assert environment.versions(["torch", "no_such_package"]) == {"torch": torch.__version__}


def test_driver_version_comes_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "hip", None)
    assert environment.driver() is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.159.04\n")
    program.chmod(0o755)
    assert environment.driver() == "580.159.04"
