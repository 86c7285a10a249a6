"""Clocks for calls, and what a device can say of a call: its memory, its caches, its launches."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

# Of the last-level cache, overwritten before each timed call.
CACHES = 2
_CPU_CACHE_BYTES = 32 * 2**20
# The longest the device is kept busy before a call, in seconds.
_MOST_BUSY_S = 0.02


class Clock:
    """Times calls on a device whose caches are cold, as after a backward pass.

    On a GPU the caches are overwritten on the device, for longer than the host takes to launch the call: what is timed
    there is the device's share alone, as in training, where the host is ahead. The host's share is timed by itself.

    Args:
        device: where the calls work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._filler = torch.empty(CACHES * cache_bytes(device), dtype=torch.uint8, device=device)
        self._fill_s = math.inf
        for _ in range(3):  # the first call loads the kernel
            self._fill_s = min(self._fill_s, time_call(lambda: self._filler.fill_(1), device))

    def time(self, call: Call, host_s: float | None) -> float:
        """Return the seconds of one call.

        Args:
            call: what is timed.
            host_s: seconds the host takes to launch it, on a GPU.
        """
        for _ in range(self._fills(host_s)):
            self._filler.fill_(1)
        return time_call(call, self._device)

    def host_time(self, call: Call) -> float | None:
        """Return the seconds after which one call returns while the device is idle; None where the call is the work."""
        if self._device.type != "cuda":
            return None
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        torch.cuda.synchronize(self._device)
        return seconds

    def _fills(self, host_s: float | None) -> int:
        return 1 if host_s is None else 1 + math.ceil(min(2 * host_s, _MOST_BUSY_S) / self._fill_s)


def p20_and_p80(times: Sequence[float]) -> tuple[float, float]:
    """Return the 20th and the 80th percentile of one time or more."""
    deciles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else [times[0]] * 9
    return deciles[1], deciles[7]


def time_call(call: Call, device: torch.device) -> float:
    """Return the seconds of one call: of the device on a GPU, from the work before it to the call's own end."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_until_done(call: Call, device: torch.device) -> float:
    """Return the seconds of one call until the device has finished, compilation included."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def cache_bytes(device: torch.device) -> int:
    """Return the bytes of the last-level cache; 32 MiB where a CPU does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=_CPU_CACHE_BYTES)


def free_bytes(device: torch.device) -> float:
    """Return the bytes that new tensors can take; infinity where the system does not say."""
    if device.type == "cuda":
        held_back = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held_back
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    return math.inf


def release(device: torch.device) -> None:
    """Give memory of tensors that are gone back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Peak:
    """Bytes allocated on a GPU above those at the start of a `with` block, at most; None on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes: int | None = None

    def __enter__(self) -> Peak:
        if self._device.type == "cuda":
            self._before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before


def count_launches(call: Call) -> int | None:
    """Return the kernels that one call launches on a GPU, by the profiler; None where it sees none."""
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return kernels_among(profile.events()) or None


def kernels_among(events: Iterable[Any]) -> int:
    """Return how many of a profile's events are kernels: neither copies, nor fills by the driver, nor annotations."""
    device = torch.autograd.DeviceType.CUDA
    return sum(
        event.device_type == device and not event.is_user_annotation and not event.name.startswith(("Memcpy", "Memset"))
        for event in events
    )
