"""A timeline of what streaming does on the device, in the format of trace viewers.

Marks are queued on the streams beside the work that they time, and read once the device is through with all of it; so
the host waits once, at the end. While a timeline runs every block is told of and every pass is worked out, which takes
more host time than usual; nothing of this is paid when there is none.

Source: the Trace Event Format, which Perfetto and chrome://tracing read.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from layerstream.device.base import Device, Event
from layerstream.saying import warn

# Rows of the picture, from the top.
PHASES, PASSES, BLOCKS, WAITS, LOADS, HOST = "phases", "passes", "blocks", "waits", "loads", "host"
DECODES = "decodes"
_ROWS = (PHASES, PASSES, BLOCKS, WAITS, DECODES, LOADS, HOST)
MOST_SPANS = 200_000  # each has two events of the device


@dataclass
class _Span:
    row: str
    name: str
    start: Any
    end: Any = None
    details: dict[str, Any] = field(default_factory=dict)


class Timeline:
    """Spans of one streamer, from its making until `write`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._spans: list[_Span] = []
        self._open: dict[tuple[str, object], _Span] = {}
        self._is_full = False
        self._stream = device.compute_stream()
        self._origin = device.mark(self._stream)
        self._host_origin = time.perf_counter()

    @contextlib.contextmanager
    def loading(self, name: str, num_bytes: int, after: Sequence[Event]) -> Iterator[None]:
        """A load that begins once `after` have passed. It is the copy stream's work until the `with` block is left."""
        start = self._device.mark_copies(after)
        with self._on_host(f"load {name}"):
            yield
        self._add(LOADS, name, start, self._device.mark_copies([]), bytes=num_bytes)

    @contextlib.contextmanager
    def decoding(self, name: str, num_bytes: int, after: Sequence[Event]) -> Iterator[None]:
        """Decoding of so many bytes, on the device, begins once `after` have passed."""
        start = self._device.mark_unpacking(after)
        yield
        self._add(DECODES, name, start, self._device.mark_unpacking([]), bytes=num_bytes)

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Compute waits for a load."""
        stream = self._device.compute_stream()
        start = self._device.mark(stream)
        yield
        self._add(WAITS, name, start, self._device.mark(stream))

    @contextlib.contextmanager
    def changing(self, phase: str) -> Iterator[None]:
        """Slots are laid out for a phase; it lasts until the next does."""
        self.leave(PHASES, None)
        with self._on_host(f"phase {phase}"):
            yield
        self.enter(PHASES, None, phase)

    def enter(self, row: str, who: object, name: str) -> None:
        """Something begins on this thread's compute stream, until `leave` is called with the same row and `who`."""
        self._open[row, who] = _Span(row, name, self._device.mark(self._device.compute_stream()))

    def leave(self, row: str, who: object) -> None:
        """What began with `enter` ends; nothing, if nothing did."""
        span = self._open.pop((row, who), None)
        if span is not None:
            self._add(row, span.name, span.start, self._device.mark(self._device.compute_stream()))

    def write(self, file: IO[str]) -> None:
        """Wait for the device, and write all spans."""
        for row, who in list(self._open):
            self.leave(row, who)
        self._device.synchronize()
        rows = {row: number for number, row in enumerate(_ROWS)}
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": f"layerstream, {self._device.name}"}}
        ]
        for row, number in rows.items():
            events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": row}})
            events.append(
                {"ph": "M", "name": "thread_sort_index", "pid": 0, "tid": number, "args": {"sort_index": number}}
            )
        for span in self._spans:
            start_ms, duration_ms = self._times(span)
            if start_ms is None or duration_ms is None:
                continue
            if "bytes" in span.details and duration_ms > 0:
                span.details["GB/s"] = round(span.details["bytes"] / duration_ms / 1e6, 2)
            events.append(
                {
                    "ph": "X",
                    "name": span.name,
                    "pid": 0,
                    "tid": rows[span.row],
                    "ts": 1000 * start_ms,  # microseconds
                    "dur": 1000 * duration_ms,
                    "args": span.details,
                }
            )
        json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)

    # ---- inside

    @contextlib.contextmanager
    def _on_host(self, name: str) -> Iterator[None]:
        start = time.perf_counter() - self._host_origin
        yield
        self._add(HOST, name, 1000 * start, 1000 * (time.perf_counter() - self._host_origin))

    def _add(self, row: str, name: str, start: Any, end: Any, **details: Any) -> None:
        if len(self._spans) < MOST_SPANS:
            self._spans.append(_Span(row, name, start, end, details))
        elif not self._is_full:
            self._is_full = True
            warn(f"a trace has at most {MOST_SPANS} spans; what follows is not in it. Trace fewer steps.")

    def _times(self, span: _Span) -> tuple[float | None, float | None]:
        """Start and duration in ms."""
        if span.row == HOST:
            return span.start, span.end - span.start
        return self._device.elapsed_ms(self._origin, span.start), self._device.elapsed_ms(span.start, span.end)
