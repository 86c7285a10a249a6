"""Run a sharding worker on several ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paths import SUPPORT
from ranks import run_ranks

Results = dict[str, list[dict[str, Any]]]


def launch(
    folder: Path,
    world_size: int,
    cases: dict[str, dict[str, Any]],
    interpret: str = "0",
    worker: str = "sharding_worker.py",
) -> Results:
    """Run a worker on all ranks; return {case: [result of each rank]}."""
    own = folder / f"{world_size}-{interpret}"
    own.mkdir()
    (own / "cases.json").write_text(json.dumps([{**case, "name": name} for name, case in cases.items()]))
    arguments = [str(own / "cases.json"), str(own / "store"), str(folder)]
    script, log = SUPPORT / worker, own / "ranks.log"
    try:
        run_ranks(script, arguments, world_size, folder, {"TRITON_INTERPRET": interpret}, log)
    finally:
        # Show a rank's own failure before its exit code.
        written = [own / f"{rank}.json" for rank in range(world_size)]
        results = [json.loads(path.read_text()) if path.exists() else {} for path in written]
        failures = [case["failure"] for result in results for case in result.values() if "failure" in case]
        assert not failures, "\n".join(failures)
    return {name: [result[name] for result in results] for name in cases}
