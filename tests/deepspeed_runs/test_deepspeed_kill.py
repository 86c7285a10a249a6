"""Killing a rank anytime loses only steps since the last checkpoint.

Oracle: the same run without kills; losses, weights, states and schedule are compared bit for bit. One launch of
deepspeed_kill_server.py makes all kills. The environment variables KILLS and KILL_SEED set their number and the random
seed. By default each kind of kill happens once, with a fixed seed. `make soak` makes hundreds.
"""

import json
import os
from typing import Any

import pytest
from paths import SUPPORT
from ranks import run_ranks

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.deepspeed

KILLS = int(os.environ.get("KILLS", "3"))
SEED = int(os.environ.get("KILL_SEED", "0"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kills")
    print(f"KILLS={KILLS} KILL_SEED={SEED}")
    script, arguments = SUPPORT / "deepspeed_kill_server.py", [str(folder), str(KILLS), str(SEED)]
    run_ranks(script, arguments, 1, folder, {"TRITON_INTERPRET": "0"}, folder / "log", timeout=60 + 20 * KILLS)
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    print(f"{len(found['kills'])} kills in {found['runs']} runs, {found['seconds']:.0f} s")
    return found


def test_killed_run_continues_exactly(results: dict[str, Any]) -> None:
    assert results["failures"] == [], f"KILL_SEED={SEED}"
    assert len(results["kills"]) == KILLS
    assert {kill["way"] for kill in results["kills"]} == {"step", "bytes", "operation"}


def test_only_steps_since_the_last_checkpoint_are_lost(results: dict[str, Any]) -> None:
    lost = [kill["lost"] for kill in results["kills"]]
    assert max(lost) == 2  # steps from checkpoint to checkpoint


def test_damaged_checkpoint_raises_if_named_and_is_skipped_otherwise(results: dict[str, Any]) -> None:
    damaged = results["damaged"]
    assert len(damaged["refused"]) == 2  # on both ranks
    for message in damaged["refused"]:
        assert "global_step10 is not a complete checkpoint; complete checkpoints: global_step8, global_step6" in message
    assert damaged["loaded"] == [8]
    assert damaged["warned"]
    assert damaged["problems"] == []
