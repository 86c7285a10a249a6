"""Measure calls: time, memory, cache size, kernel launches and the busy time of a GPU."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Call = Callable[[], Any]

CACHE_MULTIPLE = 2  # times the last-level cache size; this many bytes are overwritten before each timed call
_CPU_CACHE_BYTES = 32 * 2**20
_MAX_BUSY_S = 0.02  # the longest that the GPU is kept busy before a call
# After a call, idle OpenMP threads spin for some milliseconds. Those of one runtime would slow a call of another.
_PAUSE_S = 0.02


class Clock:
    """Times calls with cold caches, as after a backward pass.

    Before each call the GPU overwrites its caches. This takes longer than the host's launch, so only device time is
    measured, as in training, where the host is ahead. Host time is measured separately.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._filler = torch.empty(CACHE_MULTIPLE * cache_bytes(device), dtype=torch.uint8, device=device)
        # The first call loads the kernel.
        self._fill_s = min(time_call(lambda: self._filler.fill_(1), device) for _ in range(3))

    def time(self, call: Call, host_s: float | None) -> float:
        """Return the seconds of one call.

        On a GPU the host launches it in `host_s` seconds; on a CPU `host_s` is None.
        """
        for _ in range(1 if host_s is None else 1 + math.ceil(min(2 * host_s, _MAX_BUSY_S) / self._fill_s)):
            self._filler.fill_(1)
        if self._device.type == "cpu":
            time.sleep(_PAUSE_S)
        return time_call(call, self._device)

    def host_time(self, call: Call) -> float | None:
        """Return the seconds until a call has launched its work.

        The GPU is idle before the call. Returns None on a CPU.
        """
        if self._device.type != "cuda":
            return None
        wait(self._device)
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        wait(self._device)
        return seconds

    def time_in_turn(
        self, calls: Mapping[Any, Call], rounds: int, least: int, until: float
    ) -> dict[Any, tuple[list[float], list[float]]]:
        """Time calls round after round.

        Runs at most `rounds` rounds. After `least`, no round begins when `time.perf_counter()` exceeds `until`.
        Returns the seconds of every call, and on a GPU its host seconds.
        """
        times: dict[Any, tuple[list[float], list[float]]] = {key: ([], []) for key in calls}
        for _ in rounds_until(rounds, least, until):
            for key, call in calls.items():
                host_s = self.host_time(call)
                times[key][0].append(self.time(call, host_s))
                times[key][1].extend([] if host_s is None else [host_s])
        return times


def rounds_until(most: int, least: int, until: float) -> Iterator[int]:
    """Yield round numbers from 0, at most `most`.

    After `least` rounds, none begins when `time.perf_counter()` exceeds `until`.
    """
    for done in range(most):
        if done >= least and time.perf_counter() > until:
            return
        yield done


def shares_of_time(items: Sequence[T], deadline: float) -> Iterator[tuple[T, float]]:
    """Yield each item with the time until which it may run, by `time.perf_counter()`.

    Each item gets an equal share of the time that is left until `deadline`.
    """
    for done, item in enumerate(items):
        now = time.perf_counter()
        yield item, now + (deadline - now) / (len(items) - done)


def quantiles(times: Sequence[float], unit: str = "ms", per_second: float = 1e3) -> dict[str, float]:
    """Return the median, p20 and p80 of times in seconds.

    The keys are "median_ms", "p20_ms" and "p80_ms". `unit` and `per_second` choose another unit.
    """
    deciles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else [times[0]] * 9
    found = {"median": statistics.median(times), "p20": deciles[1], "p80": deciles[7]}
    return {f"{name}_{unit}": per_second * seconds for name, seconds in found.items()}


def wait(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(call: Call, device: torch.device) -> float:
    """Return the seconds of one call; on a GPU, device time.

    Device time starts at the end of earlier work.
    """
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    return time_until_done(call, device)


def time_until_done(call: Call, device: torch.device) -> float:
    """Return the seconds until the device finished a call, compilation included."""
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def cache_bytes(device: torch.device) -> int:
    """Return the bytes of the last-level cache; 32 MiB if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=_CPU_CACHE_BYTES)


def free_bytes(device: torch.device) -> float:
    """Return the bytes that new tensors can take; infinity if unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    return math.inf


def release(device: torch.device) -> None:
    """Return the memory of deleted tensors to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def count_launches(call: Call) -> int | None:
    """Return the number of GPU kernels that one call launches.

    Returns None if the profiler sees none.
    """
    return kernels_among(_profiled(call)) or None


def busy_seconds(call: Call) -> float:
    """Return the seconds in which the GPU computes or copies during a call."""
    return busy_among(_profiled(call))


def kernels_among(events: Iterable[Any]) -> int:
    """Count the kernels in a profile, without copies, fills and annotations."""
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in _on_gpu(events))


def busy_among(events: Iterable[Any]) -> float:
    """Return the seconds in which at least one kernel, copy or fill of a profile runs."""
    busy_us, busy_until = 0.0, -math.inf
    for start, end in sorted((event.time_range.start, event.time_range.end) for event in _on_gpu(events)):
        busy_us += max(0.0, end - max(start, busy_until))
        busy_until = max(busy_until, end)
    return busy_us * 1e-6


def _profiled(call: Call) -> Iterable[Any]:
    with torch.profiler.profile() as profile:
        call()
        torch.cuda.synchronize()
    found: Iterable[Any] = profile.events()
    return found


def _on_gpu(events: Iterable[Any]) -> Iterator[Any]:
    device = torch.autograd.DeviceType.CUDA
    return (event for event in events if event.device_type == device and not event.is_user_annotation)
