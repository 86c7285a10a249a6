"""Test sdist, wheel, metadata, standalone import and lazy public names."""

import email
import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from paths import ROOT

import adax_triton

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE_DIR = PYPROJECT["tool"]["setuptools"]["package-dir"]
FOLDERS = {folder: package.replace(".", "/") for package, folder in PACKAGE_DIR.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files."""
    folder = tmp_path_factory.mktemp("tree") / "source"
    subprocess.run(["git", "-C", str(ROOT), "checkout-index", "--all", f"--prefix={folder}/"], check=True)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build a wheel or an sdist as pip does, offline."""
    program = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=source, capture_output=True)
    (built,) = folder.iterdir()
    return built


def contents(wheel: Path) -> dict[str, bytes]:
    """Return {path: content}; the list of files (RECORD) in sorted order."""
    with zipfile.ZipFile(wheel) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    return {
        name: b"\n".join(sorted(data.splitlines())) if name.endswith("/RECORD") else data
        for name, data in found.items()
    }


def test_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "SECURITY.md", "setup.py"} <= {
        path.name for path in unpacked.iterdir()
    }
    (tmp_path / "built").mkdir()
    rebuilt = build("wheel", unpacked, tmp_path / "built")
    assert rebuilt.name == wheel.name
    assert contents(rebuilt) == contents(wheel)


def test_twine_accepts_sdist_and_wheel(sdist: Path, wheel: Path) -> None:
    if importlib.util.find_spec("twine") is None:
        pytest.skip("twine is not installed; `make env` installs it")
    command = [sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_metadata_names_version_pythons_and_no_empty_url(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    assert metadata["Version"] == adax_triton.__version__
    assert metadata["License-Expression"] == PYPROJECT["project"]["license"]
    classifiers = metadata.get_all("Classifier", [])
    assert {f"Programming Language :: Python :: {version}" for version in ("3.11", "3.12")} < set(classifiers)
    assert "Typing :: Typed" in classifiers
    urls = [metadata.get("Home-page"), metadata.get("Download-URL"), *metadata.get_all("Project-URL", [])]
    assert all(re.search(r"https?://\S+$", url) for url in urls if url is not None), urls


def metadata_of(wheel: Path) -> Message:
    (name,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA")]
    return email.message_from_bytes(zipfile.ZipFile(wheel).read(name))


def test_changelog_and_citation_name_the_version() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", adax_triton.__version__)
    assert citation["license"] == PYPROJECT["project"]["license"]
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert [author["family-names"] for author in paper["authors"]] == ["Li", "Zhang", "Wang", "Luo"]
    assert paper["identifiers"][0]["value"] == "arXiv:2004.09740"
    versions = re.findall(r"^## \[(.+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert versions[0] == (adax_triton.__version__, str(citation["date-released"]))


def test_wheel_installs_into_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)

    def output(*command: str | Path) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        return done.stdout.strip()

    assert output(environment / "bin" / "adax-triton", "--version") == adax_triton.__version__
    assert output(python, "-c", "import adax_triton; print(adax_triton.__version__)") == adax_triton.__version__


def test_wheel_holds_exactly_the_tracked_modules(wheel: Path) -> None:
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", *FOLDERS], capture_output=True, text=True, check=True
    ).stdout.split()
    expected = {"adax_triton/py.typed"}
    for name in tracked:
        folder, _, path = name.partition("/")
        if path.endswith((".py", ".cpp", ".hpp")):
            expected.add(f"{FOLDERS[folder]}/{path}")
    assert expected > {
        "adax_triton/kernels/adax_step.cpp",
        "adax_triton/step/plan.py",
        "adax_triton/bench/step/measure.py",
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == expected


def test_wheel_has_licence_and_command(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "adax-triton = adax_triton.cli.main:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


def test_wheel_imports_without_triton_and_deepspeed(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        "import sys\n"
        "absent = ('triton', 'deepspeed', 'matplotlib', 'tqdm')\n"
        "class BlockingFinder:\n"
        "    def __init__(self, finder):\n"
        "        self.finder = finder\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        return None if name.split('.')[0] in absent else self.finder.find_spec(name, path, target)\n"
        "sys.meta_path[:] = map(BlockingFinder, sys.meta_path)\n"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import torch, adax_triton\n"
        f"assert adax_triton.__file__.startswith({str(tmp_path)!r})\n"
        "p = torch.ones(3, requires_grad=True); p.grad = torch.ones(3)\n"
        "adax_triton.AdaXW([p]).step(); print(float(p[0]))\n"
        "assert not set(absent) & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 0.99 < float(done.stdout) < 1.0


def run_python(program: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["bench", "--help"], ["bench", "stop"]], ids=" ".join)
def test_help_and_version_do_not_import_torch(words: list[str]) -> None:
    printed = run_python(
        "import sys\n"
        "from adax_triton.cli.main import main\n"
        "try:\n"
        f"    main({words})\n"
        "except SystemExit:\n"
        "    print('torch' in sys.modules)\n"
    )
    assert printed.splitlines()[-1] == "False"


def test_public_names_import_lazily() -> None:
    printed = run_python(
        "import adax_triton, sys\n"
        "assert 'torch' not in sys.modules and set(adax_triton.__all__) <= set(dir(adax_triton))\n"
        "assert not hasattr(adax_triton, 'AdaY')\n"
        "from adax_triton import *\n"
        "assert all(globals()[name] is getattr(adax_triton, name) for name in adax_triton.__all__)\n"
        "print(AdaX.__module__, adax_triton.update.quantization.GROUP)\n"
    )
    assert printed.split() == ["adax_triton.optimizers", "32"]
