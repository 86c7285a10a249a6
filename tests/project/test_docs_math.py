"""Test the equations, API reference and options table of the documentation."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import xml.etree.ElementTree as ElementTree
from types import ModuleType

import pytest
from paths import ROOT

import adax_triton

pytest.importorskip("latex2mathml")
pytest.importorskip("mkdocs")
griffe = pytest.importorskip("griffe")


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "hooks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def mathml() -> ModuleType:
    return hook("mathml")


@pytest.fixture(scope="module")
def api_reference(mathml: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    module = hook("api_reference")
    module.COPY = tmp_path_factory.mktemp("documented")
    module.copy_package()
    return module


def tags(math: str) -> list[str]:
    return [element.tag.partition("}")[2] for element in ElementTree.fromstring(math).iter()]


def test_inline_equation_becomes_mathml(mathml: ModuleType) -> None:
    text = mathml.with_mathml(r"The weight $`w_t = \frac{1}{t}`$ falls, and `$x$` is code.")
    before, found, after = text.partition("<math")
    assert before == "The weight <span>" and after.endswith("</math></span> falls, and `$x$` is code.")
    math = found + after.partition("</math>")[0] + "</math>"
    assert {"msub", "mfrac"} <= set(tags(math))
    assert 'display="inline"' in math


def test_block_becomes_a_display_equation(mathml: ModuleType) -> None:
    text = mathml.with_mathml("before\n\n```math\na &= b \\\\\nc &= d\n```\nafter")
    before, block, after = text.partition('<div class="math" tabindex="0">')
    assert before == "before\n\n\n" and block
    math, _, rest = after.partition("</div>")
    assert rest == "\n\nafter"  # Markdown ends an HTML block at an empty line
    assert tags(math).count("mtr") == 2
    assert 'display="block"' in math and "&<" not in math


def test_other_code_blocks_stay(mathml: ModuleType) -> None:
    page = "````text\n```math\nx\n```\n````\n\n```python\ny = '$`z`$'\n```\n"
    assert mathml.with_mathml(page) == page


def test_equations_of_all_pages_are_understood(mathml: ModuleType) -> None:
    for path in (ROOT / "docs").rglob("*.md"):
        for part in mathml.with_mathml(path.read_text()).split("<math")[1:]:
            math = "<math" + part.partition("</math>")[0] + "</math>"
            assert "\\" not in "".join(ElementTree.fromstring(math).itertext()), f"{path.name}: {math}"


@pytest.mark.parametrize("name", ["AdaX", "AdaXW", "Adam", "AdamW"])
def test_reference_has_the_signature_of_the_class(api_reference: ModuleType, name: str) -> None:
    documented = api_reference.load()[f"optimizers.{name}"]
    actual = inspect.signature(getattr(adax_triton, name))
    assert [parameter.name for parameter in documented.parameters][1:] == list(actual.parameters)
    (arguments,) = [part for part in documented.docstring.parsed if part.kind is griffe.DocstringSectionKind.parameters]
    assert {entry.name for entry in arguments.value} == set(actual.parameters)
    assert not [entry.name for entry in arguments.value if entry.description.startswith("see ")]


def test_missing_docstring_is_refused(api_reference: ModuleType) -> None:
    package = api_reference.load()
    assert set(api_reference.public_names(package)) > {f"adax_triton.{name}" for name in adax_triton.__all__}
    package["gradient_release.GradientRelease.remove"].docstring = None
    with pytest.raises(Exception, match=r"without a docstring: adax_triton\.gradient_release\.GradientRelease\.remove"):
        api_reference.check_docstrings(package)


def test_options_table_is_current(api_reference: ModuleType) -> None:
    options_table = hook("options_table")
    page = options_table.PAGE.read_text()
    assert options_table.updated(page) == page
