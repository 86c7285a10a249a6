"""Compare memory per parameter of AdaXW's modes and of other optimizers.

The table includes weights, gradients and optimizer states, but no activations and buffers. The bytes of AdaXW come
from `adax_triton.state.precision`; tests compare them with real tensors. The bytes of other optimizers follow from
their formats: one scale per 32 elements in FlashOptim, per 256 in bitsandbytes and torchao.

    adax-triton bench memory --figure docs/memory.png
    adax-triton bench memory --deepspeed ds_config.json --gpus 8
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
from adax_triton.bench.harness.command import markdown_table
from adax_triton.bench.memory import deepspeed as deepspeed_memory

from adax_triton.state.precision import Precision, bytes_by_state

PARAMETERS = (7e9, 70e9)
PARTS = ("weights", "gradients", "master weights", "first moment", "second moment")
COLOURS = ("#475569", "#94a3b8", "#f59e0b", "#2563eb", "#0d9488")


class Setup(NamedTuple):
    """A way to train 16-bit weights.

    `parts` are its bytes per parameter, in the order of PARTS.
    """

    name: str
    parts: tuple[float, ...]

    @property
    def total(self) -> float:
        """Bytes per parameter of all parts."""
        return sum(self.parts)


def _adax_triton_setup(states: str, master_weights: str | None, name: str) -> Setup:
    kept = bytes_by_state(torch.bfloat16, Precision(states, master_weights))
    second = kept["exp_avg_sq"] + kept.get("group_exponents", 0.0)
    return Setup(f"adax_triton, {name}", (2.0, 2.0, kept.get("master", 0.0), kept["exp_avg"], second))


SETUPS = (
    Setup("AdamW, float32 master copy", (2.0, 2.0, 4.0, 4.0, 4.0)),
    _adax_triton_setup("float32", "float32", "float32, 32-bit masters"),
    _adax_triton_setup("bfloat16", "float32", "bfloat16, 32-bit masters"),
    _adax_triton_setup("bfloat16", "24bit", "bfloat16, 24-bit masters"),
    _adax_triton_setup("8bit_v16", "24bit", "8bit_v16, 24-bit masters"),
    Setup("FlashOptim, 24-bit masters", (2.0, 2.0, 1.0, 1.0 + 2 / 32, 1.0 + 2 / 32)),
    _adax_triton_setup("8bit", "24bit", "8bit, 24-bit masters"),
    _adax_triton_setup("8bit_v16", None, "8bit_v16, no masters"),
    Setup("bitsandbytes 8-bit, no masters", (2.0, 2.0, 0.0, 1.0 + 4 / 256, 1.0 + 4 / 256)),
    Setup("torchao 8-bit, no masters", (2.0, 2.0, 0.0, 1.0 + 4 / 256, 1.0 + 4 / 256)),
    _adax_triton_setup("8bit", None, "8bit, no masters"),
)


def markdown() -> str:
    """Return the table of all setups, in bytes and gigabytes.

    Bytes are per parameter, gigabytes are of models of `PARAMETERS`.
    """
    sizes = [f"{count / 1e9:.0f}B, GB" for count in PARAMETERS]
    titles, rows = ["", *PARTS, "bytes", *sizes], []
    for name, parts in SETUPS:
        figures = [f"{part:.3g}" if part else "" for part in parts]
        rows.append([name, *figures, f"{sum(parts):.2f}", *(f"{sum(parts) * n / 1e9:.0f}" for n in PARAMETERS)])
    return "\n".join(markdown_table(titles, rows, right=range(1, len(titles))))


def draw(path: Path) -> None:
    """Draw the table as stacked bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for index, (part, colour) in enumerate(zip(PARTS, COLOURS, strict=True)):
        left = [sum(setup.parts[:index]) for setup in SETUPS]
        widths = [setup.parts[index] for setup in SETUPS]
        axes.barh([setup.name for setup in SETUPS], widths, left=left, color=colour, label=part, height=0.66)
    for row, setup in enumerate(SETUPS):
        sizes = ", ".join(f"{n / 1e9:.0f}B: {setup.total * n / 1e9:,.0f} GB" for n in PARAMETERS)
        axes.text(setup.total + 0.15, row, f"{setup.total:.2f}   {sizes}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 22.5)
    axes.set_xlabel("bytes per parameter: weights, gradients and optimizer states")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(PARTS), fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `adax-triton bench memory`."""
    parser.add_argument("--figure", type=Path, help="draw the table into this file, such as memory.png")
    parser.add_argument("--deepspeed", type=Path, help="print the memory of this DeepSpeed configuration instead")
    parser.add_argument("--gpus", type=int, default=1, help="with --deepspeed: number of GPUs (default: 1)")


def main(arguments: argparse.Namespace) -> int:
    """Print the table, or the memory of a DeepSpeed configuration.

    --figure also draws the table.
    """
    if arguments.deepspeed is not None:
        try:
            print(deepspeed_memory.markdown(json.loads(arguments.deepspeed.read_text()), arguments.gpus))
        except (OSError, ValueError) as error:
            raise SystemExit(f"--deepspeed {str(arguments.deepspeed)!r}: {error}") from error
        return 0
    print(markdown())
    if arguments.figure is not None:
        draw(arguments.figure)
    return 0
