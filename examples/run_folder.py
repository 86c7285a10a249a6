"""The folder of one training run: its settings, its loss log, its checkpoints, and how to go on after a kill."""

import json
import os
import shutil
from pathlib import Path
from typing import Any


class RunFolder:
    """What one run leaves on disk; only the first rank calls the methods that write.

    Files: `run.json` (settings), `loss.jsonl` (one record per step), `checkpoints/<tag>/` with `checkpoints/latest`
    naming the last complete one, `result.json` (speed, when the run is finished).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings_file = path / "run.json"
        self.log_file = path / "loss.jsonl"
        self.result_file = path / "result.json"
        self.checkpoints = path / "checkpoints"
        self.latest_file = self.checkpoints / "latest"

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Raise ValueError when the folder holds a run with other settings: the two must not be mixed."""
        if not self.settings_file.exists():
            return
        found = json.loads(self.settings_file.read_text())
        for name in sorted(settings.keys() | found.keys()):
            if settings.get(name) != found.get(name):
                raise ValueError(
                    f"{self.path} holds a run with {name}={found.get(name)!r}, now {name}={settings.get(name)!r}: "
                    "give --fresh to replace it, or another --out"
                )

    def prepare(self, settings: dict[str, Any], fresh: bool) -> None:
        """Make the folder ready to start or to go on; with `fresh`, drop an earlier run's files and nothing else."""
        if fresh:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            for file in (self.settings_file, self.log_file, self.result_file):
                file.unlink(missing_ok=True)
        self.check_settings(settings)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        _write_whole(self.settings_file, json.dumps(settings, indent=2) + "\n")
        self._cut_log(self.last_step())

    def last_step(self) -> int:
        """Return the step of the last complete checkpoint, 0 when there is none."""
        return int(self.latest_file.read_text().removeprefix("step")) if self.latest_file.exists() else 0

    def commit(self, step: int) -> None:
        """Name the checkpoint of `step`, whose files are complete, as the one to resume from; drop older ones."""
        # DeepSpeed writes this file in place, which a kill can leave empty.
        _write_whole(self.latest_file, checkpoint_tag(step))
        for folder in self.checkpoints.iterdir():
            if folder.is_dir() and folder.name != checkpoint_tag(step):
                shutil.rmtree(folder)

    def append(self, record: dict[str, float]) -> None:
        """Add one record to the loss log and hand it to the operating system, where a kill cannot reach it."""
        with self.log_file.open("a") as log:
            log.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, float]]:
        """Return the loss log; a last line cut short by a kill is left out."""
        if not self.log_file.exists():
            return []
        lines = self.log_file.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def write_result(self, result: dict[str, Any]) -> None:
        """Keep what was measured in a finished run."""
        _write_whole(self.result_file, json.dumps(result, indent=2) + "\n")

    def result(self) -> dict[str, Any]:
        """Return what `write_result` wrote; nothing when a kill came between the last checkpoint and it."""
        return json.loads(self.result_file.read_text()) if self.result_file.exists() else {}

    def _cut_log(self, step: int) -> None:
        # Steps after the checkpoint are trained again and log themselves again.
        kept = [json.dumps(record) + "\n" for record in self.records() if record["step"] <= step]
        _write_whole(self.log_file, "".join(kept))


def checkpoint_tag(step: int) -> str:
    """Return the name of the checkpoint taken after `step` steps."""
    return f"step{step:07d}"


def _write_whole(path: Path, text: str) -> None:
    # A rename is atomic: a reader finds the old file or the new one, never half of one.
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
