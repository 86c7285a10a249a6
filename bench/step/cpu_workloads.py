"""Workloads of `adax-triton bench cpu`, and a process that times them with another copy of the package.

    PYTHONPATH=PACKAGE python -P bench/step/cpu_workloads.py serve

answers requests, one JSON object per line. It imports only what older versions of the package have, too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from adax_triton.bench.harness.providers import RULES
from adax_triton.bench.harness.workloads import Shapes, flat, gpt2, many_small
from adax_triton.bench.step.measure import make_params, reason
from torch import Tensor, nn

import adax_triton
from adax_triton import AdaXW, ExternalGrads, GradientRelease

CPU = torch.device("cpu")
OURS, WITHOUT = "ours", "without"
FUSED, DEEPSPEED, NO_TELEMETRY = "torch AdamW fused", "DeepSpeedCPUAdam", "AdaXW without telemetry"
WARM_UP = 3
# OpenMP's threads spin for some milliseconds after a step. Each runtime and each process has threads of its own.
PAUSE_S = 0.02
_WIDTH, _BATCH = 64, 8  # of the linear layers of gradient release


class Sizes(NamedTuple):
    """Sizes of the workloads.

    numel: of flat tensors.
    gpt2: layers, width, vocabulary and context of GPT-2.
    tensors: number of the small tensors, each of as many elements.
    linears: layers of the model of gradient release.
    first_numel: of the tensor of a process's first step.
    """

    numel: int = 50_000_000
    gpt2: tuple[int, int, int, int] = (12, 768, 50257, 1024)
    tensors: int = 1024
    linears: int = 64
    first_numel: int = 1_000_000


class Timed(NamedTuple):
    """A call to time, and a call before each one that is not timed."""

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None


Make = Callable[[], Timed]
Options = Mapping[str, Any]


class Workload(NamedTuple):
    """A row of the table.

    sides: makes the calls to time, by name. `OURS` is one; the time of `WITHOUT` is subtracted from it; others are
        rivals. They share parameters where they can.
    repeats: calls per sample.
    parts: of a call; times are per part. Default: 1.
    """

    sides: Callable[[Sizes], dict[str, Make]]
    repeats: int = 1
    parts: Callable[[Sizes], int] = lambda sizes: 1


def seconds(timed: Timed, repeats: int) -> float:
    """Return the mean seconds of some calls, after a pause in which the threads of other steps fall asleep."""
    time.sleep(PAUSE_S)
    total = 0.0
    for _ in range(repeats):
        if timed.prepare is not None:
            timed.prepare()
        start = time.perf_counter()
        timed.run()
        total += time.perf_counter() - start
    return total / repeats


def started(
    workload: Workload, sizes: Sizes, only: Collection[str] | None = None
) -> tuple[dict[str, Timed], dict[str, str]]:
    """Return the sides of a workload after their warm-up, and why others are absent.

    Args:
        workload: which.
        sizes: of its tensors.
        only: names of sides. Default: None, all.
    """
    made, absent = {}, {}
    for name, make in workload.sides(sizes).items():
        if only is not None and name not in only:
            continue
        try:
            timed = make()
            for _ in range(WARM_UP):
                seconds(timed, 1)
        except Exception as error:  # the table says what stops a side
            absent[name] = reason(error)
        else:
            made[name] = timed
    return made, absent


def adax(params: list[Tensor], options: Options = MappingProxyType({})) -> Timed:
    """Return the step of AdaXW with some options."""
    return Timed(AdaXW(params, **RULES["adax"], **options).step)


def peer(name: str, params: list[Tensor]) -> Timed:
    """Return the step of another optimizer, by its name in `bench step`."""
    from adax_triton.bench.harness.peers import PEERS
    from adax_triton.bench.harness.providers import PROVIDERS

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    provider = next(one for one in (*PROVIDERS, *PEERS) if one.name == name)
    return Timed(provider.build(params, RULES["adam"]))


def _against(
    shapes: Callable[[Sizes], Shapes],
    *peers: str,
    dtype: torch.dtype = torch.float32,
    options: Options = MappingProxyType({}),
) -> Callable[[Sizes], dict[str, Make]]:
    """Return sides that step the same tensors: ours with some options, and peers."""

    def sides(sizes: Sizes) -> dict[str, Make]:
        params = make_params(shapes(sizes), CPU, seed=2, dtype=dtype)
        made: dict[str, Make] = {OURS: lambda: adax(params, options)}
        made |= {name: lambda name=name: peer(name, params) for name in peers}  # type: ignore[misc]
        if options.get("telemetry"):
            made[NO_TELEMETRY] = lambda: adax(params)
        return made

    return sides


def _zero_offload(sizes: Sizes) -> dict[str, Make]:
    """Return the CPU step of ZeRO offload: float32 weights, bfloat16 gradient, bfloat16 copy of the weights.

    DeepSpeed casts the gradient, steps, and casts the weights (`stage_1_and_2.py`, `step`); its first cast, through a
    temporary tensor where gradients are on the CPU, is one pass here.
    """
    (master,) = make_params(flat(sizes.numel), CPU, seed=2)
    assert master.grad is not None
    grad, low_precision_copy, master.grad = master.grad.bfloat16(), master.detach().bfloat16(), None

    def ours() -> Timed:
        optimizer, part = AdaXW([master], **RULES["adax"]), ExternalGrads(master, [grad], low_precision_copy)

        def step() -> None:
            optimizer.set_external_grads([part])
            optimizer.step()

        return Timed(step)

    def deepspeed() -> Timed:
        weights = master.detach().clone().requires_grad_()
        converted = weights.grad = torch.zeros_like(weights)
        cpu_adam = peer(DEEPSPEED, [weights]).run

        def step() -> None:
            converted.copy_(grad)
            cpu_adam()
            low_precision_copy.copy_(weights.detach())

        return Timed(step)

    return {OURS: ours, DEEPSPEED: deepspeed}


def _gradient_release(sizes: Sizes) -> dict[str, Make]:
    """Return backward passes of small linear layers, with and without gradient release."""

    def make(release: bool) -> Timed:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(sizes.linears)))
        inputs = torch.randn(_BATCH, _WIDTH)
        if release:
            optimizer = AdaXW(model.parameters(), **RULES["adax"])
            GradientRelease(optimizer)
        loss: list[Tensor] = []

        def forward() -> None:
            model.zero_grad(set_to_none=True)
            loss[:] = [model(inputs).square().mean()]

        return Timed(lambda: loss[0].backward(), forward)

    return {OURS: lambda: make(True), WITHOUT: lambda: make(False)}


def _flat(sizes: Sizes) -> Shapes:
    return flat(sizes.numel)


def _gpt2(sizes: Sizes) -> Shapes:
    return gpt2(*sizes.gpt2)


_BF16 = torch.bfloat16
WORKLOADS = {
    "fp32, flat": Workload(_against(_flat, FUSED, DEEPSPEED)),
    "fp32, GPT-2 small": Workload(_against(_gpt2, FUSED)),
    "fp32, many small tensors": Workload(_against(lambda sizes: many_small(sizes.tensors, sizes.tensors), FUSED), 5),
    "fp32, one tensor of 1,000": Workload(_against(lambda sizes: flat(1000), FUSED), 200),
    "bf16, stochastic": Workload(
        _against(_flat, FUSED, dtype=_BF16, options={"states": "bfloat16", "weight_rounding": "stochastic"}),
    ),
    "ZeRO offload": Workload(_zero_offload),
    "8bit_v16, 24bit": Workload(
        _against(_flat, dtype=_BF16, options={"states": "8bit_v16", "master_weights": "24bit"})
    ),
    "8bit, 24bit": Workload(_against(_flat, dtype=_BF16, options={"states": "8bit", "master_weights": "24bit"})),
    "telemetry, flat": Workload(_against(_flat, options={"telemetry": True})),
    "telemetry, GPT-2 small": Workload(_against(_gpt2, options={"telemetry": True})),
    "gradient release, per parameter": Workload(_gradient_release, 10, lambda sizes: 2 * sizes.linears),
}


def first_step(kind: str, numel: int) -> float:
    """Return the seconds of the first step of one float32 tensor, ours or a peer's."""
    params = make_params(flat(numel), CPU, seed=2)
    timed = adax(params) if kind == OURS else peer(kind, params)
    start = time.perf_counter()
    timed.run()
    return time.perf_counter() - start


def serve() -> None:
    """Answer requests: `{"start": name, "sizes": [...]}`, then `{}` for one sample of each side."""
    workload: Workload | None = None
    made: dict[str, Timed] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            made.clear()
            workload = WORKLOADS[request["start"]]
            made, absent = started(workload, Sizes(*request["sizes"]), (OURS, WITHOUT))
            answer: dict[str, Any] = {"absent": absent, "package": list(adax_triton.__path__)}
        else:
            assert workload is not None
            answer = {name: seconds(timed, workload.repeats) for name, timed in made.items()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        print(json.dumps({"seconds": first_step(sys.argv[2], int(sys.argv[3]))}))
