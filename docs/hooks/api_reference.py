"""Prepare the package's docstrings for the API reference.

mkdocstrings reads sources, not objects. This module adds to the sources:

- a copy of the package as pip installs it, because `kernels/` and `integrations/` are top-level folders;
- the options behind `**options: Unpack[SharedOptions]`, with their types and defaults;
- one entry for each argument of `states, seed: see AdaX`, with the text of `AdaX`;
- the fields of named tuples, with their descriptions;
- equations as MathML.

A public name without a docstring, or missing from docs/api.md, stops the build.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "build" / "documented"  # mkdocs.yml names it in `paths`

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(ROOT / "bench"))
from gpu_check import stage  # noqa: E402
from mathml import display_block, inline_equation  # noqa: E402

_PUBLIC_MODULES = ("", "integrations.deepspeed", "integrations.huggingface")
_SHARED_ARGUMENT = re.compile(r"see `(\w+)`\.?( Default: .*)?")
_DEFAULT = re.compile(r"\s+Default:\s.*", re.DOTALL)
_MATH_BLOCK = re.compile(r"^\.\. math::\n((?:[ ]+.*\n?|\n(?=[ ]))+)", re.MULTILINE)
_MATH_ROLE = re.compile(r":math:`([^`]+)`")


def copy_package() -> None:
    """Copy the package to `build/documented` as pip installs it."""
    shutil.rmtree(COPY, ignore_errors=True)
    stage(COPY, wheels=None)


class CompleteDocstrings(griffe.Extension):
    """Completes the docstrings of the package as the module describes."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Complete the docstrings of a loaded package and check them."""
        if pkg.name != "adax_triton":
            return
        classes = [found for found in _objects(pkg) if isinstance(found, griffe.Class)]
        by_name = {found.name: found for found in classes}
        for found in classes:
            _list_shared_options(found, by_name["MomentOptimizer"])
        for found in _objects(pkg):
            if found.docstring is not None:
                found.docstring.value = _with_math(_with_single_arguments(found.docstring.value, by_name))
        for found in classes:
            if any(str(base) == "NamedTuple" for base in found.bases):
                _describe_fields(found)
        check_docstrings(pkg)


def public_names(pkg: griffe.Module) -> list[str]:
    """Return the full names that the package and its integrations export."""
    names = []
    for module in _PUBLIC_MODULES:
        owner = pkg[module] if module else pkg
        names += [f"{owner.path}.{name}" for name in map(str, owner.exports or ())]
    return names


def check_docstrings(pkg: griffe.Module) -> None:
    """Raise if a public name or method has no docstring."""
    missing = []
    for name in public_names(pkg):
        found = pkg[name.removeprefix("adax_triton.")]
        while isinstance(found, griffe.Alias):
            found = pkg[found.target_path.removeprefix("adax_triton.")]
        members = [found]
        if isinstance(found, griffe.Class):
            members += [member for member in (*found.members.values(), *_inherited(found, pkg)) if _is_method(member)]
        missing += [member.path for member in members if member.docstring is None]
    if missing:
        raise PluginError(f"public names without a docstring: {', '.join(sorted(set(missing)))}")


def _inherited(found: griffe.Class, pkg: griffe.Module) -> list[griffe.Object | griffe.Alias]:
    optimizer = pkg["moment_optimizer.MomentOptimizer"]
    return [*optimizer.members.values()] if found.module.path == "adax_triton.optimizers" else []


def _is_method(member: griffe.Object | griffe.Alias) -> bool:
    """Return whether a member is a public method or property.

    The docstring of the class describes other attributes.
    """
    is_method = isinstance(member, griffe.Function) or "property" in member.labels
    return is_method and not member.name.startswith("_")


def _objects(owner: griffe.Object) -> Iterator[griffe.Object]:
    for member in owner.members.values():
        if isinstance(member, griffe.Object):
            yield member
            yield from _objects(member)


def _list_shared_options(found: griffe.Class, base: griffe.Class) -> None:
    """Replace `**options` of a constructor with the shared options.

    `__signature__` has the same options.
    """
    init = found.members.get("__init__")
    if not isinstance(init, griffe.Function) or "options" not in init.parameters:
        return
    shared = [parameter for parameter in base["__init__"].parameters if parameter.name in _shared_names(base)]
    kept = [parameter for parameter in init.parameters if parameter.name != "options"]
    init.parameters = griffe.Parameters(*kept, *shared)


def _shared_names(base: griffe.Class) -> set[str]:
    return set(base.package["state.keywords.SharedOptions"].members)


def _with_single_arguments(text: str, by_name: dict[str, griffe.Class]) -> str:
    """Give each argument its own entry and text.

    Splits `a, b: text`, and replaces "see `AdaX`" with the text of AdaX.
    """
    head, heading, rest = text.partition("Args:\n")
    if not heading:
        return text
    lines = []
    for names, entry in _entries(rest):
        source = _SHARED_ARGUMENT.fullmatch(entry.strip())
        for name in names.split(", ") if names else []:
            lines.append(f"    {name}: {_resolved(by_name, source, name) or entry}")
        if not names:
            lines.append(entry)
    return head + heading + "\n".join(lines)


def _entries(text: str) -> Iterator[tuple[str, str]]:
    """Yield (names, text) for each argument, then ("", the rest)."""
    lines = text.split("\n")
    index = 0
    while index < len(lines) and (found := re.match(r"    ([\w, ]+): ?(.*)$", lines[index])):
        entry = [found[2]]
        index += 1
        while index < len(lines) and lines[index].startswith("        "):
            entry.append(lines[index])
            index += 1
        yield found[1], "\n".join(entry)
    yield "", "\n".join(lines[index:])


def _resolved(by_name: dict[str, griffe.Class], source: re.Match[str] | None, name: str) -> str:
    """Return an argument's text in the class that "see `AdaX`" names.

    A default next to the reference replaces the default of that class.
    """
    if source is None or source[1] not in by_name:
        return ""
    docstring = by_name[source[1]].docstring
    entries = _entries(docstring.value.partition("Args:\n")[2]) if docstring else ()
    for names, entry in entries:
        if name in names.split(", "):
            text = _resolved(by_name, _SHARED_ARGUMENT.fullmatch(entry.strip()), name) or entry
            return _DEFAULT.sub("", text) + source[2] if source[2] else text
    raise PluginError(f"{source[1]} does not describe the argument {name!r}")


def _with_math(text: str) -> str:
    text = _MATH_BLOCK.sub(lambda block: f"\n{display_block(block[1])}\n\n", text)
    return _MATH_ROLE.sub(lambda equation: inline_equation(equation[1]), text)


def _describe_fields(found: griffe.Class) -> None:
    """Describe each field by its docstring line or its comment."""
    source = Path(str(found.filepath)).read_text().split("\n")
    text = found.docstring.value if found.docstring else ""
    for name, field in found.members.items():
        if not isinstance(field, griffe.Attribute) or field.docstring is not None:
            continue
        line = re.search(rf"^{name}: (.*(?:\n[ ]+.*)*)\n?", text, re.MULTILINE)
        comment = re.search(r"  # (.*)$", source[(field.lineno or 1) - 1])
        if line:
            text = text.replace(line[0], "")
            field.docstring = griffe.Docstring(" ".join(line[1].split()), parent=field)
        elif comment:
            field.docstring = griffe.Docstring(comment[1], parent=field)
    if found.docstring:
        found.docstring.value = text.strip()


def on_startup(**kwargs: Any) -> None:
    """Copy the package before mkdocstrings lists the folders that exist."""
    copy_package()


def on_pre_build(**kwargs: Any) -> None:
    """Copy the package again, because `mkdocs serve` builds after each change."""
    copy_package()


def on_page_markdown(markdown: str, *, page: Any, **kwargs: Any) -> str:
    """Raise if docs/api.md leaves out a public name."""
    if page.file.src_uri == "api.md":
        listed = set(re.findall(r"^::: (\S+)$", markdown, re.MULTILINE))
        missing = set(public_names(load())) - listed
        if missing:
            raise PluginError(f"docs/api.md leaves out {', '.join(sorted(missing))}")
    return markdown


def load() -> griffe.Module:
    """Return the package with completed docstrings."""
    options: dict[str, Any] = {"search_paths": [COPY], "try_relative_path": False, "docstring_parser": "google"}
    loaded = griffe.load("adax_triton", extensions=griffe.Extensions(CompleteDocstrings()), **options)
    assert isinstance(loaded, griffe.Module)
    return loaded
