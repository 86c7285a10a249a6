"""Where tests run: on a GPU where there is one, else the kernel in Triton's interpreter on CPU tensors."""

from __future__ import annotations

import os

import pytest
import torch

# Triton decides at its import, so this comes before any import of it; torch.cuda is also the HIP device.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    """Where the kernel's tensors lie."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def compiled_cpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Has CPU tensors stepped by PyTorch, although the kernel would run on them in the interpreter."""
    monkeypatch.setattr("adax_triton.backends._interpreting", lambda: False)
    return torch.device("cpu")


@pytest.fixture(params=["kernel", "cpu"])
def backend(request: pytest.FixtureRequest) -> torch.device:
    """The device whose tensors are stepped by the kernel, and that of those stepped by PyTorch on the CPU."""
    return request.getfixturevalue("device" if request.param == "kernel" else "compiled_cpu")
