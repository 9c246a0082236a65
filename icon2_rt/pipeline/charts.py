"""Charts as inline SVG: enough for a run's report, with nothing to install or load, and colours that CSS decides.

Every shape has a class (``chosen``, ``rejected``, ``neutral``, or ``s0`` … ``s7`` for criteria) and no colour of its
own: ``charts.css`` has them, so that one page is readable in a light and in a dark theme. Lines differ in their dashes
too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files

# One chart's own coordinates. It is about as wide as a phone, so that its letters are as large as the text around it.
WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 48, 18, 18, 40
STYLES = 8


@dataclass(frozen=True)
class Series:
    """One line: ``(x, y)`` points in order, a gap where y is None; ``style`` is its CSS class.

    ``intervals``: low and high per point; ``rings``: the x of points to point out, with a word for each; ``hollow``:
    the x of points that are drawn as circles, not as dots.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    style: str
    intervals: Sequence[tuple[float, float]] = ()
    rings: Mapping[float, str] = field(default_factory=dict)
    hollow: Collection[float] = ()


@dataclass(frozen=True)
class Axis:
    """What an axis says: its label; whether numbers are shares, shown as per cent; whether they grow by doubling."""

    label: str
    percent: bool = False
    log: bool = False
    whole: bool = False

    def text(self, value: float) -> str:
        if self.percent:
            return f"{100 * value:g} %" if abs(value) < 1e6 else ""
        return f"{value:,.0f}".replace(",", " ") if abs(value) >= 10_000 else f"{value:.6g}"

    def place(self, value: float) -> float:
        return math.log2(value) if self.log else value


def style(index: int) -> str:
    """The class of the n-th criterion."""
    return f"s{index % STYLES}"


def lines(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    include: Sequence[float] = (),
    band: tuple[float, float] | None = None,
    marks: Sequence[float] = (),
) -> str:
    """Lines over a common x axis.

    Args:
        include: y values that must be in view.
        band: a range of x to shade.
        marks: y values with a dashed line across.
    """
    points = [(px, py) for one in series for px, py in one.points if py is not None]
    ends = [end for one in series for interval in one.intervals for end in interval]
    ys = [py for _, py in points] + ends + list(include) + list(marks) or [0.0, 1.0]
    xs = [px for one in series for px, _ in one.points] or [0.0, 1.0]
    frame = _Frame(x, y, (min(xs), max(xs)), (min(ys), max(ys)), pad=0.5 if band else 0.0)
    parts = [frame.band(*band)] if band else []
    parts.append(frame.axes(sorted({*xs}) if x.log else None))
    parts += [frame.across(value) for value in marks]
    for one in series:
        parts += [
            f'<path class="line {one.style}" d="{path}"><title>{escape(one.name)}</title></path>'
            for path in frame.paths(one.points)
        ]
        parts += [
            f'<circle class="{"hollow " * (px in one.hollow)}dot {one.style}" cx="{frame.x(px):.1f}" '
            f'cy="{frame.y(py):.1f}" r="2.6">'
            f"<title>{escape(one.name)}, {escape(x.label)} {x.text(px)}: {_exact(y, py)}</title></circle>"
            for px, py in one.points
            if py is not None
        ]
        parts += [
            f'<line class="line whisker {one.style}" x1="{frame.x(px):.1f}" x2="{frame.x(px):.1f}" '
            f'y1="{frame.y(low):.1f}" y2="{frame.y(high):.1f}"/>'
            for (px, _), (low, high) in zip(one.points, one.intervals, strict=bool(one.intervals))
        ]
        parts += [
            f'<circle class="ring" cx="{frame.x(px):.1f}" cy="{frame.y(py):.1f}" r="7"/>'
            f"{frame.beside(px, py, one.rings[px])}"
            for px, py in one.points
            if px in one.rings and py is not None
        ]
    return frame.svg(parts, f"{y.label} by {x.label}: {', '.join(one.name for one in series)}")


def histogram(edges: Sequence[float], counts: Mapping[str, tuple[str, Sequence[int]]], x: Axis) -> str:
    """Outlines over common bins, each as shares of its own total; ``counts``: name → (style, counts)."""
    shares = {name: [n / max(1, sum(values)) for n in values] for name, (_, values) in counts.items()}
    top = max((max(values) for values in shares.values()), default=1.0)
    y = Axis("share", percent=True)
    frame = _Frame(x, y, (edges[0], edges[-1]), (0.0, top or 1.0))
    parts = [frame.axes()]
    for name, (css, values) in counts.items():
        outline = [f"M{frame.x(edges[0]):.1f},{frame.y(0):.1f}"]
        for low, high, share in zip(edges[:-1], edges[1:], shares[name], strict=True):
            outline.append(f"L{frame.x(low):.1f},{frame.y(share):.1f}L{frame.x(high):.1f},{frame.y(share):.1f}")
        outline.append(f"L{frame.x(edges[-1]):.1f},{frame.y(0):.1f}")
        title = f"<title>{escape(name)}: {sum(values)}</title>"
        parts.append(f'<path class="area {css}" d="{"".join(outline)}">{title}</path>')
    return frame.svg(parts, f"Distribution of {x.label}: {', '.join(counts)}")


def picture(charts: Sequence[tuple[str, str]], legend: Mapping[str, str]) -> str:
    """Charts with their titles, one under the other, as an SVG file of its own: on white, its colours written out, for
    viewers that know no more of CSS than classes. ``legend``: name → style."""
    css = colours_and_charts()
    light = dict(re.findall(r"--(\w+): (#\w{6})", css.partition("@media")[0]))
    rules = [
        f".line.{name}, .area.{name}, .dot.hollow.{name} {{ stroke: {light[colour]}; }} "
        f".area.{name}, .dot.{name} {{ fill: {light[colour]}; }}"
        for name, colour in re.findall(r"\.(\w+) \{ --c: var\(--(\w+)\); \}", css)
    ]
    rules += [line for line in css.splitlines() if line.startswith("svg ") and "var(--c)" not in line]
    resolved = re.sub(r"var\(--(\w+)\)", lambda found: light[found[1]], "\n".join(rules))
    head, title = 14 + 18 * len(legend), 16
    height = head + len(charts) * (title + HEIGHT)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif">',
        f'<style>{escape(resolved)}</style><rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for n, (name, css_class) in enumerate(legend.items()):
        parts.append(
            f'<circle class="dot {css_class}" cx="14" cy="{16 + 18 * n}" r="4"/>'
            f'<text class="label" x="24" y="{20 + 18 * n}">{escape(name)}</text>'
        )
    for n, (name, svg) in enumerate(charts):
        top = head + n * (title + HEIGHT)
        parts.append(f'<text class="label" x="10" y="{top + 12}" font-weight="bold">{escape(name)}</text>')
        parts.append(svg.replace("<svg ", f'<svg y="{top + title}" width="{WIDTH}" height="{HEIGHT}" ', 1))
    return "\n".join([*parts, "</svg>\n"])


def colours_and_charts() -> str:
    """The CSS that charts need, with the colours that a page around them can use too."""
    return (files("icon2_rt.pipeline") / "charts.css").read_text(encoding="utf-8")


class _Frame:
    """Where values go on the paper, and what surrounds them."""

    def __init__(
        self, x: Axis, y: Axis, x_range: tuple[float, float], y_range: tuple[float, float], pad: float = 0.0
    ) -> None:
        self.x_axis, self.y_axis = x, y
        low, high = x.place(x_range[0]) - pad, x.place(x_range[1]) + pad
        self._x_low, self._x_span = low, (high - low) or 1.0
        self.y_ticks = ticks(*y_range)
        self._y_low, self._y_span = self.y_ticks[0], self.y_ticks[-1] - self.y_ticks[0]
        self._x_range = x_range

    def x(self, value: float) -> float:
        place = (self.x_axis.place(value) - self._x_low) / self._x_span
        return LEFT + min(1.0, max(0.0, place)) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self._y_low) / self._y_span * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_ticks: Sequence[float] | None = None) -> str:
        if x_ticks is None:
            low, high = self._x_range
            x_ticks = [t for t in ticks(low, high, whole=self.x_axis.whole) if low <= t <= high]
        step = max(1, math.ceil(len(x_ticks) / 8))
        parts = []
        for tick in self.y_ticks:
            at = self.y(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{self.y_axis.text(tick)}</text>')
        for tick in x_ticks[::step]:
            text = self.x_axis.text(tick)
            parts.append(f'<text x="{self.x(tick):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{text}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(
            f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(self.x_axis.label)}</text>'
        )
        return "".join(parts)

    def band(self, low: float, high: float) -> str:
        left, right = self.x(low - 0.5), self.x(high + 0.5)
        height = HEIGHT - TOP - BOTTOM
        return f'<rect class="band" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{height}"/>'

    def beside(self, px: float, py: float, word: str) -> str:
        """A word above a point, on the side where the paper is wider."""
        left = self.x(px) > WIDTH / 2
        anchor = ' text-anchor="end"' if left else ""
        x, y = self.x(px) + (-8 if left else 8), self.y(py) - 8
        return f'<text class="label" x="{x:.1f}" y="{y:.1f}"{anchor}>{escape(word)}</text>'

    def across(self, value: float) -> str:
        at = self.y(value)
        return f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'

    def paths(self, points: Sequence[tuple[float, float | None]]) -> list[str]:
        """One path for each run of points without a gap."""
        runs: list[list[str]] = [[]]
        for px, py in points:
            if py is None:
                runs.append([])
            else:
                runs[-1].append(f"{self.x(px):.1f},{self.y(py):.1f}")
        return ["M" + "L".join(run) for run in runs if len(run) > 1]

    def svg(self, parts: Sequence[str], label: str) -> str:
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def ticks(low: float, high: float, *, whole: bool = False, count: int = 5) -> list[float]:
    """Round numbers at even steps (1, 2 or 5 times a power of ten) that reach over [low, high]."""
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"an axis needs finite ends, not {low} and {high}")
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _exact(axis: Axis, value: float) -> str:
    return f"{100 * value:.3g} %" if axis.percent else f"{value:.4g}"
