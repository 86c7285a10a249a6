"""Plot the loss curves of several runs."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce")  # distinct in print and for colour-blind readers


class Curve:
    """The loss log of one run.

    Args:
        label: name in the legend.
        records: one dict per step with "step" and "loss". Some records, including the last, also have
            "validation_loss".
    """

    def __init__(self, label: str, records: list[dict[str, float]]) -> None:
        self.label = label
        self.steps = [record["step"] for record in records]
        self.losses = [record["loss"] for record in records]
        validated = [record for record in records if "validation_loss" in record]
        self.validation_steps = [record["step"] for record in validated]
        self.validation_losses = [record["validation_loss"] for record in validated]
        self.final_validation_loss = self.validation_losses[-1]


def smooth(values: list[float], half_width: int) -> list[float]:
    """Return centred moving averages; the window shrinks at both ends."""
    smoothed = []
    for index in range(len(values)):
        reach = min(index, half_width)
        window = values[index - reach : index + reach + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed


def draw_losses(curves: list[Curve], path: Path, title: str, subtitle: str) -> None:
    """Plot raw and smoothed training losses and validation losses to a PNG."""
    figure = Figure(figsize=(9, 5.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for curve, colour in zip(curves, COLOURS, strict=False):
        axes.plot(curve.steps, curve.losses, color=colour, alpha=0.2, linewidth=0.8)
        smoothed = smooth(curve.losses, half_width=len(curve.losses) // 40)
        label = f"{curve.label}: final validation loss {curve.final_validation_loss:.3f}"
        axes.plot(curve.steps, smoothed, color=colour, linewidth=1.8, label=label)
        axes.plot(curve.validation_steps, curve.validation_losses, "o", color=colour, markersize=6, mec="white")
    axes.plot([], [], "o", color="grey", markersize=6, mec="white", label="dots: validation; faint: raw training loss")
    axes.set_yscale("log")  # shows small differences late in training
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per byte)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.suptitle(title, fontsize=13)
    axes.set_title(subtitle, fontsize=9, color="dimgrey")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
