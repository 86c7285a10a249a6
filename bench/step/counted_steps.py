"""Run two steps per mode under a profiler of hardware counters.

    ncu --kernel-name regex:adax_step --metrics dram__bytes_read.sum python -m adax_triton.bench.step.counted_steps

Each mode steps one flat tensor. Prints one JSON line per mode, in the order of the launches: the bytes per element that
the counters should show, and on a GPU the bytes that the optimizer allocates. `gpu_check.py` adds the counters.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from adax_triton.bench.harness.command import add_device, count, markdown_table
from adax_triton.bench.harness.providers import OURS, PROVIDERS, RULES
from adax_triton.bench.harness.timing import release

from adax_triton.state.precision import bytes_loaded, bytes_stored

from .measure import make_params

COLUMNS = {
    "bytes_loaded": "read, by formula",
    "read_per_element": "counted",
    "bytes_stored": "written, by formula",
    "written_per_element": "counted",
    "gb_per_s": "GB/s",
    "dram_percent_of_peak": "% of peak",
    "registers": "registers",
    "warps_percent_of_most": "% of warps",
    "state_bytes": "state, by formula",
    "allocated_per_element": "allocated",
}
STEPS = 2  # the first starts from zero states


def main() -> int:
    """Step in every mode, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=count, default=100_000_000, help="elements; default: %(default)s")
    add_device(parser)
    arguments = parser.parse_args()
    device, numel = arguments.device, arguments.numel
    for provider in (one for one in PROVIDERS if one.name == OURS):
        mode = provider.mode
        params = make_params([(numel,)], device, seed=1, dtype=mode.param_dtype)
        before = torch.cuda.memory_allocated()  # 0 on a CPU
        step = provider.build(params, RULES[provider.second_moment])
        for _ in range(STEPS):
            step()
        expected = {
            **{"mode": mode.name, "numel": numel, "launches": STEPS},
            "bytes_loaded": bytes_loaded(mode.param_dtype, mode.param_dtype, mode.precision),
            "bytes_stored": bytes_stored(mode.param_dtype, mode.precision),
            "state_bytes": mode.state_bytes,
            "allocated_per_element": (torch.cuda.memory_allocated() - before) / numel,
        }
        print(json.dumps(expected), flush=True)
        del step, params
        release(device)
    return 0


def table(result: dict[str, Any]) -> str:
    """Return the counters as Markdown; bytes are per element."""
    rows = [[row["mode"], *(f"{row[key]:.4g}" for key in COLUMNS)] for row in result["rows"]]
    return "\n".join(markdown_table(["mode", *COLUMNS.values()], rows))


if __name__ == "__main__":
    sys.exit(main())
