"""Time of one optimizer step, ours beside the others', in one run.

Every provider first steps a small list of tensors; one whose result is not its rule's, by the reference in float64,
gets no time. Then all step their own tensors in turn, round after round, so that a drift of the machine meets them
alike; medians are compared. Buffers that exceed the last-level cache are the honest case; the small one shows the cost
of the call.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from adax_triton.precision import bytes_loaded, bytes_stored
from adax_triton.reference import adax_update
from adax_triton.schedule import step_scalars

from .providers import Provider
from .workloads import Shapes

GATE_STEPS = 3
GATE_SHAPES: Shapes = [(40_000,), (3,), (33, 17)]
# float32 rounding of a weight near 1 over GATE_STEPS steps, with room for another order of operations.
GATE_TOLERANCE = 1e-6
BYTES_PER_ELEMENT = bytes_loaded(torch.float32, torch.float32) + bytes_stored(torch.float32)
COPY_BYTES_PER_ELEMENT = 8


class WrongResultError(Exception):
    """A provider's weights are not those of its rule."""


def make_params(shapes: Shapes, device: torch.device, seed: int) -> list[Tensor]:
    """Return float32 parameters with gradients, random, each tensor its own allocation."""
    generator = torch.Generator(device=device).manual_seed(seed)
    params = []
    for shape in shapes:
        param = torch.randn(shape, device=device, generator=generator).requires_grad_()
        param.grad = torch.randn(shape, device=device, generator=generator)
        params.append(param)
    return params


def check(provider: Provider, device: torch.device) -> None:
    """Step a small list and compare with the reference in float64.

    Raises:
        WrongResultError: the weights differ by more than float32 rounding.
    """
    params = make_params(GATE_SHAPES, device, seed=1)
    expected = [param.detach().double() for param in params]
    moments = [(torch.zeros_like(exact), torch.zeros_like(exact)) for exact in expected]
    optimizer = provider.build(params)
    rule: dict[str, Any] = {"decoupled_weight_decay": True, "eps_placement": "normalized", "maximize": False}
    for step in range(1, GATE_STEPS + 1):
        optimizer.step()
        scalars = step_scalars(step=step, second_moment=provider.second_moment, **provider.hyperparameters, **rule)
        for param, exact, moment in zip(params, expected, moments, strict=True):
            assert param.grad is not None
            adax_update(exact, param.grad.double(), *moment, **scalars._asdict())
    error = max((param.double() - exact).abs().max().item() for param, exact in zip(params, expected, strict=True))
    if not error <= GATE_TOLERANCE:
        raise WrongResultError(f"weights differ from the {second_name(provider)} rule by {error:.1e}")


def second_name(provider: Provider) -> str:
    """Return the rule's name as users write it."""
    return {"adax": "AdaX-W", "adam": "AdamW"}[provider.second_moment]


def time_call(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call, until the device has finished."""
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


def measure(
    providers: list[Provider],
    shapes: Shapes,
    device: torch.device,
    rounds: int,
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Time providers in turn on tensors of `shapes`, on two sets of tensors made in opposite order.

    Where its memory happens to lie makes a step some percent faster or slower; the second set gives the last-made the
    place of the first.

    Yields:
        `(rounds done, None)` after each round, and last `(rounds, rows)`: per provider the median, p20 and p80 in ms,
        GB/s by formula, the share of the copy's bandwidth, and the first step's seconds; or why it was not timed.
    """
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    rows: dict[str, Any] = {}
    builders: dict[str, Callable[[], Callable[[], Any]]] = {}
    for provider in providers:
        try:
            check(provider, device)
        except (ImportError, RuntimeError, AssertionError, WrongResultError) as error:
            rows[provider.name] = {"absent": f"{type(error).__name__}: {error}".splitlines()[0]}
            continue
        builders[provider.name] = functools.partial(_stepping, provider, shapes, device)
    builders["copy"] = functools.partial(_copying, numel, device)
    samples: dict[str, list[float]] = {name: [] for name in builders}
    first_calls: dict[str, float] = {}
    done = 0
    for names, until in ((list(builders), -(-rounds // 2)), (list(reversed(builders)), rounds)):
        calls = {name: builders[name]() for name in names}
        for name, call in calls.items():
            first_calls.setdefault(name, time_call(call, device))
            call()
        while done < until:
            done += 1
            for name, call in calls.items():
                samples[name].append(time_call(call, device))
            yield done, None
        calls.clear()
        gc.collect()
    copy_bandwidth = COPY_BYTES_PER_ELEMENT * numel / statistics.median(samples["copy"])
    for name, times in samples.items():
        per_element = COPY_BYTES_PER_ELEMENT if name == "copy" else BYTES_PER_ELEMENT
        rows[name] = {"first_step_s": first_calls[name], **_summary(times, per_element * numel, copy_bandwidth)}
    yield rounds, rows


def _stepping(provider: Provider, shapes: Shapes, device: torch.device) -> Callable[[], Any]:
    return provider.build(make_params(shapes, device, seed=2)).step


def _copying(numel: int, device: torch.device) -> Callable[[], Any]:
    source = torch.randn(numel, device=device)
    target = source.clone()
    return lambda: target.copy_(source)


def _summary(times: list[float], moved_bytes: float, copy_bandwidth: float) -> dict[str, float]:
    median = statistics.median(times)
    deciles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else [median] * 9
    return {
        "median_ms": median * 1e3,
        "p20_ms": deciles[1] * 1e3,
        "p80_ms": deciles[7] * 1e3,
        "gb_per_s": moved_bytes / median / 1e9,
        "copy_share": moved_bytes / median / copy_bandwidth,
    }
