"""The figures that stages leave as PNG. Each takes arrays and returns the bytes of the file."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.text import Text

from malaria_ray.cells.images import Pixels
from malaria_ray.schema import RESEARCH_ONLY
from malaria_ray.statistics.metrics import roc_curve

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


def augmented_figure(originals: Pixels, changed: Sequence[Pixels], heading: str) -> bytes:
    """Each training image above what the first epochs make of it. `originals` and each of `changed`: six images."""
    captions = ["as it is", *(f"epoch {epoch}" for epoch in range(1, len(changed) + 1))]
    pixels = np.concatenate([originals, *changed])
    return samples_figure(pixels, [caption for caption in captions for _ in originals], heading)


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


def runs_figure(histories: dict[str, pd.DataFrame], scores: dict[str, pd.DataFrame]) -> bytes:
    """Validation accuracy and loss of runs over their epochs, and the ROC of `scores` (columns label, of both classes,
    and score).
    """
    figure = Figure(figsize=(15 if scores else 10, 4.2), layout="constrained")
    figure.suptitle(RESEARCH_ONLY, fontsize=10)
    axes = figure.subplots(1, 3 if scores else 2)
    for axis, name in zip(axes, ("val_accuracy", "val_loss"), strict=False):
        for history in histories.values():
            axis.plot(history["epoch"], history[name], marker="o", markersize=3)
        axis.set_xlabel("epoch")
        axis.set_ylabel(name)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for cells in scores.values():
        curve = roc_curve(cells["label"].astype(int), cells["score"])
        axes[2].plot(curve["false_positive_rate"], curve["sensitivity"])
        axes[2].set_xlabel("1 - specificity, test split")
        axes[2].set_ylabel("sensitivity")
    for axis, names in zip(axes, (histories, histories, scores), strict=False):
        axis.grid(alpha=0.3)
        axis.legend(axis.get_lines(), list(names), fontsize=7)  # as labels, names that begin with _ would be left out
    return _png(figure)


def _png(figure: Figure) -> bytes:
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names may hold dollar signs
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
