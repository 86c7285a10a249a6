"""Telemetry loggers for `optimizer.register_step_post_hook`: JSON lines and TensorBoard."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

from adax_triton.step.telemetry import StepTelemetry

from .moment_optimizer import MomentOptimizer


class ScalarWriter(Protocol):
    """The methods of `torch.utils.tensorboard.SummaryWriter` that are called."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Log one number."""


class _EveryNthStep:
    """Read and log telemetry every n-th step.

    The host waits for the device at those steps only.
    """

    # `MomentOptimizer.register_step_post_hook` then requires telemetry=True.
    reads_telemetry = True

    def __init__(self, every: int, per_parameter: bool) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"Invalid every: {every!r}; expected a number of steps, at least 1")
        self._every = every
        self._per_parameter = per_parameter
        self._calls = 0

    def __call__(self, optimizer: MomentOptimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Log at every n-th call; torch calls this after each step."""
        if not isinstance(optimizer, MomentOptimizer):
            raise TypeError(
                f"Invalid type of optimizer: got {type(optimizer).__module__}.{type(optimizer).__name__}; "
                f"{type(self).__name__} accepts adax_triton's AdaX, AdaXW, Adam and AdamW"
            )
        self._calls += 1
        if self._calls % self._every == 0:
            self._log(self._calls, optimizer.read_telemetry(per_parameter=self._per_parameter))

    def _log(self, step: int, telemetry: StepTelemetry) -> None:
        raise NotImplementedError


class JsonLinesLogger(_EveryNthStep):
    """Appends one JSON line per logged step: `step`, `skipped`, `groups`, `params`.

        optimizer.register_step_post_hook(JsonLinesLogger("telemetry.jsonl", every=100))

    `groups` and `params` hold the fields of `Telemetry`. Numbers that are not finite become null.

    Args:
        path: file to append to. With DTensor parameters every rank needs a logger, because reading is collective; pass
            None on the ranks that must not write.
        every: log every n-th step, counted from the creation of the logger; skipped steps count. Default: 1.
        per_parameter: log each parameter too. Default: False.

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
    """Writes the scalars `PREFIX/skipped`, `PREFIX/group0/grad_norm` and so on.

        optimizer.register_step_post_hook(TensorBoardLogger(SummaryWriter(), every=100))

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, or an object with its `add_scalar`. Pass None on the ranks
            that must not write, see `JsonLinesLogger`.
        every, per_parameter: see `JsonLinesLogger`.
        prefix: first part of each tag. Default: "optimizer".

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
