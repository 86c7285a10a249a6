"""Steps in threads, in forked processes, next to workers of a DataLoader.

Oracle: the same steps one after another, bit for bit.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing  # multiprocessing registers how to pickle shared tensors
from torch.nn import Parameter
from torch.utils.data import DataLoader

from adax_triton import AdaXW

NUMELS = (20_000, 30_000, 64)  # together enough for two OpenMP threads
TIMEOUT_S = 20.0
OPTIONS: list[dict[str, Any]] = [{}, {"max_grad_norm": 1.0}, {"states": "8bit_v16"}, {"telemetry": True}]

assert multiprocessing


@pytest.fixture(autouse=True)
def two_threads(native_cpu: torch.device) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


class Run:
    def __init__(self, options: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [Parameter(torch.randn(numel, generator=generator)) for numel in NUMELS]
        self.grads = [torch.randn(numel, generator=generator) for numel in NUMELS]
        self.optimizer = AdaXW(self.params, lr=0.01, **options)

    def steps(self, count: int) -> list[Tensor]:
        for _ in range(count):
            for param, grad in zip(self.params, self.grads, strict=True):
                param.grad = grad
            self.optimizer.step()
        return [param.detach().clone() for param in self.params]


def assert_same(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_a_forked_child_steps_shared_weights(options: dict[str, Any]) -> None:
    """OpenMP must not wait for threads that only the parent has."""
    run = Run(options)
    for param in run.params:
        param.data.share_memory_()
    run.steps(2)
    child = os.fork()
    if child == 0:
        try:
            run.steps(3)
        finally:
            os._exit(0)
    end = time.monotonic() + TIMEOUT_S
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the forked child hangs")
        time.sleep(0.01)
    assert_same((param.detach() for param in run.params), Run(options).steps(5))
    # The parent's states are those of its own two steps, and it goes on with its threads.
    assert [state["step"] for state in run.optimizer.state.values()] == [2, 2, 2]
    run.steps(1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_optimizers_in_threads_equal_steps_one_after_another(options: dict[str, Any]) -> None:
    expected, runs, errors = Run(options).steps(6), [Run(options) for _ in range(3)], []
    start = threading.Barrier(len(runs))

    def work(run: Run) -> None:
        try:
            start.wait()
            run.steps(6)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[run]) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for run in runs:
        assert_same((param.detach() for param in run.params), expected)


def test_workers_of_a_loader_start_after_a_step() -> None:
    run = Run({})
    run.steps(1)
    for factor in DataLoader([1.0, 2.0, 3.0, 4.0], batch_size=None, num_workers=2):
        run.optimizer.param_groups[0]["lr"] = 0.01 * factor
        run.steps(1)
    twin = Run({})
    for factor in (1.0, 1.0, 2.0, 3.0, 4.0):
        twin.optimizer.param_groups[0]["lr"] = 0.01 * factor
        expected = twin.steps(1)
    assert_same((param.detach() for param in run.params), expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_optimizer_sent_to_another_process_steps_shared_weights(options: dict[str, Any]) -> None:
    """A spawned worker of torch.multiprocessing receives an optimizer like this."""
    run = Run(options)
    run.steps(2)
    received = ForkingPickler.loads(ForkingPickler.dumps(run.optimizer))
    for param, grad in zip(received.param_groups[0]["params"], run.grads, strict=True):
        param.grad = grad
    received.step()
    assert_same((param.detach() for param in run.params), Run(options).steps(3))
