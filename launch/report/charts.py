# SPDX-License-Identifier: Apache-2.0
"""Small SVG charts as text: lines with bands, histograms, stacked bars.

Colours are CSS classes (page.css holds both themes), so one SVG serves light and dark. Each chart
carries its numbers twice: in `data-chart` for the pointer and keyboard read-out (charts.js), and in
a table that opens below it.
"""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 380, 236  # viewBox units; about one CSS pixel in a three-column page
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 10, 40  # room for axes
NUM_COLOURS = 8  # series-0 .. series-7 of page.css; dashes after that


@dataclass(frozen=True)
class Series:
    """A line: y may hold nan (a gap); low and high draw a band."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: int = 0


@dataclass(frozen=True)
class Axis:
    """`percent` prints 0.13 as 13 %; `log` needs positive values; `span` fixes the range."""

    label: str  # with its unit
    percent: bool = False
    whole: bool = False  # ticks at whole numbers only
    log: bool = False
    span: tuple[float, float] | None = None


def line_chart(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    note: str = "",
    under: np.ndarray | None = None,
) -> str:
    """An HTML figure; "" when no series has a finite point.

    `under`: x values whose distribution is drawn in grey along the bottom, its median marked.
    """
    series = [_trimmed(s) for s in series if np.isfinite(np.asarray(s.y, float)).any()]
    if not series:
        return ""
    everything = [
        v for s in series for part in (s.y, s.low, s.high) if part is not None for v in part
    ]
    frame = _Frame(_span(x, [v for s in series for v in s.x]), _span(y, everything, pad=True), x, y)
    marks = [] if under is None or not len(under) else [frame.distribution(under)]
    for s in series:
        if s.low is not None and s.high is not None:
            marks.append(frame.band(s))
    for s in series:
        marks.append(frame.line(s))
    return _figure(title, frame, "".join(marks), series, note)


def histogram(
    title: str,
    values: dict[str, np.ndarray],
    edges: np.ndarray,
    x: Axis,
    note: str = "",
    mark: tuple[float, str] | None = None,
) -> str:
    """Share of the finite values per bin; the outer bins take what lies beyond. One set: bars."""
    shares = {}
    for label, v in values.items():
        v = np.asarray(v, float)
        v = np.clip(v[np.isfinite(v)], edges[0], np.nextafter(edges[-1], -np.inf))
        if v.size:
            shares[label] = np.histogram(v, edges)[0] / v.size
    if not shares:
        return ""
    top = max(s.max() for s in shares.values())
    y = Axis("share of rollouts", percent=True)
    frame = _Frame((edges[0], edges[-1]), (0.0, top * 1.05), x, y)
    marks = []
    for i, share in enumerate(shares.values()):
        colour = i % NUM_COLOURS
        if len(shares) == 1:
            for a, b, s in zip(edges, edges[1:], share, strict=False):
                left, high = frame.px(a), frame.py(s)
                wide, tall = max(frame.px(b) - left - 1.4, 0.5), frame.py(0) - high
                marks.append(
                    f'<rect class="bar series-{colour}" x="{left + 0.7:.1f}" y="{high:.1f}" '
                    f'width="{wide:.1f}" height="{tall:.1f}" rx="1.5"/>'
                )
        else:
            corners = [(edges[0], 0.0)]
            for a, b, s in zip(edges, edges[1:], share, strict=False):
                corners += [(a, s), (b, s)]
            points = " ".join(f"{frame.px(a):.1f},{frame.py(s):.1f}" for a, s in corners)
            marks.append(f'<polyline class="line series-{colour}" points="{points}"/>')
    if mark:
        marks.append(frame.vertical(*mark))
    middle = np.sqrt(edges[1:] * edges[:-1]) if x.log else (edges[1:] + edges[:-1]) / 2
    series = [Series(k, middle.tolist(), s, colour=i) for i, (k, s) in enumerate(shares.items())]
    return _figure(title, frame, "".join(marks), series, note)


def stacked_bars(title: str, rows: dict[str, dict[str, float]], x: Axis, note: str = "") -> str:
    """One horizontal bar per row, its parts in the order of the first row."""
    rows = {k: v for k, v in rows.items() if v}
    if not rows:
        return ""
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    longest = max(sum(parts.values()) for parts in rows.values())
    step, label_height = 40, 15
    height = len(rows) * step + 34
    scale = (WIDTH - 20) / (longest or 1.0)
    body = []
    for r, (label, parts) in enumerate(rows.items()):
        left, top = 10.0, r * step + 6
        total = f"{format_number(sum(parts.values()))} {x.label}"
        body.append(
            f'<text class="tick" x="10" y="{top + 9}">{html.escape(_short(label, 44))}</text>'
        )
        body.append(
            f'<text class="tick end" x="{WIDTH - 10}" y="{top + 9}">{html.escape(total)}</text>'
        )
        for name, value in parts.items():
            width, tip = value * scale, f"{name}: {format_number(value)} {x.label}"
            body.append(
                f'<rect class="bar series-{names.index(name) % NUM_COLOURS}" x="{left:.1f}" '
                f'y="{top + label_height}" width="{max(width - 1, 0.4):.1f}" height="14" rx="2">'
                f"<title>{html.escape(tip)}</title></rect>"
            )
            left += width
    keys = [Series(n, [0], [0], colour=i) for i, n in enumerate(names)]
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {height - 28}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(body)}</svg>"
    )
    head = ["", *names]
    cells = [[label, *(format_number(p.get(n, 0.0)) for n in names)] for label, p in rows.items()]
    return _wrap(title, svg, _legend(keys, always=True), note, table(head, cells))


# ---------------------------------------------------------------- frame


class _Frame:
    """Maps data to pixels and draws the axes."""

    def __init__(self, x_span, y_span, x: Axis, y: Axis):
        self.x_span, self.y_span, self.x, self.y = x_span, y_span, x, y

    def px(self, value: float) -> float:
        return LEFT + _share(value, self.x_span, self.x.log) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        return HEIGHT - BOTTOM - _share(value, self.y_span, self.y.log) * (HEIGHT - TOP - BOTTOM)

    def line(self, s: Series) -> str:
        dash = " dashed" if s.colour >= NUM_COLOURS else ""
        css = f"series-{s.colour % NUM_COLOURS}{dash}"
        out = []
        for run in _finite_runs(s.x, s.y):
            points = " ".join(f"{self.px(a):.1f},{self.py(b):.1f}" for a, b in run)
            out.append(f'<polyline class="line {css}" points="{points}"/>')
            if len(run) == 1 or len(s.x) <= 12:
                places = (f'cx="{self.px(a):.1f}" cy="{self.py(b):.1f}"' for a, b in run)
                out.extend(f'<circle class="dot {css}" {place} r="2.6"/>' for place in places)
        return "".join(out)

    def band(self, s: Series) -> str:
        low = [p for run in _finite_runs(s.x, s.low or ()) for p in run]
        high = [p for run in _finite_runs(s.x, s.high or ()) for p in run]
        if len(low) < 2:
            return ""
        points = " ".join(f"{self.px(a):.1f},{self.py(b):.1f}" for a, b in [*low, *reversed(high)])
        return f'<polygon class="band series-{s.colour % NUM_COLOURS}" points="{points}"/>'

    def distribution(self, values: np.ndarray, bins: int = 40, height: float = 46) -> str:
        counts, edges = np.histogram(values, bins, self.x_span)
        out, base = [], HEIGHT - BOTTOM
        for count, a, b in zip(counts, edges, edges[1:], strict=False):
            tall = height * count / counts.max()
            out.append(
                f'<rect class="under" x="{self.px(a) + 0.4:.1f}" y="{base - tall:.1f}" '
                f'width="{self.px(b) - self.px(a) - 0.8:.1f}" height="{tall:.1f}"/>'
            )
        return "".join(out) + self.vertical(float(np.median(values)), "median release")

    def vertical(self, value: float, label: str) -> str:
        x = self.px(value)
        end = " end" if x > WIDTH * 0.6 else ""
        at = f'x="{x + (-4 if end else 4):.1f}" y="{TOP + 9}"'
        return (
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="tick{end}" {at}>{html.escape(label)}</text>'
        )

    def axes(self) -> str:
        out = []
        for value in ticks(self.y_span, self.y):
            y = self.py(value)
            text = format_number(value, self.y.percent)
            out.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            out.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 3.5:.1f}">{text}</text>')
        for value in ticks(self.x_span, self.x):
            x, text = self.px(value), format_number(value, self.x.percent)
            out.append(
                f'<text class="tick mid" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}">{text}</text>'
            )
        base, middle = HEIGHT - BOTTOM, (LEFT + WIDTH - RIGHT) / 2
        out.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
        out.append(
            f'<text class="label mid" x="{middle}" y="{HEIGHT - 7}">'
            f"{html.escape(self.x.label)}</text>"
        )
        out.append(
            f'<text class="label mid" transform="translate(11 {(TOP + base) / 2}) rotate(-90)">'
            f"{html.escape(self.y.label)}</text>"
        )
        return "".join(out)


def _share(value: float, span: tuple[float, float], log: bool) -> float:
    low, high = (math.log(v) for v in span) if log else span
    value = math.log(max(value, span[0])) if log else value
    return (value - low) / (high - low)


def _span(axis: Axis, values: Sequence[float], pad: bool = False) -> tuple[float, float]:
    if axis.span:
        return axis.span
    finite = [v for v in map(float, values) if math.isfinite(v) and (v > 0 or not axis.log)]
    low, high = min(finite), max(finite)
    if low == high:
        low, high = (
            (low / 2, high * 2)
            if axis.log
            else (low - 0.5 * abs(low) - 0.05, high + 0.5 * abs(high) + 0.05)
        )
    if pad and not axis.log:
        room = 0.06 * (high - low)
        # A quantity that is never negative starts at zero when zero is near.
        low = 0.0 if 0 <= low < max(0.4 * high, room) else low - room
        high += room
    return low, high


def ticks(span: tuple[float, float], axis: Axis, about: int = 5) -> list[float]:
    """Round values inside `span`, roughly `about` of them."""
    low, high = span
    if axis.log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        powers = [10.0**e for e in range(first, last + 1)]
        if len(powers) >= 3:
            return powers
        steps = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
        return [s for s in steps if low <= s <= high]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - raw))
    if axis.whole:
        step = max(1.0, round(step))
    start = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(start, math.floor(high / step + 1e-9) + 1)]


def format_number(value: float | None, percent: bool = False) -> str:
    """Three significant digits, thousands shortened: 0.0123, 4.5k, 13 %."""
    if value is None or not math.isfinite(value):
        return "–"
    if percent:
        return f"{round(100 * value, 1):g} %".replace("-", "−")
    size = abs(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            unit = 1e3 if suffix == "k" else limit
            return f"{value / unit:.3g}{suffix}".replace("-", "−")
    text = f"{value:.0f}" if size >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def _trimmed(s: Series) -> Series:
    """Without the points behind the last finite one."""
    end = int(np.flatnonzero(np.isfinite(np.asarray(s.y, float)))[-1]) + 1
    low, high = (None if part is None else part[:end] for part in (s.low, s.high))
    return Series(s.label, s.x[:end], s.y[:end], low, high, s.colour)


def _finite_runs(x: Sequence[float], y: Sequence[float]) -> list[list[tuple[float, float]]]:
    runs: list[list] = [[]]
    for a, b in zip(x, y, strict=True):
        if math.isfinite(b):
            runs[-1].append((float(a), float(b)))
        elif runs[-1]:
            runs.append([])
    return [r for r in runs if r]


# ---------------------------------------------------------------- figure


def _figure(title: str, frame: _Frame, marks: str, series: Sequence[Series], note: str) -> str:
    says = html.escape(f"{title}: {frame.y.label} against {frame.x.label}")
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{says}">'
        f'{frame.axes()}{marks}<line class="cross" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
    )
    read_out = {
        "series": [
            {
                "label": s.label,
                "colour": s.colour % NUM_COLOURS,
                "px": [round(frame.px(v), 1) for v in s.x],
                "x": [format_number(v, frame.x.percent) for v in s.x],
                "y": [format_number(v, frame.y.percent) for v in s.y],
            }
            for s in series
        ],
        "x": frame.x.label,
    }
    grid = sorted({float(v) for s in series for v in s.x})
    lookup = [dict(zip(map(float, s.x), s.y, strict=True)) for s in series]
    shown = (
        grid
        if len(grid) <= 60
        else [grid[i] for i in np.linspace(0, len(grid) - 1, 60).astype(int)]
    )
    body = [
        [
            format_number(v, frame.x.percent),
            *(format_number(at.get(v), frame.y.percent) for at in lookup),
        ]
        for v in shown
    ]
    numbers = table([frame.x.label, *(s.label for s in series)], body)
    return _wrap(title, svg, _legend(series), note, numbers, json.dumps(read_out))


def _wrap(title: str, svg: str, legend: str, note: str, table: str, read_out: str = "") -> str:
    data = f' data-chart="{html.escape(read_out)}"' if read_out else ""
    note = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return (
        f'<figure class="chart"{data}><figcaption>{html.escape(title)}</figcaption>{legend}{svg}'
        f"{note}<details><summary>numbers</summary>{table}</details></figure>"
    )


def _legend(series: Sequence[Series], always: bool = False) -> str:
    if len(series) < 2 and not always:
        return ""
    keys = (
        f'<li><span class="key series-{s.colour % NUM_COLOURS}'
        f'{" dashed" if s.colour >= NUM_COLOURS else ""}"></span>{html.escape(s.label)}</li>'
        for s in series
    )
    return f'<ul class="legend">{"".join(keys)}</ul>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text: bool = False) -> str:
    """`text`: cells hold words, which are left-aligned and may wrap."""
    css = ' class="text"' if text else ""

    def line(cells, tag):
        return "".join(f"<{tag}{css}>{html.escape(str(c))}</{tag}>" for c in cells)

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{line(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
