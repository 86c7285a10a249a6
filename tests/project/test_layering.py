"""Test import layers, file and function sizes, and file names.

The tests parse the sources.
"""

import ast
import graphlib
from pathlib import Path

from paths import ROOT

TOP_LEVEL = ("kernels", "integrations", "bench")  # folders that are installed inside the package
FOLDERS = {"adax_triton": "adax_triton", **{folder: f"adax_triton.{folder}" for folder in TOP_LEVEL}}
FRAMEWORKS = {"deepspeed", "transformers", "accelerate", "lightning", "pytorch_lightning"}
# Top module -> top modules that it may import. Top modules are folders and files of adax_triton/, and TOP_LEVEL.
MAY_IMPORT = {
    "update": set(),
    "kernels": set(),
    "state": {"update"},
    "step": {"update", "kernels", "state"},
    "moment_optimizer": {"update", "state", "step"},
    "optimizers": {"state", "moment_optimizer"},
    "gradient_release": {"moment_optimizer"},
    "telemetry_loggers": {"step", "moment_optimizer"},
    "convert": {"update", "state", "optimizers"},
    "version": set(),
}
CORE = {*MAY_IMPORT, "adax_triton"}
MAY_IMPORT |= {
    "adax_triton": {*MAY_IMPORT},
    "integrations": CORE - {"kernels"},
    "bench": CORE | {"integrations"},
    "cli": CORE | {"integrations", "bench"},
}
# The core may import only the table layout at the top of a file: the other kernel modules import Triton.
EAGER_KERNELS = {"adax_triton.kernels.tables"}


def sources() -> list[tuple[str, Path]]:
    modules = []
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            names = path.relative_to(ROOT / folder).with_suffix("").parts
            modules.append((".".join([package, *(name for name in names if name != "__init__")]), path))
    return modules


def top_module(module: str) -> str:
    """Return the first name after `adax_triton` of a module."""
    return module.split(".")[1] if "." in module else module


def imported_names(path: Path, module: str, top_level_only: bool = False) -> set[str]:
    """Return the absolute names that a file imports.

    Imports in functions count too, unless `top_level_only`.
    """
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    names = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            origin = f"{base}.{node.module}".rstrip(".") if node.level and node.module else node.module or base
            # `from package import module` imports the module.
            members = [f"{origin}.{alias.name}" for alias in node.names]
            names |= {name if is_module(name) else origin for name in members}
    return names


def is_module(name: str) -> bool:
    top, *below = name.split(".")[1:] or [""]
    path = ROOT.joinpath(*(() if top in TOP_LEVEL else ("adax_triton",)), top, *below)
    return path.is_dir() or path.with_suffix(".py").exists()


def test_modules_import_only_modules_of_lower_layers() -> None:
    for module, path in sources():
        top = top_module(module)
        imported = {top_module(name) for name in imported_names(path, module) if name.split(".")[0] == "adax_triton"}
        assert imported <= {top, *MAY_IMPORT[top]}, f"{module} may import only {sorted(MAY_IMPORT[top])}"


def test_every_top_module_has_a_rule() -> None:
    assert {top_module(module) for module, _ in sources()} == set(MAY_IMPORT)


def test_imports_have_no_cycle() -> None:
    graph = {
        module: {name for name in imported_names(path, module, top_level_only=True) if name.startswith("adax_triton")}
        for module, path in sources()
        if module != "adax_triton"
    }
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_core_imports_no_kernel_at_the_top_of_a_file() -> None:
    for module, path in sources():
        eager = {
            name for name in imported_names(path, module, top_level_only=True) if name.startswith("adax_triton.kernels")
        }
        if top_module(module) not in (*TOP_LEVEL, "cli"):
            assert {name for name in eager if name not in EAGER_KERNELS} == set(), module


def test_only_integrations_import_frameworks() -> None:
    for module, path in sources():
        roots = {name.split(".")[0] for name in imported_names(path, module)}
        if top_module(module) not in ("integrations", "bench"):
            assert not roots & FRAMEWORKS, module
        if top_module(module) not in ("kernels", "bench"):
            assert "triton" not in roots, module


def test_every_form_of_import_is_found() -> None:
    path = ROOT / "adax_triton" / "step" / "backend.py"
    names = {"os", "torch", "adax_triton.step.cpu_kernel", "adax_triton.kernels.launch"}
    assert names <= imported_names(path, "adax_triton.step.backend")
    path = ROOT / "adax_triton" / "cli" / "main.py"
    assert {"adax_triton.bench.step.cpu", "adax_triton.cli.doctor"} <= imported_names(path, "adax_triton.cli.main")


def python_files() -> list[Path]:
    folders = ("adax_triton", "kernels", "integrations", "bench", "tests", "examples")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def takes_named_options(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    options = node.args.kwarg
    return options is None or (options.annotation is not None and ast.unparse(options.annotation).startswith("Unpack["))


def test_sizes_and_names() -> None:
    for path in python_files():
        text = path.read_text()
        assert len(text.splitlines()) <= 500, f"{path} has more than 500 lines; split it"
        assert path.stem not in {"utils", "common", "helpers", "misc", "base", "config"}, (
            f"{path}: name the file by its content"
        )
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                where = f"{path}: {node.name}"
                assert not body or node.end_lineno - body[0].lineno < 60, f"{where} has more than 60 lines; split it"
                assert path.is_relative_to(ROOT / "tests") or takes_named_options(node), (
                    f"{where} has **kwargs; name its arguments"
                )
