"""Charts as SVG text, drawn by hand: they take their colours from the page's CSS, so they follow dark mode and print,
and carry a title and a description for screen readers.

Every function takes numbers and words and returns one `<svg>` element; nothing is read or written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import ArrayLike

WIDTH, HEIGHT = 420, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 42


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis: what it shows and from where to where; `is_whole` where there is nothing between 1 and 2."""

    label: str
    low: float = 0.0
    high: float = 1.0
    is_whole: bool = False

    def ticks(self) -> list[float]:
        """About five round numbers within the axis."""
        raw = (self.high - self.low) / 5 or 1.0
        raw = max(raw, 1.0) if self.is_whole else raw
        power = 10.0 ** np.floor(np.log10(raw))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
        first = np.ceil(self.low / step - 1e-9) * step
        return [float(tick) for tick in np.arange(first, self.high + step * 1e-6, step)]


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line (or dots) through points; `style` is a CSS class: one, two, three or faint. `low` and `high`: whiskers."""

    name: str
    x: ArrayLike
    y: ArrayLike
    style: str = "one"
    has_line: bool = True
    has_dots: bool = False
    low: ArrayLike | None = None
    high: ArrayLike | None = None
    notes: Sequence[str] = field(default_factory=tuple)
    """What each dot says when it is pointed at."""


def line_chart(
    title: str,
    description: str,
    series: Sequence[Series],
    *,
    x: Axis,
    y: Axis,
    marks: Sequence[tuple[float, str]] = (),
    width: int = WIDTH,
    has_legend: bool = True,
    x_ticks: bool = True,
) -> Markup:
    """Lines, dots and whiskers over two axes; `marks` are vertical lines at an x with their words."""
    frame = _Frame(x, y, width)
    drawn = [frame.axes(x_ticks=x_ticks)]
    for place, words in marks:
        at = frame.across(place)
        drawn.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        side = f'x="{at + 4:.1f}"' if place <= (x.low + x.high) / 2 else f'x="{at - 4:.1f}" text-anchor="end"'
        drawn.append(f'<text class="mark" {side} y="{_TOP + 10}">{escape(words)}</text>')
    for one in series:
        drawn.append(_drawn_series(one, frame))
    legend, more = _legend([(one.name, _key(one)) for one in series], frame) if has_legend else ("", 0)
    return _svg(title, description, "".join(drawn) + legend, width, HEIGHT + more)


def histogram(
    title: str, description: str, edges: Sequence[float], groups: Sequence[tuple[str, str, Sequence[int]]], *, x: Axis
) -> Markup:
    """Bars stacked by group over bins; `groups`: (name, style, count in each bin), `edges`: one more than bins."""
    total = np.sum([counts for _, _, counts in groups], axis=0)
    frame = _Frame(x, Axis(label="cells", high=float(max(1, total.max())), is_whole=True), WIDTH)
    below = np.zeros(len(total))
    drawn = [frame.axes()]
    for name, style, counts in groups:
        for start, end, base, count in zip(edges[:-1], edges[1:], below, counts, strict=True):
            if count:
                left, right = frame.across(start), frame.across(end)
                top, bottom = frame.up(base + count), frame.up(base)
                note = escape(f"{name}, {start:g} to {end:g}: {count:,}")
                drawn.append(
                    f'<rect class="{style}" x="{left + 0.5:.1f}" y="{top:.1f}" width="{right - left - 1:.1f}" '
                    f'height="{max(bottom - top, 0.7):.1f}"><title>{note}</title></rect>'
                )
        below += np.asarray(counts)
    keys = [(name, f'<rect class="{style}" y="-9" width="22" height="10"/>') for name, style, _ in groups]
    legend, more = _legend(keys, frame)
    return _svg(title, description, "".join(drawn) + legend, WIDTH, HEIGHT + more)


@dataclass(frozen=True)
class _Frame:
    """From numbers to places in the picture."""

    x: Axis
    y: Axis
    width: int

    def across(self, value: float) -> float:
        share = (value - self.x.low) / ((self.x.high - self.x.low) or 1)
        return float(_LEFT + share * (self.width - _LEFT - _RIGHT))

    def up(self, value: float) -> float:
        share = (value - self.y.low) / ((self.y.high - self.y.low) or 1)
        return float(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM))

    def axes(self, *, x_ticks: bool = True) -> str:
        right, bottom = self.width - _RIGHT, HEIGHT - _BOTTOM
        drawn = []
        for tick in self.y.ticks():
            at = self.up(tick)
            drawn.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
            drawn.append(f'<text class="tick end" x="{_LEFT - 6}" y="{at + 4:.1f}">{_tick(tick)}</text>')
        for tick in self.x.ticks() if x_ticks else ():
            at = self.across(tick)
            drawn.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
            drawn.append(f'<text class="tick middle" x="{at:.1f}" y="{bottom + 16}">{_tick(tick)}</text>')
        middle = (_TOP + bottom) / 2
        drawn.append(
            f'<text class="axis middle" x="{(_LEFT + right) / 2:.1f}" y="{HEIGHT - 8}">{escape(self.x.label)}</text>'
        )
        drawn.append(
            f'<text class="axis middle" x="13" y="{middle:.1f}" transform="rotate(-90 13 {middle:.1f})">'
            f"{escape(self.y.label)}</text>"
        )
        return "".join(drawn)


def _drawn_series(one: Series, frame: _Frame) -> str:
    x, y = np.asarray(one.x, float), np.asarray(one.y, float)
    drawn = []
    if one.has_line:
        points = " ".join(f"{frame.across(a):.1f},{frame.up(b):.1f}" for a, b in zip(x, y, strict=True))
        drawn.append(f'<polyline class="{one.style}" points="{points}"/>')
    if one.low is not None and one.high is not None:
        for a, low, high in zip(x, np.asarray(one.low, float), np.asarray(one.high, float), strict=True):
            at = frame.across(a)
            drawn.append(
                f'<line class="{one.style} whisker" x1="{at:.1f}" x2="{at:.1f}" '
                f'y1="{frame.up(low):.1f}" y2="{frame.up(high):.1f}"/>'
            )
    if one.has_dots:
        for i, (a, b) in enumerate(zip(x, y, strict=True)):
            note = f"<title>{escape(one.notes[i])}</title>" if one.notes else ""
            drawn.append(
                f'<circle class="{one.style}" cx="{frame.across(a):.1f}" cy="{frame.up(b):.1f}" r="3">{note}</circle>'
            )
    return "".join(drawn)


def _key(one: Series) -> str:
    """The line of a series, its dashes with it, or a dot: what tells series apart without colours."""
    if one.has_line:
        return f'<polyline class="{one.style}" points="0,-4 22,-4"/>'
    return f'<circle class="{one.style}" cx="6" cy="-4" r="3"/>'


def _legend(keys: Sequence[tuple[str, str]], frame: _Frame) -> tuple[str, int]:
    """Rows of (name, key drawn left of and on the baseline) below the axis' label, as many as the names need, and their
    height; nothing for one series alone.
    """
    if len(keys) < 2:
        return "", 0
    drawn, at, row = [], float(_LEFT), 0
    for name, key in keys:
        width = 40 + 6.2 * len(name)
        if at > _LEFT and at + width > frame.width - _RIGHT:
            at, row = float(_LEFT), row + 1
        place = f"translate({at:.1f} {HEIGHT + 13 + 18 * row})"
        drawn.append(f'<g transform="{place}">{key}<text class="tick" x="27">{escape(name)}</text></g>')
        at += width
    return "".join(drawn), 20 + 18 * row


def _svg(title: str, description: str, drawn: str, width: int, height: int) -> Markup:
    name = re.sub(r"\W+", "-", title.lower())  # ids within a page: no two of its charts have one title
    size = "chart wide" if width > WIDTH else "chart"
    return Markup(
        f'<svg class="{size}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(description)}</desc>{drawn}</svg>'
    )


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}" if abs(value) > 1e-12 else "0"
