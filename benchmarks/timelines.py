"""Pictures of what `streamer.trace` writes: a lane for each row that keeps the device's time."""

from __future__ import annotations

import gzip
import json
import statistics
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerstream.transfer.timeline import BLOCKS, DECODES, LOADS, PASSES, PHASES, WAITS

# From the top. What the host does is left out: its clock begins elsewhere.
_COLOURS = {
    PHASES: "tab:gray",
    PASSES: "tab:blue",
    BLOCKS: "tab:green",
    WAITS: "tab:red",
    DECODES: "tab:purple",
    LOADS: "tab:orange",
}
_ROWS = list(_COLOURS)
_WIDTH_INCHES, _PANEL_INCHES, _DPI = 13.3, 2.9, 120
_LANES_WIDE = 0.92  # of the picture's width, the rest being labels
_POINTS, _POINTS_A_LETTER = 7, 4.4  # of the names on bars
_TOUCH_MS = 0.001  # spans that overlap by less follow each other

Window = tuple[float | None, float | None]  # from and to in ms; None: from the first span, to the end of the last


class NoTimelineError(Exception):
    """There is nothing to draw, or nowhere to put it."""


@dataclass(frozen=True)
class Span:
    row: str
    name: str
    start_ms: float
    end_ms: float
    gb_per_s: float | None  # of loads


@dataclass(frozen=True)
class Stretch:
    """A part of a timeline, with all spans that reach into it."""

    start_ms: float
    end_ms: float
    spans: Sequence[Span]

    @property
    def rows(self) -> list[str]:
        """What is drawn; decoding where there is any."""
        return [row for row in _ROWS if row != DECODES or self.of(row)]

    def of(self, row: str) -> list[Span]:
        return [span for span in self.spans if span.row == row]

    def share(self, row: str) -> float:
        """How much of the stretch has a span in this row; what two spans cover counts once."""
        covered, until = 0.0, self.start_ms
        for span in sorted(self.of(row), key=lambda span: span.start_ms):
            start, end = max(span.start_ms, until), min(span.end_ms, self.end_ms)
            if end > start:
                covered, until = covered + end - start, end
        return covered / (self.end_ms - self.start_ms)

    def line(self) -> str:
        """Per row its share, how many spans begin in the stretch, and the median of their times and speeds."""
        told = []
        for row in self.rows:
            begun = [span for span in self.of(row) if span.start_ms >= self.start_ms]
            text = f"{row} {100 * self.share(row):.1f} %"
            if begun:
                text += f", {len(begun)} of {statistics.median(s.end_ms - s.start_ms for s in begun):.3g} ms"
            speeds = [span.gb_per_s for span in begun if span.gb_per_s is not None]
            if speeds:
                text += f" at {statistics.median(speeds):.1f} GB/s"
            told.append(text)
        return f"{self.start_ms:.5g} to {self.end_ms:.5g} ms: " + "; ".join(told)


def make(trace: Path, picture: Path, windows: Sequence[Window] = ((None, None),)) -> list[str]:
    """Draw a panel for each window; returns a line for each, with the numbers that the panel shows.

    Raises:
        NoTimelineError: the file is missing or no timeline, a window has no spans, the picture cannot be written.
    """
    device, spans = read(trace)
    stretches = [_stretch(spans, *window) for window in windows]
    _draw(stretches, f"{Path(trace.name.removesuffix('.gz')).stem}, {device}", picture)
    return [stretch.line() for stretch in stretches]


def read(trace: Path) -> tuple[str, list[Span]]:
    """The device's name, and the spans of all rows that are drawn; the file may be compressed.

    Raises:
        NoTimelineError: it is missing, or `streamer.trace` did not write it.
    """
    try:
        content = trace.read_bytes()
    except OSError as exc:
        raise NoTimelineError(f"{trace} cannot be read: {exc.strerror}") from exc
    try:
        if content.startswith(b"\x1f\x8b"):  # the first bytes of all that gzip writes
            content = gzip.decompress(content)
        return _parsed(json.loads(content)["traceEvents"])
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError) as exc:
        raise NoTimelineError(f"{trace} is no timeline that streamer.trace() wrote") from exc


def _parsed(events: Sequence[dict[str, Any]]) -> tuple[str, list[Span]]:
    (process,) = (event["args"]["name"] for event in events if event["name"] == "process_name")
    rows = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = [
        Span(
            rows[event["tid"]],
            event["name"],
            event["ts"] / 1000,
            (event["ts"] + event["dur"]) / 1000,
            event["args"].get("GB/s"),
        )
        for event in events
        if event["ph"] == "X" and rows[event["tid"]] in _ROWS
    ]
    return process.removeprefix("layerstream, "), spans


def _stretch(spans: Sequence[Span], start_ms: float | None, end_ms: float | None) -> Stretch:
    first = min((span.start_ms for span in spans), default=0.0)
    last = max((span.end_ms for span in spans), default=0.0)
    start = first if start_ms is None else max(start_ms, first)
    end = last if end_ms is None else min(end_ms, last)
    inside = [span for span in spans if span.start_ms < end and span.end_ms > start]
    if not inside or start >= end:
        since = "its start" if start_ms is None else f"{start_ms:g} ms"
        until = "its end" if end_ms is None else f"{end_ms:g} ms"
        raise NoTimelineError(
            f"no spans from {since} to {until}; the timeline has {len(spans)}, from {first:g} to {last:g} ms"
        )
    return Stretch(start, end, inside)


def _draw(stretches: Sequence[Stretch], title: str, picture: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    size = (_WIDTH_INCHES, _PANEL_INCHES * len(stretches))
    figure, panels = pyplot.subplots(len(stretches), figsize=size, layout="constrained", squeeze=False)
    for stretch, axes in zip(stretches, panels.flat, strict=True):
        for lane, row in enumerate(stretch.rows):
            # White edges part bars that follow without a gap; snapped, a wait of 10 us would be as wide as a pixel.
            look = {"facecolor": _COLOURS[row], "edgecolor": "white", "linewidth": 0.4, "alpha": 0.6, "snap": False}
            parts = side_by_side(stretch.of(row))
            height = 0.8 / len(parts)
            for number, spans in enumerate(parts):
                top = lane - 0.4 + number * height
                bars = [(span.start_ms, span.end_ms - span.start_ms) for span in spans]
                axes.broken_barh(bars, (top, height), **look)
                for middle, text in _texts(spans, stretch):
                    place = middle, top + height / 2
                    axes.text(*place, text, ha="center", va="center", fontsize=_POINTS, clip_on=True)
        axes.set_yticks(range(len(stretch.rows)), [_label(row, stretch) for row in stretch.rows], fontsize="small")
        axes.set_ylim(len(stretch.rows) - 0.5, -0.5)
        axes.tick_params(axis="x", labelsize="small")
        axes.set_xlim(stretch.start_ms, stretch.end_ms)
        axes.grid(visible=True, axis="x", alpha=0.3)
    panels[-1][0].set_xlabel("ms")
    panels[0][0].set_title(title)
    try:
        figure.savefig(picture, dpi=_DPI)
    except (OSError, ValueError) as exc:  # no such folder, no such format
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise NoTimelineError(f"{picture} cannot be written: {reason}") from exc
    finally:
        pyplot.close(figure)


def side_by_side(spans: Sequence[Span]) -> list[list[Span]]:
    """The spans of a row, in as many parts as there are spans at once: none overlaps another of its part."""
    parts: list[list[Span]] = [[]]
    for span in sorted(spans, key=lambda span: span.start_ms):
        for part in parts:
            if not part or part[-1].end_ms <= span.start_ms + _TOUCH_MS:
                part.append(span)
                break
        else:
            parts.append([span])
    return parts


def _label(row: str, stretch: Stretch) -> str:
    unit = ", GB/s" if row in (LOADS, DECODES) else ""
    return f"{row}{unit}\n{100 * stretch.share(row):.0f} %"


def _texts(spans: Sequence[Span], stretch: Stretch) -> Iterator[tuple[float, str]]:
    """What fits onto bars, and the middle of what is seen of each: the longest form of a name, and a load's speed."""
    points_a_ms = 72 * _WIDTH_INCHES * _LANES_WIDE / (stretch.end_ms - stretch.start_ms)
    for span in spans:
        start, end = max(span.start_ms, stretch.start_ms), min(span.end_ms, stretch.end_ms)
        letters = int((end - start) * points_a_ms / _POINTS_A_LETTER)
        lines = [name for name in _forms(span.name) if len(name) <= letters][:1]
        speed = "" if span.gb_per_s is None else f"{span.gb_per_s:.1f}"
        if lines and speed and len(speed) <= letters:
            lines.append(speed)
        if lines:
            yield (start + end) / 2, "\n".join(lines)


def _forms(name: str) -> Iterator[str]:
    """A unit's name, then what is left of it without its outer modules, then without the number of its piece."""
    path, _, piece = name.replace(" of ", "/").partition(" ")
    parts = path.split(".")
    for outer in range(len(parts)):
        yield " ".join([".".join(parts[outer:]), *([piece] if piece else [])])
    yield parts[-1]
