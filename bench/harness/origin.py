"""Where and of what a result was measured, in one line."""

from __future__ import annotations

from typing import Any


def origin(result: dict[str, Any]) -> str:
    """Return machine, versions, commit and date of a result."""
    environment = result["environment"]
    count = environment.get("threads")
    threads = [] if count is None else [f"{count} thread{'' if count == 1 else 's'}"]
    versions = [f"{name} {environment[name]}" for name in ("torch", "triton", "deepspeed") if environment.get(name)]
    driver = [f"driver {environment['driver']}"] if environment.get("driver") else []
    described = [
        environment["device"],
        *driver,
        *threads,
        *versions,
        f"commit {environment['commit']}",
        environment["date"][:10],
    ]
    return ", ".join(described)
