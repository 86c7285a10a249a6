"""Launch deepspeed_checkpoint_worker.py several times, each time on another number of ranks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ranks import run_ranks

RANKS_OF_LAUNCH = {"0": 1, "1": 2, "2": 1}
ENVIRONMENT = {
    "TRITON_INTERPRET": "0",
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",  # also for loads where DeepSpeed passes weights_only=False
}


def launch(folder: Path, cases: Sequence[dict[str, Any]], launches: Sequence[str]) -> dict[str, Any]:
    """Run cases in a folder; return {case name: [result of each segment]}.

    The folder keeps the files of the cases.
    """
    worker, given = Path(__file__).with_name("deepspeed_checkpoint_worker.py"), folder / "cases.json"
    given.write_text(json.dumps(cases))
    results: dict[str, Any] = {}
    for name in launches:
        arguments, log = [str(given), str(folder), name], folder / f"ranks-{name}.log"
        run_ranks(worker, arguments, RANKS_OF_LAUNCH[name], folder, ENVIRONMENT, log)
        for case, segments in json.loads((folder / f"results-{name}.json").read_text()).items():
            assert isinstance(segments, list), f"{case}: {segments['failure']}"
            results.setdefault(case, []).extend(segments)
    return results
