"""Figures of whatever names: matplotlib takes dollar signs for formulas and leaves out labels that begin with _."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from results import HOSTILE

from malaria_ray.stages import pictures

NAMES = ("S$_$1-1.png", "$\\frac{1}$", "_hidden", "a_{b}^", *HOSTILE[:3])


def test_samples_of_any_name_are_drawn():
    pixels = np.zeros((len(NAMES), 8, 8, 3), np.uint8)
    drawn = [pictures.samples_figure(pixels, titles, "$_$ and $") for titles in (NAMES, ("",) * len(NAMES))]
    assert all(png.startswith(b"\x89PNG") for png in drawn)
    assert drawn[0] != drawn[1]


def test_runs_of_any_name_are_drawn_and_stand_in_the_legends(monkeypatch: pytest.MonkeyPatch):
    history = pd.DataFrame({"epoch": [1, 2], "val_accuracy": [0.5, 0.6], "val_loss": [0.7, 0.6]})
    scores = pd.DataFrame({"label": [0, 1, 0, 1], "score": [0.1, 0.9, 0.6, 0.5]})
    figures = []
    to_png = pictures._png
    monkeypatch.setattr(pictures, "_png", lambda figure: figures.append(figure) or to_png(figure))
    png = pictures.runs_figure(dict.fromkeys(NAMES, history), dict.fromkeys(NAMES[1:], scores))
    assert png.startswith(b"\x89PNG")
    legends = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in figures[0].axes]
    assert legends == [list(NAMES), list(NAMES), list(NAMES[1:])]
