"""Test the wheel's content, standalone import and lazily imported public names."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE_DIR = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
FOLDERS = {folder: package.replace(".", "/") for package, folder in PACKAGE_DIR.items()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    subprocess.run(["git", "-C", str(ROOT), "checkout-index", "--all", f"--prefix={source}/"], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(source)], check=True, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


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
