"""The figures that stages leave as PNG. Each takes arrays and returns the bytes of the file."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from malaria_ray.cells.images import Pixels
from malaria_ray.schema import RESEARCH_ONLY

_TRAIN, _VAL = "#1b6ca8", "#c8553d"


def samples_figure(pixels: Pixels, titles: Sequence[str], heading: str) -> bytes:
    """A grid of cells. `pixels`: uint8 (n, size, size, 3), RGB; `titles`: n captions."""
    n_columns = 6
    n_rows = max(1, -(-len(titles) // n_columns))
    figure = Figure(figsize=(1.7 * n_columns, 2.05 * n_rows + 0.6), layout="constrained")
    figure.suptitle(heading, fontsize=11)
    axes = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, image, title in zip(axes, pixels, titles, strict=False):
        axis.imshow(image)
        axis.set_title(title, fontsize=7)
    return _png(figure)


def learning_curves_figure(history: pd.DataFrame, *, best_epoch: int, heading: str) -> bytes:
    """Accuracy and loss over the epochs, training and validation, the best epoch marked. `history`: the HISTORY
    columns.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"{heading} · {RESEARCH_ONLY}", fontsize=10)
    for axis, name in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        for split, colour in (("train", _TRAIN), ("val", _VAL)):
            axis.plot(
                history["epoch"],
                history[f"{split}_{name}"],
                marker="o",
                markersize=3,
                color=colour,
                label=split,
            )
        axis.axvline(best_epoch, color="0.5", linestyle=":", label=f"best epoch {best_epoch}")
        axis.set_xlabel("epoch")
        axis.set_ylabel(name)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
