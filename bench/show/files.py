"""What a report is written as, besides text: PNG of a figure, Parquet of the runs.

``png(plot)`` and ``parquet(comparison)`` give bytes; ``bench.show.report`` writes them.
"""

from __future__ import annotations

import io
from pathlib import Path

from bench.judge.comparison import Comparison
from bench.show.drawing import Plot
from bench.show.tables import run_fields

PNG_ZOOM = 2
"""Pixels for each unit of the figure: sharp on a screen of high density, and in a slide."""
INK_ON_WHITE, PAPER = "#1b1f24", "#ffffff"
"""A PNG has no page around it whose colours it could take."""


def png(plot: Plot) -> bytes:
    """A figure as PNG, on white, with the font that matplotlib brings: the same on every machine."""
    import resvg_py
    from matplotlib import get_data_path

    fonts = Path(get_data_path()) / "fonts" / "ttf"
    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=plot.svg.replace("currentColor", INK_ON_WHITE),
            background=PAPER,
            zoom=PNG_ZOOM,
            skip_system_fonts=True,
            font_files=[str(fonts / "DejaVuSans.ttf"), str(fonts / "DejaVuSans-Bold.ttf")],
            sans_serif_family="DejaVu Sans",
        )
    )


def parquet(comparison: Comparison) -> bytes:
    """Every field of every run, raw and typed, one run a row. Null: not observed. NaN: observed, and not a
    number."""
    import pyarrow
    from pyarrow import parquet as format_

    rows = [dict(run_fields(row, comparison)) for row in comparison.rows]
    columns = {name: _column([row.get(name) for row in rows]) for name in (rows[0] if rows else {})}
    buffer = io.BytesIO()
    format_.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def _column(values: list[object]) -> list[object]:
    """One type a column: whole numbers become floats where others of the column are."""
    if any(isinstance(value, float) for value in values):
        return [float(value) if isinstance(value, int) else value for value in values]
    return values
