"""Kernels and busy time of a GPU, read from a profile."""

import time
from types import SimpleNamespace

import pytest
import torch
from adax_triton.bench.harness import timing


def test_kernels_are_counted_without_copies_and_annotations() -> None:
    gpu, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        SimpleNamespace(device_type=gpu, name="adax_step_kernel", is_user_annotation=False),
        SimpleNamespace(device_type=gpu, name="void at::native::fill", is_user_annotation=False),
        SimpleNamespace(device_type=gpu, name="Memcpy HtoD (Pinned -> Device)", is_user_annotation=False),
        SimpleNamespace(device_type=gpu, name="Memset (Device)", is_user_annotation=False),
        SimpleNamespace(device_type=gpu, name="Optimizer.step#AdaXW.step", is_user_annotation=True),
        SimpleNamespace(device_type=host, name="cudaLaunchKernel", is_user_annotation=False),
    ]
    assert timing.kernels_among(events) == 2


def test_gpu_is_busy_while_at_least_one_kernel_or_copy_runs() -> None:
    def event(start: float, end: float, on_gpu: bool = True, annotation: bool = False) -> SimpleNamespace:
        device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(device_type=device, time_range=span, is_user_annotation=annotation, name="")

    kernels = [event(20.0, 30.0), event(0.0, 8.0), event(5.0, 10.0), event(6.0, 7.0)]
    others = [event(0.0, 90.0, on_gpu=False), event(0.0, 99.0, annotation=True)]
    assert timing.busy_among([*kernels, *others]) == pytest.approx(20e-6)
    assert timing.busy_among(others) == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_is_busy_for_a_part_of_a_call() -> None:
    tensor = torch.zeros(2**24, device="cuda")

    def call() -> None:
        tensor.add_(1.0)
        torch.cuda.synchronize()
        time.sleep(0.01)  # the GPU is idle

    call()
    assert timing.count_launches(call) == 1
    assert 0 < timing.busy_seconds(call) < 0.005
