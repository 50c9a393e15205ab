"""Copies of a cell: the same bytes under several names, no evidence more than one."""

from __future__ import annotations

import pandas as pd

COPY_OF = ("content_digest", "patient_id", "label")
"""Cells that agree in these are one cell."""


def is_copy(cells: pd.DataFrame, *columns: str) -> pd.Series:
    """Whether an earlier row agrees with each in `COPY_OF` and in `columns`. A cell without a digest is no copy.

    `cells`: the columns of `COPY_OF` and `columns`, one row per cell. Returns: bool, with the index of `cells`.
    """
    return cells["content_digest"].notna() & cells.duplicated([*COPY_OF, *columns])
