"""The folder of a training run: settings, loss log, checkpoints, resume."""

import json
import os
import shutil
from pathlib import Path
from typing import Any


class RunFolder:
    """Files of a training run; only rank 0 calls methods that write.

    Files: `run.json` (settings), `loss.jsonl` (a record per step), `checkpoints/<tag>/`, `checkpoints/latest` (name of
    the last complete checkpoint), `result.json` (speed of a finished run).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings_file = path / "run.json"
        self.log_file = path / "loss.jsonl"
        self.result_file = path / "result.json"
        self.checkpoints = path / "checkpoints"
        self.latest_file = self.checkpoints / "latest"

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Raise ValueError if the folder holds a run with other settings."""
        if not self.settings_file.exists():
            return
        found = json.loads(self.settings_file.read_text())
        for name in sorted(settings.keys() | found.keys()):
            if settings.get(name) != found.get(name):
                raise ValueError(
                    f"{self.path} holds a run with {name}={found.get(name)!r}, but this run has "
                    f"{name}={settings.get(name)!r}; pass --fresh to replace it, or another --out"
                )

    def prepare(self, settings: dict[str, Any], fresh: bool) -> None:
        """Prepare the folder to start or resume; `fresh` deletes an earlier run."""
        if fresh:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            for file in (self.settings_file, self.log_file, self.result_file):
                file.unlink(missing_ok=True)
        self.check_settings(settings)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        _write_atomically(self.settings_file, json.dumps(settings, indent=2) + "\n")
        self._truncate_log(self.last_step())

    def last_step(self) -> int:
        """Return the step of the last complete checkpoint, or 0."""
        return int(self.latest_file.read_text().removeprefix("step")) if self.latest_file.exists() else 0

    def commit(self, step: int) -> None:
        """Set `latest` to the complete checkpoint of `step` and delete older checkpoints."""
        # DeepSpeed writes this file in place; a kill could leave it empty.
        _write_atomically(self.latest_file, checkpoint_tag(step))
        for folder in self.checkpoints.iterdir():
            if folder.is_dir() and folder.name != checkpoint_tag(step):
                shutil.rmtree(folder)

    def append(self, record: dict[str, float]) -> None:
        """Append a record to the loss log.

        The record is kept if the process is killed.
        """
        with self.log_file.open("a") as log:
            log.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, float]]:
        """Return the records of the loss log without a truncated last line."""
        if not self.log_file.exists():
            return []
        lines = self.log_file.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def write_result(self, result: dict[str, Any]) -> None:
        """Write the speed of a finished run."""
        _write_atomically(self.result_file, json.dumps(result, indent=2) + "\n")

    def result(self) -> dict[str, Any]:
        """Return the saved result, or {} for an unfinished run."""
        return json.loads(self.result_file.read_text()) if self.result_file.exists() else {}

    def _truncate_log(self, step: int) -> None:
        # Steps after the checkpoint are repeated, so their records are removed.
        kept = [json.dumps(record) + "\n" for record in self.records() if record["step"] <= step]
        _write_atomically(self.log_file, "".join(kept))


def checkpoint_tag(step: int) -> str:
    """Return the name of the checkpoint after `step` steps."""
    return f"step{step:07d}"


def _write_atomically(path: Path, text: str) -> None:
    # A rename is atomic: a reader finds the old file or the new file.
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
