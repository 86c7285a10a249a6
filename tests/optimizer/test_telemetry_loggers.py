"""Telemetry loggers as step hooks write the values of `read_telemetry`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from adax_triton import Adam, AdamW, AdaX, AdaXW
from adax_triton.step.telemetry import StepTelemetry, Telemetry
from adax_triton.telemetry_loggers import JsonLinesLogger, TensorBoardLogger

CLASSES = (AdaX, AdaXW, Adam, AdamW)
LOGGERS = (JsonLinesLogger, TensorBoardLogger)


class RecordingWriter:
    """Records the scalars that `SummaryWriter` would write."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        assert type(scalar_value) is float
        self.scalars.append((tag, scalar_value, global_step))


def make(optimizer_class: type, device: torch.device) -> tuple[nn.Module, AdaX]:
    torch.manual_seed(0)
    model = nn.Linear(5, 3).to(device)
    groups = [{"params": [("weight", model.weight)]}, {"params": [("bias", model.bias)], "lr": 0.1}]
    return model, optimizer_class(groups, telemetry=True, fused=True)


def take_step(model: nn.Module, optimizer: AdaX, scaler: torch.amp.GradScaler, value: float = 1.0) -> StepTelemetry:
    optimizer.zero_grad()
    loss = model(torch.full((2, 5), value, device=model.weight.device)).square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return optimizer.read_telemetry(per_parameter=True)


def from_json(numbers: dict[str, float | None]) -> Telemetry:
    return Telemetry(**{name: math.inf if value is None else value for name, value in numbers.items()})


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_json_lines_equal_read_telemetry(optimizer_class: type, tmp_path: Path, backend: torch.device) -> None:
    model, optimizer = make(optimizer_class, backend)
    path = tmp_path / "telemetry.jsonl"
    optimizer.register_step_post_hook(JsonLinesLogger(path, every=2, per_parameter=True))
    optimizer.register_step_post_hook(JsonLinesLogger(str(tmp_path / "groups.jsonl")))
    scaler = torch.amp.GradScaler(backend.type, init_scale=64.0)
    taken = [take_step(model, optimizer, scaler, value) for value in (1.0, 2.0, 3.0, math.inf, 1.0)]
    assert [step.skipped for step in taken] == [False, False, False, True, False]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[0] == json.loads(json.dumps({"step": 2, **as_lists(taken[1])}))
    assert lines[1]["skipped"] is True
    for numbers in (*lines[1]["groups"], *lines[1]["params"].values()):
        assert numbers["grad_norm"] is None and numbers["update_norm"] == 0.0 and numbers["nonfinite_grads"] > 0
    every = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert [line["step"] for line in every] == [1, 2, 3, 4, 5]
    assert all(line["params"] == {} for line in every)
    assert [from_json(group) for group in every[4]["groups"]] == taken[4].groups


def as_lists(step: StepTelemetry) -> dict[str, object]:
    params = {name: numbers._asdict() for name, numbers in step.params.items()}
    return {"skipped": step.skipped, "groups": [group._asdict() for group in step.groups], "params": params}


def test_json_lines_are_appended_to_a_file(tmp_path: Path, backend: torch.device) -> None:
    path = tmp_path / "telemetry.jsonl"
    path.write_text('{"step": 0}\n')
    model, optimizer = make(AdaX, backend)
    optimizer.register_step_post_hook(JsonLinesLogger(path))
    take_step(model, optimizer, torch.amp.GradScaler(backend.type))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1]


def expected_scalars(step: StepTelemetry, prefix: str) -> dict[str, float]:
    owners = {**{f"group{index}": group for index, group in enumerate(step.groups)}, **step.params}
    found = {
        f"{prefix}/{owner}/{name}": v for owner, numbers in owners.items() for name, v in numbers._asdict().items()
    }
    return found | {f"{prefix}/skipped": float(step.skipped)}


def test_writer_gets_all_scalars_with_their_tags(backend: torch.device) -> None:
    model, optimizer = make(AdaXW, backend)
    every, third = RecordingWriter(), RecordingWriter()
    optimizer.register_step_post_hook(TensorBoardLogger(every, per_parameter=True))
    optimizer.register_step_post_hook(TensorBoardLogger(third, every=3, prefix="run/opt"))
    scaler = torch.amp.GradScaler(backend.type)
    taken = [take_step(model, optimizer, scaler, float(value)) for value in range(1, 5)]
    for number, step in enumerate(taken, start=1):
        assert {tag: value for tag, value, at in every.scalars if at == number} == expected_scalars(step, "optimizer")
    assert {at for _, _, at in third.scalars} == {3}
    assert {tag: value for tag, value, _ in third.scalars} == expected_scalars(taken[2]._replace(params={}), "run/opt")


def test_tensorboard_reads_the_logged_values(tmp_path: Path, backend: torch.device) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model, optimizer = make(AdaX, backend)
    with SummaryWriter(str(tmp_path)) as writer:
        optimizer.register_step_post_hook(TensorBoardLogger(writer, per_parameter=True))
        taken = [take_step(model, optimizer, torch.amp.GradScaler(backend.type), value) for value in (1.0, 2.0)]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(expected_scalars(taken[0], "optimizer"))
    for number, step in enumerate(taken, start=1):
        for tag, value in expected_scalars(step, "optimizer").items():
            assert {event.step: event.value for event in events.Scalars(tag)}[number] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("logger_class", LOGGERS)
@pytest.mark.parametrize("every", [0, -1, 1.0, True, "2", None])
def test_invalid_interval_raises(logger_class: type, every: object) -> None:
    with pytest.raises(ValueError, match="every"):
        logger_class(None, every=every)


@pytest.mark.parametrize("logger_class", LOGGERS)
def test_registering_without_telemetry_raises(logger_class: type) -> None:
    optimizer = AdaX([torch.ones(3)])
    with pytest.raises(RuntimeError, match=f"{logger_class.__name__} logs telemetry.*telemetry=True"):
        optimizer.register_step_post_hook(logger_class(None, every=2))
    assert not optimizer._optimizer_step_post_hooks
    optimizer.register_step_post_hook(lambda *_: None)


@pytest.mark.parametrize("logger_class", LOGGERS)
def test_logging_another_optimizer_raises(logger_class: type) -> None:
    optimizer = torch.optim.AdamW([torch.ones(3, requires_grad=True)])
    optimizer.register_step_post_hook(logger_class(None, every=2))
    with pytest.raises(TypeError, match=r"got torch\.optim\.adamw\.AdamW; .*accepts adax_triton's"):
        optimizer.step()


@pytest.mark.parametrize("logger_class", LOGGERS)
def test_path_none_reads_telemetry_and_writes_nothing(
    logger_class: type, tmp_path: Path, backend: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, optimizer = make(AdaX, backend)
    reads = []
    read = optimizer.read_telemetry
    monkeypatch.setattr(optimizer, "read_telemetry", lambda per_parameter: reads.append(1) or read(per_parameter))
    optimizer.register_step_post_hook(logger_class(None))
    optimizer.register_step_post_hook(logger_class(None, every=2))
    for _ in range(2):
        take_step_of(model, optimizer)
    assert len(reads) == 3 and list(tmp_path.iterdir()) == []


def take_step_of(model: nn.Module, optimizer: AdaX) -> None:
    optimizer.zero_grad()
    model(torch.ones(1, 5, device=model.weight.device)).sum().backward()
    optimizer.step()
