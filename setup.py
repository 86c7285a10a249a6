"""List every folder with an `__init__.py` as a package.

The folders lie below the roots of `package-dir` in pyproject.toml. setuptools cannot combine `package-dir` with
automatic discovery, and a folder missing from a hand-written list would be missing from the wheel.
"""

import tomllib
from pathlib import Path

from setuptools import find_packages, setup

PYPROJECT = tomllib.loads(Path(__file__).with_name("pyproject.toml").read_text())
ROOTS = PYPROJECT["tool"]["setuptools"]["package-dir"]

setup(
    packages=[
        name for root, folder in ROOTS.items() for name in (root, *(f"{root}.{sub}" for sub in find_packages(folder)))
    ]
)
