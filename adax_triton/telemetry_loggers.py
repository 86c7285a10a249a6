"""Callbacks that log telemetry: hooks for `optimizer.register_step_post_hook`."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

from adax_triton.step.telemetry import StepTelemetry

from .moment_optimizer import MomentOptimizer


class ScalarWriter(Protocol):
    """What `torch.utils.tensorboard.SummaryWriter` is used for."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Log one number."""


class _EveryNthStep:
    """Reads telemetry every so many steps, when alone the host waits for the device."""

    def __init__(self, every: int, per_parameter: bool) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"Invalid every: {every!r}; expected a number of steps, at least 1")
        self._every = every
        self._per_parameter = per_parameter
        self._calls = 0

    def __call__(self, optimizer: MomentOptimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Log, if it is time to; torch calls this after each step."""
        self._calls += 1
        if self._calls % self._every == 0:
            self._log(self._calls, optimizer.read_telemetry(per_parameter=self._per_parameter))

    def _log(self, step: int, telemetry: StepTelemetry) -> None:
        raise NotImplementedError


class JsonLinesLogger(_EveryNthStep):
    """Appends a line of JSON: `step`, `skipped`, `groups` and `params`, with the fields of `Telemetry`.

        optimizer.register_step_post_hook(JsonLinesLogger("telemetry.jsonl", every=100))

    Numbers that are not finite are null.

    Args:
        path: of the file; lines are added to what it has. None writes nothing: for all ranks but one, which must read
            along where parameters are DTensors.
        every: steps from line to line; steps are counted from the logger's making, skipped ones included. Default: 1.
        per_parameter: whether to log single parameters too. Default: False.

    Raises:
        ValueError: `every` is not a positive integer.
    """

    def __init__(self, path: str | os.PathLike[str] | None, every: int = 1, per_parameter: bool = False) -> None:
        super().__init__(every, per_parameter)
        self._path = None if path is None else Path(path)

    def _log(self, step: int, telemetry: StepTelemetry) -> None:
        if self._path is None:
            return
        line = {
            "step": step,
            "skipped": telemetry.skipped,
            "groups": [_finite(group._asdict()) for group in telemetry.groups],
            "params": {name: _finite(param._asdict()) for name, param in telemetry.params.items()},
        }
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class TensorBoardLogger(_EveryNthStep):
    """Writes scalars `PREFIX/group0/grad_norm` and so on, and `PREFIX/skipped`.

        optimizer.register_step_post_hook(TensorBoardLogger(SummaryWriter(), every=100))

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, or what has its `add_scalar`. None: see `JsonLinesLogger`.
        every, per_parameter: see `JsonLinesLogger`.
        prefix: of the tags. Default: "optimizer".

    Raises:
        ValueError: `every` is not a positive integer.
    """

    def __init__(
        self, writer: ScalarWriter | None, every: int = 1, per_parameter: bool = False, prefix: str = "optimizer"
    ) -> None:
        super().__init__(every, per_parameter)
        self._writer = writer
        self._prefix = prefix

    def _log(self, step: int, telemetry: StepTelemetry) -> None:
        if self._writer is None:
            return
        self._writer.add_scalar(f"{self._prefix}/skipped", float(telemetry.skipped), step)
        named = {f"group{index}": group for index, group in enumerate(telemetry.groups)}
        for owner, numbers in {**named, **telemetry.params}.items():
            for name, value in numbers._asdict().items():
                self._writer.add_scalar(f"{self._prefix}/{owner}/{name}", float(value), step)


def _finite(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}
