"""Where and of what a result was measured, in one line."""

from __future__ import annotations

from typing import Any


def origin(result: dict[str, Any]) -> str:
    """Return machine, versions, commit and date of a result."""
    environment = result["environment"]
    threads = [f"{environment['threads']} threads"] if "threads" in environment else []
    versions = [f"{name} {environment[name]}" for name in ("torch", "triton", "deepspeed") if environment.get(name)]
    described = [
        environment["device"],
        *threads,
        *versions,
        f"commit {environment['commit']}",
        environment["date"][:10],
    ]
    return ", ".join(described)
