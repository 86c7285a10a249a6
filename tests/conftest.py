"""Shared fixtures; without a GPU the Triton kernels run in the interpreter."""

from __future__ import annotations

import gc
import importlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import SUPPORT, TESTS
from ranks import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Module of adax_triton.kernels -> function that launches its kernel.
LAUNCHERS = {
    "adax_step": "adax_step",
    "prepare_step": "prepare_step",
    "grad_norm": "grad_norm_partials",
    "telemetry": "sum_rows",
}

# `make durations` writes the seconds of each test file, measured on two idle cores.
DURATIONS = SUPPORT / "durations.json"
# `make quick` runs files that take at most QUICK_S seconds, and ESSENTIAL files.
QUICK_S = 3.0
ESSENTIAL = {f"test_{name}.py" for name in ("kernel", "quantization", "rounding", "optimizer_contract", "bad_input")}

# Without a GPU, interpret Triton kernels. Triton reads this variable at import. On ROCm torch.cuda reports HIP devices.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Each process that compiles would start a worker pool, which takes longer than the compilations.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the Makefile."""
    parser.addoption("--quick", action="store_true", help="run tests that take a minute in total")
    parser.addoption("--record-durations", action="store_true", help="write tests/support/durations.json")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the slowest files first under pytest-xdist, and deselect tests.

    `--quick` deselects slow files. The variable ONLY_GPU_TESTS deselects tests that give the same result on a CPU,
    because time on a GPU machine is short.
    """
    seconds: dict[str, float] = json.loads(DURATIONS.read_text())
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: -seconds.get(relative_to_tests(item.path), QUICK_S))
    chosen, others = [], []
    for item in items:
        short = item.path.name in ESSENTIAL or seconds.get(relative_to_tests(item.path), QUICK_S) <= QUICK_S
        left_out = config.getoption("quick", False) and not short
        left_out |= bool(os.environ.get("ONLY_GPU_TESTS")) and not needs_gpu(item)
        (others if left_out else chosen).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


def relative_to_tests(path: str | Path) -> str:
    return Path(os.path.abspath(path)).relative_to(TESTS).as_posix()


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collection, which is then faster."""
    gc.freeze()


def needs_gpu(item: pytest.Item) -> bool:
    fixtures = getattr(item, "fixturenames", ())
    params = item.callspec.params if hasattr(item, "callspec") else {}
    on_gpu = bool({"device", "backend"} & {*fixtures}) or item.get_closest_marker("gpu") is not None
    return on_gpu and not (params.get("backend") == "cpu" or "native_cpu" in fixtures)


class DurationFile:
    """Writes the total seconds of each test file."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[relative_to_tests(report.fspath)] += report.duration

    def pytest_sessionfinish(self) -> None:
        found = {name: round(self._seconds[name], 1) for name in sorted(self._seconds)}
        DURATIONS.write_text(json.dumps(found, indent=1) + "\n")


class FailureFile:
    """Prints each failure immediately and appends it to a file.

    Args:
        config: pytest's configuration of this session.
        path: file that failures are appended to.
    """

    def __init__(self, config: pytest.Config, path: str) -> None:
        self._config, self._path = config, path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._record(report, f"FAILED {report.nodeid} ({report.when})")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._record(report, f"NOT COLLECTED {report.nodeid}")

    def _record(self, report: pytest.TestReport | pytest.CollectReport, title: str) -> None:
        if report.failed:
            text = f"{title}\n{report.longreprtext}\n"
            self._config.get_terminal_writer().write(f"\n{text}", flush=True)
            with open(self._path, "a") as file:
                file.write(text)


def pytest_configure(config: pytest.Config) -> None:
    """Record failures to the file of the variable FAILURES, and durations."""
    if hasattr(config, "workerinput"):  # workers of pytest-xdist report to the main process
        return
    if path := os.environ.get("FAILURES"):
        config.pluginmanager.register(FailureFile(config, path))
    if config.getoption("record_durations", False):
        config.pluginmanager.register(DurationFile())


@pytest.fixture
def device() -> torch.device:
    """Device of tensors for the Triton kernel."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def native_cpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Use the native CPU kernel instead of Triton's interpreter."""
    monkeypatch.setattr("adax_triton.step.backend._interpreting", lambda: False)
    return torch.device("cpu")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run on one thread, which is faster for small CPU tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def reference_cpu(native_cpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Use the reference formula for CPU tensors, as without a C++ compiler."""
    monkeypatch.setattr("adax_triton.step.launch.native_kernel", lambda variant: None)
    return native_cpu


@pytest.fixture(params=["kernel", "cpu"])
def backend(request: pytest.FixtureRequest) -> torch.device:
    """Device of the Triton kernel ("kernel") and of the native kernel ("cpu")."""
    return request.getfixturevalue("device" if request.param == "kernel" else "native_cpu")


class Recording(TorchDispatchMode):
    """Records kernel launches and tensor operations in a block, and replays them.

    As in a CUDA graph, a replay writes the same memory and runs no other Python code.
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
            self._launching = True  # operations of the interpreter belong to the launch
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
    """Module of adax_triton.kernels -> function that launches its kernel."""
    return LAUNCHERS


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    """Replaces a CUDA graph when kernels run in the interpreter."""
    return Recording(monkeypatch)


@pytest.fixture(scope="session")
def launch_deepspeed() -> Callable[..., dict[str, Any]]:
    """The function `launch`."""
    return launch


def launch(
    folder: Path,
    cases: list[dict[str, Any]],
    worker: str = "deepspeed_worker.py",
    world_size: int = 2,
    interpreted: bool = False,
) -> dict[str, Any]:
    """Run a worker on some ranks and return its results.

    Args:
        folder: working folder for the cases, results and log.
        cases: JSON-friendly arguments of the worker.
        worker: script in tests/support.
        world_size: number of ranks. Default: 2.
        interpreted: run the Triton kernels in the interpreter. Default: False.
    """
    (folder / "cases.json").write_text(json.dumps(cases))
    arguments = [str(folder / name) for name in ("cases.json", "results.json")]
    interpret = {"TRITON_INTERPRET": str(int(interpreted))}
    run_ranks(SUPPORT / worker, arguments, world_size, folder, interpret, folder / "ranks.log")
    return json.loads((folder / "results.json").read_text())
