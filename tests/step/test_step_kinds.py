"""Every kind of step: replaced groups, several streams, failed captures.

Streams and captures are faked here; test_cuda_streams.py and test_cuda_graphs.py use real ones. Oracle: an equal
optimizer without plans, on one stream and without captures, bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensor_bits import bits
from torch import Tensor
from torch.nn import Parameter

from adax_triton import AdaXW, ExternalGrads
from adax_triton.gradient_release import GradientRelease
from adax_triton.step import device_tables
from adax_triton.step.device_tables import PerStreamCache

without_a_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU, tests/gpu_code uses real streams and graphs"
)

CPU = torch.device("cpu")
SHAPES = ((5, 7), ())
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipping": {"max_grad_norm": 1.0},
    "capturable": {"capturable": True},
    "telemetry": {"telemetry": True},
    "all": {"capturable": True, "telemetry": True, "max_grad_norm": 1.0},
    "lr tensor": {"capturable": True, "lr": torch.tensor(0.01)},
}
KINDS = [
    *(("step", name) for name in OPTIONS),
    *(("scaled", "plain"), ("scaled", "telemetry"), ("external", "plain")),
    *(("release", "plain"), ("release", "capturable")),
]
each_kind = pytest.mark.parametrize(("kind", "options"), KINDS, ids=map(", ".join, KINDS))
Replace = Callable[[str, Callable[[torch.device], Any]], None]


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Replace:
    """Replace a function of device_tables in every module that imported it."""

    def everywhere(name: str, replacement: Callable[[torch.device], Any]) -> None:
        original = getattr(device_tables, name)
        for module in list(sys.modules.values()):
            if module.__name__.startswith("adax_triton") and getattr(module, name, None) is original:
                monkeypatch.setattr(module, name, replacement)

    return everywhere


class Training:
    """An optimizer with two groups of different dtypes, which need two launches."""

    def __init__(self, kind: str = "step", device: torch.device = CPU, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        dtypes = (torch.float32, torch.float32 if kind == "external" else torch.bfloat16)
        first, second = (
            [Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]
            for dtype in dtypes
        )
        if isinstance(options.get("lr"), Tensor):
            options["lr"] = options["lr"].to(device)
        self.optimizer = AdaXW([{"params": first}, {"params": second, "lr": 0.03}], **{"lr": 0.01, **options})
        self.params = first + second
        self.kind = kind
        self.release = GradientRelease(self.optimizer) if kind == "release" else None

    def step(self, number: int, frozen: Parameter | None = None) -> None:
        generator = torch.Generator().manual_seed(number)
        grads = [torch.randn(param.shape, generator=generator).to(param) for param in self.params]
        self.optimizer.zero_grad()
        if self.kind == "release":
            products = [(param * grad).sum() for param, grad in zip(self.params, grads, strict=True)]
            torch.stack([product.float() for product in products]).sum().backward()
            return
        if self.kind == "scaled":
            self.optimizer.grad_scale = torch.tensor(2.0, device=grads[0].device)
            self.optimizer.found_inf = torch.tensor(0.0, device=grads[0].device)
        if self.kind == "external":
            pairs = zip(self.params, grads, strict=True)
            self.optimizer.set_external_grads(
                [ExternalGrads(param, [grad]) for param, grad in pairs], torch.tensor(0.5)
            )
        else:
            for param, grad in zip(self.params, grads, strict=True):
                param.grad = None if param is frozen else grad
        self.optimizer.step()

    def contents(self) -> list[Any]:
        """Return every bit of weights and states."""
        found: list[Any] = [len(self.optimizer.state), *map(bits, self.params)]
        for param in self.params:
            for name, value in self.optimizer.state.get(param, {}).items():
                found.append((name, type(value), bits(torch.as_tensor(value))))
        return found

    def report(self) -> list[Any]:
        """Return the gradient norm and telemetry of the last step."""
        telemetry = self.optimizer.read_telemetry(per_parameter=True) if self.optimizer.options.telemetry else None
        return [self.optimizer.grad_norm, telemetry]


RULES = {"lr": 0.3, "betas": (0.7, 1e-2), "weight_decay": 0.2, "eps": 1e-3, "maximize": True}


def assert_equal_step(training: Training, twin: Training, number: int) -> None:
    twin.optimizer._plans.clear()
    for each in (training, twin):
        each.step(number)
    assert training.contents() == twin.contents()
    assert training.report() == twin.report()


@each_kind
def test_values_of_replaced_groups_take_effect(kind: str, options: str, device: torch.device) -> None:
    training, twin = Training(kind, device, **OPTIONS[options]), Training(kind, device, **OPTIONS[options])
    assert_equal_step(training, twin, 0)
    changes: list[dict[str, Any]] = [{"lr": 0.0}, RULES]
    if options == "lr tensor":
        changes.append({"lr": torch.tensor(0.02, device=device)})
    for number, change in enumerate(changes, 1):
        before = [bits(param) for param in training.params]
        training.optimizer.param_groups = [{**group, **change} for group in training.optimizer.param_groups]
        for group in twin.optimizer.param_groups:
            group.update(change)
        assert_equal_step(training, twin, number)
        assert ([bits(param) for param in training.params] == before) is (change == {"lr": 0.0})


@each_kind
def test_groups_may_be_reordered(kind: str, options: str, device: torch.device) -> None:
    training, twin = Training(kind, device, **OPTIONS[options]), Training(kind, device, **OPTIONS[options])
    assert_equal_step(training, twin, 0)
    training.optimizer.param_groups = training.optimizer.param_groups[::-1]
    for each in (training, twin):
        each.step(1)
    assert training.contents() == twin.contents()
    if "telemetry" in OPTIONS[options]:
        found, expected = (each.optimizer.read_telemetry(per_parameter=True) for each in (training, twin))
        assert found.groups == expected.groups[::-1]
        assert found.params["1.1"] == expected.params["0.1"] and found.params["0.0"] == expected.params["1.0"]


def test_telemetry_uses_the_names_of_replaced_groups(device: torch.device) -> None:
    training = Training(device=device, telemetry=True)
    for number in range(2):
        training.step(number)
    names = [["a", "b"], ["c", "d"]]
    groups = zip(training.optimizer.param_groups, names, strict=True)
    training.optimizer.param_groups = [{**group, "param_names": given} for group, given in groups]
    for number in (2, 3):
        training.step(number)
        assert list(training.optimizer.read_telemetry(per_parameter=True).params) == [*names[0], *names[1]]
        names[1][1] = training.optimizer.param_groups[1]["param_names"][1] = "e"


def test_release_ignores_parameters_of_removed_groups(device: torch.device) -> None:
    training = Training("release", device)
    training.step(0)
    groups = training.optimizer.param_groups
    training.optimizer.param_groups = groups[:1]
    before = [bits(param) for param in training.params]
    training.step(1)
    assert [bits(param) == old for param, old in zip(training.params, before, strict=True)] == [False] * 2 + [True] * 2
    assert [param.grad is None for param in training.params] == [True] * 2 + [False] * 2
    training.optimizer.param_groups = []
    before = [bits(param) for param in training.params]
    training.step(2)
    assert [bits(param) for param in training.params] == before  # no parameter was updated
    training.optimizer.param_groups = groups
    for param in training.params:
        param.grad = None
    before = [bits(param) for param in training.params]
    training.step(3)
    assert all(bits(param) != old for param, old in zip(training.params, before, strict=True))


@pytest.fixture
def launched(launchers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Record all tensors that are passed to launches: tables and buffers."""
    found: list[Tensor] = []

    def recorded(launch: Callable[..., None]) -> Callable[..., None]:
        def record(*args: Any) -> None:
            found.extend(arg for arg in args if isinstance(arg, Tensor))
            launch(*args)

        return record

    for module, name in launchers.items():
        kernels_module = pytest.importorskip(f"adax_triton.kernels.{module}")
        monkeypatch.setattr(kernels_module, name, recorded(getattr(kernels_module, name)))
    return found


@without_a_gpu
@each_kind
def test_streams_share_no_memory(kind: str, options: str, replace: Replace, launched: list[Tensor]) -> None:
    training, twin = Training(kind, **OPTIONS[options]), Training(kind, **OPTIONS[options])
    replace("current_stream", lambda device: current)
    tables: dict[int, list[Tensor]] = {1: [], 2: []}  # kept alive, or the allocator could reuse their memory
    for number, stream in enumerate([1, 1, 2, 1, 2]):
        launched.clear()
        current = stream
        training.step(number)
        tables[stream] += launched
        if training.optimizer._sums is not None and training.optimizer._sums._grad_scale is not None:
            tables[stream].append(training.optimizer._sums._grad_scale)
        current = 3
        twin.step(number)
        assert training.contents() == twin.contents()
        assert training.report() == twin.report()
    first, second = ({table.untyped_storage().data_ptr() for table in tables[stream]} - {0} for stream in (1, 2))
    assert len(first) > 2 and first.isdisjoint(second)


@without_a_gpu
def test_plans_are_per_stream(replace: Replace, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training()
    replace("current_stream", lambda device: current)
    original = training.optimizer._new_plan
    planned: list[int] = []
    monkeypatch.setattr(training.optimizer, "_new_plan", lambda *given: planned.append(current) or original(*given))
    for number, stream in enumerate([1, 1, 1, 2, 2, 1, 1]):
        current = stream
        training.step(number)
    assert planned == [1, 2, 1]


@without_a_gpu
def test_a_capture_takes_the_latest_entry_only(replace: Replace) -> None:
    current, capturing = 1, False
    replace("current_stream", lambda device: current)
    replace("is_capturing", lambda device: capturing)
    cache: PerStreamCache[list[int]] = PerStreamCache()
    made: dict[int, list[int]] = {}
    for current in (1, 2, 1):
        made[current] = cache.get("key", CPU, list)
    assert made[1] is not made[2]
    current, capturing = 3, True
    assert cache.latest("key") is made[1] and cache.get("key", CPU, list) is made[1]
    assert cache.latest("key") is made[2] and cache.get("key", CPU, list) is made[2]
    assert cache.latest("key") is None and cache.latest("another") is None
    current, capturing = 1, False
    assert cache.get("key", CPU, list) is not made[1]  # the graph keeps that entry


def cached_tables(training: Training) -> list[Any]:
    """Return all cached tables with their revisions, and the plans."""
    launch_cache, sums = training.optimizer._launch_cache, training.optimizer._sums
    caches = [launch_cache._launches, launch_cache.device_scalars, launch_cache.host_computed_scalars]
    caches += [] if sums is None else [sums._buffers]
    entries = [entry for cache in caches for by_stream in cache._entries.values() for entry in by_stream.values()]
    revisions = [getattr(entry, "revision", None) for entry in entries]
    return [
        list(map(id, entries)),
        revisions,
        [cache._captured for cache in caches],
        dict(training.optimizer._plans),
    ]


def first_step(training: Training) -> None:
    pass


def host_counted_steps(training: Training) -> None:
    limit, training.optimizer.max_grad_norm = training.optimizer.max_grad_norm, None
    for capturable in (False, True):
        for group in training.optimizer.param_groups:
            group["capturable"] = capturable
        if not capturable:
            training.step(0)
            training.step(1)
    training.optimizer.max_grad_norm = limit


def fewer_tensors_in_a_launch(training: Training) -> None:
    training.step(0)
    training.step(1, frozen=training.params[-1])


def parameter_without_a_state(training: Training) -> None:
    for number in range(2):
        training.step(number, frozen=training.params[-1])


def other_groups(training: Training) -> None:
    for number in range(2):
        training.step(number)
    (first, _) = training.optimizer.param_groups
    training.optimizer.param_groups = [{**first, "params": training.params}]


CAPTURES = [first_step, host_counted_steps, fewer_tensors_in_a_launch, parameter_without_a_state, other_groups]


@without_a_gpu
@pytest.mark.parametrize("options", ["capturable", "all"])
@pytest.mark.parametrize("before", CAPTURES, ids=lambda before: before.__name__)
def test_a_failed_capture_changes_nothing(before: Callable[[Training], None], options: str, replace: Replace) -> None:
    training, twin = (Training(**{**OPTIONS[options], "capturable": True}) for _ in range(2))
    before(training)
    before(twin)
    capturing = True
    replace("is_capturing", lambda device: capturing)
    tables_before, contents = cached_tables(training), training.contents()
    with pytest.raises(RuntimeError, match="without a step of the same parameters"):
        training.step(7)
    assert cached_tables(training) == tables_before
    assert training.contents() == contents
    capturing = False
    for number in (8, 9):
        for each in (training, twin):
            each.step(number, frozen=each.params[-1] if number == 8 else None)
        assert training.contents() == twin.contents()
        assert training.report() == twin.report()


@without_a_gpu
@pytest.mark.parametrize("steps", [0, 2])
def test_a_capture_with_external_gradients_raises(steps: int, replace: Replace) -> None:
    training, twin = Training("external"), Training("external")
    for number in range(steps):
        training.step(number)
        twin.step(number)
    capturing = True
    replace("is_capturing", lambda device: capturing)
    tables_before, contents = cached_tables(training), training.contents()
    with pytest.raises(RuntimeError, match=r"set_external_grads\(\) does not support"):
        training.step(7)
    assert cached_tables(training) == tables_before
    assert training.contents() == contents
    capturing = False
    training.step(8)
    twin.step(8)
    assert training.contents() == twin.contents()


@without_a_gpu
@pytest.mark.parametrize("steps", [0, 1])
def test_a_failed_capture_of_a_backward_pass_changes_nothing(steps: int, replace: Replace) -> None:
    training, twin = Training("release", capturable=True), Training("release", capturable=True)
    # step() creates the states, but not the tables of single parameters that GradientRelease needs.
    for each in (training, twin):
        each.release.remove()
        each.kind = "step"
        for number in range(steps):
            each.step(number)
        each.kind = "release"
        each.release = GradientRelease(each.optimizer)
    capturing = True
    replace("is_capturing", lambda device: capturing)
    tables_before, contents = cached_tables(training), training.contents()
    with pytest.raises(RuntimeError, match="without a step of the same parameters"):
        training.step(7)
    assert cached_tables(training) == tables_before
    assert training.contents() == contents
    capturing = False
    for number in (8, 9):
        training.step(number)
        twin.step(number)
        assert training.contents() == twin.contents()
