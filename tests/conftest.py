"""Where tests run: on a GPU where there is one, else the kernel in Triton's interpreter on CPU tensors."""

from __future__ import annotations

import gc
import importlib
import json
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import SUPPORT, TESTS
from ranks import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The functions of the package that launch a kernel.
LAUNCHERS = {
    "adax_step": "adax_step",
    "coefficients": "prepare_step",
    "grad_norm": "grad_norm_partials",
    "telemetry": "sum_rows",
}

# Seconds of each file of tests on two quiet cores, by `make durations`.
DURATIONS = SUPPORT / "durations.json"
# `make quick`: files that take no longer, and those of the update, of its formats, of the contract and of refusals.
QUICK_S = 3.0
ESSENTIAL = {f"test_{name}.py" for name in ("kernel", "quantization", "rounding", "optimizer_contract", "bad_input")}

# Triton decides at its import, so this comes before any import of it; torch.cuda is also the HIP device.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A pool of compile workers takes longer to start than what tests compile; each process that compiles would have one.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what the Makefile passes."""
    parser.addoption("--quick", action="store_true", help="run the tests that take a minute together")
    parser.addoption("--record-durations", action="store_true", help="write tests/support/durations.json")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give workers the files that take longest first, so that none is left when all others have ended; leave out tests.

    With `--quick`, those of files that take long. With the variable ONLY_GPU_TESTS, what a CPU shows as well: time on a
    GPU machine is short.
    """
    seconds: dict[str, float] = json.loads(DURATIONS.read_text())
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: -seconds.get(in_tests(item.path), QUICK_S))
    chosen, others = [], []
    for item in items:
        short = item.path.name in ESSENTIAL or seconds.get(in_tests(item.path), QUICK_S) <= QUICK_S
        left_out = config.getoption("quick", False) and not short
        left_out |= bool(os.environ.get("ONLY_GPU_TESTS")) and not needs_gpu(item)
        (others if left_out else chosen).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


def in_tests(path: str | Path) -> str:
    return Path(os.path.abspath(path)).relative_to(TESTS).as_posix()


def pytest_collection_finish() -> None:
    """Have garbage be looked for among what tests make, not among what was imported."""
    gc.freeze()


def needs_gpu(item: pytest.Item) -> bool:
    fixtures = getattr(item, "fixturenames", ())
    params = item.callspec.params if hasattr(item, "callspec") else {}
    on_gpu = bool({"device", "backend"} & {*fixtures}) or item.get_closest_marker("gpu") is not None
    return on_gpu and not (params.get("backend") == "cpu" or "native_cpu" in fixtures)


class DurationFile:
    """Writes the seconds that each file takes, all its tests together."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[in_tests(report.fspath)] += report.duration

    def pytest_sessionfinish(self) -> None:
        found = {name: round(self._seconds[name], 1) for name in sorted(self._seconds)}
        DURATIONS.write_text(json.dumps(found, indent=1) + "\n")


class FailureFile:
    """Shows each failure as soon as it happens, and appends it to a file: a run that is killed loses none.

    Args:
        config: of the session.
        path: the file.
    """

    def __init__(self, config: pytest.Config, path: str) -> None:
        self._config, self._path = config, path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._keep(report, f"FAILED {report.nodeid} ({report.when})")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._keep(report, f"NOT COLLECTED {report.nodeid}")

    def _keep(self, report: pytest.TestReport | pytest.CollectReport, title: str) -> None:
        if report.failed:
            text = f"{title}\n{report.longreprtext}\n"
            self._config.get_terminal_writer().write(f"\n{text}", flush=True)
            with open(self._path, "a") as file:
                file.write(text)


def pytest_configure(config: pytest.Config) -> None:
    """Keep failures in the file that the variable FAILURES names, and durations in theirs."""
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist reports to the process that has one
        return
    if path := os.environ.get("FAILURES"):
        config.pluginmanager.register(FailureFile(config, path))
    if config.getoption("record_durations", False):
        config.pluginmanager.register(DurationFile())


@pytest.fixture
def device() -> torch.device:
    """Where the kernel's tensors lie."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def native_cpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Step CPU tensors by the native kernel, although Triton's would run on them in the interpreter."""
    monkeypatch.setattr("adax_triton.step.backend._interpreting", lambda: False)
    return torch.device("cpu")


@pytest.fixture
def reference_cpu(native_cpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Step CPU tensors by the reference formula, as without a C++ compiler."""
    monkeypatch.setattr("adax_triton.step.launch.native_kernel", lambda variant: None)
    return native_cpu


@pytest.fixture(params=["kernel", "cpu"])
def backend(request: pytest.FixtureRequest) -> torch.device:
    """The device whose tensors Triton's kernel steps, and the CPU, whose tensors the native kernel steps."""
    return request.getfixturevalue("device" if request.param == "kernel" else "native_cpu")


class Recording(TorchDispatchMode):
    """The kernel launches within a block and the tensor operations between them, to be done again, in order.

    As in a CUDA graph, operations write the same memory each time, and no Python runs between them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self._entered = self._launching = False
        for module, name in LAUNCHERS.items():
            owner = importlib.import_module(f"adax_triton.kernels.{module}")
            monkeypatch.setattr(owner, name, self._recorded(getattr(owner, name)))

    def _recorded(self, launch: Callable[..., None]) -> Callable[..., None]:
        def record(*args: Any) -> None:
            if self._entered:
                self._calls.append((launch, args, {}, None))
            self._launching = True  # what the interpreter does is part of the launch
            launch(*args)
            self._launching = False

        return record

    def __enter__(self) -> Recording:
        self._entered = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._entered = False
        super().__exit__(*error)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self._launching:
            self._calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for function, args, kwargs, results in self._calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(new, Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


@pytest.fixture
def launchers() -> dict[str, str]:
    """The functions that launch a kernel, by module of adax_triton.kernels."""
    return LAUNCHERS


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    """Stands in for a CUDA graph where kernels are interpreted."""
    return Recording(monkeypatch)


@pytest.fixture(scope="session")
def launch_deepspeed() -> Callable[..., dict[str, Any]]:
    """Runs cases of deepspeed_worker.py or another worker, with files in a folder, and returns their results."""
    return launch


def launch(
    folder: Path,
    cases: list[dict[str, Any]],
    worker: str = "deepspeed_worker.py",
    world_size: int = 2,
    interpreted: bool = False,
) -> dict[str, Any]:
    """Run a worker on some ranks, with the kernel in the interpreter or not, and return its results.

    No process outlives the call.
    """
    (folder / "cases.json").write_text(json.dumps(cases))
    arguments = [str(folder / name) for name in ("cases.json", "results.json")]
    interpret = {"TRITON_INTERPRET": str(int(interpreted))}
    run_ranks(SUPPORT / worker, arguments, world_size, folder, interpret, folder / "ranks.log")
    return json.loads((folder / "results.json").read_text())
