"""What a streamer tells of what its engine does and did: the line on entering, a report, a trace, its `repr`."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from layerstream.budget import format_budget, format_bytes
from layerstream.engine.streamer import Streamer
from layerstream.errors import StreamerStateError
from layerstream.planning.plan import Plan
from layerstream.report import Report, entered_line, streamer_html

_log = logging.getLogger("layerstream")


def tell_entered(streamer: Streamer) -> None:
    """Streaming has begun: a line in the log, and for people where a bar was shown."""
    if streamer.has_shown_progress or _log.isEnabledFor(logging.INFO):
        line = entered_line(streamer.plan, streamer.stats)
        _log.info("%s", line)
        if streamer.has_shown_progress:  # it took its time: what came of it, in the bar's place
            print(f"layerstream: {line}", file=sys.stderr)


def report_of(streamer: Streamer) -> Report:
    """What happened since the start."""
    return _report(streamer, streamer.plan.with_next_gib(), copied_by=streamer.device.copied_by)


@contextlib.contextmanager
def traced_to(path: str | os.PathLike[str], streamer: Streamer | None) -> Iterator[None]:
    """Write a timeline of the calls inside to a file.

    Raises:
        StreamerStateError: it does not stream, or is traced already.
        OSError: the file cannot be written; nothing has been traced then.
    """
    if streamer is None or streamer.is_closed:
        raise StreamerStateError("nothing streams now, so there is nothing to trace: enter the offload context first.")
    with Path(path).open("w", encoding="utf-8") as file, streamer.traced(file):
        yield


def line_of(streamer: Streamer, *, is_active: bool) -> str:
    """The `repr` of what was started; looks at nothing on the device."""
    stats = streamer.stats
    state = "active" if is_active else "closed"
    budget = format_budget(stats.budget_bytes or None)
    packed = f"{stats.num_resident_packed_blocks} resident packed, " if stats.num_resident_packed_blocks else ""
    return (
        f"LayerStreamer({state}, {budget}: {stats.num_resident_blocks} blocks resident, {packed}"
        f"{stats.num_streamed_blocks} streamed, at most {format_bytes(stats.peak_device_bytes)} of weights on the "
        "device)"
    )


def html_of(streamer: Streamer, line: str) -> str:
    """`line`, the plan and the report, for notebooks."""
    report = _report(streamer, streamer.plan, copied_by="")
    return streamer_html(line, streamer.plan, report)


def _report(streamer: Streamer, plan: Plan, copied_by: str) -> Report:
    return Report.of(
        plan,
        streamer.look(),
        streamer.phase_stats,
        streamer.least_bytes,
        copied_by,
        streamer.pairing.reasons(),
        streamer.homes.packing.why_raw(),
        streamer.homes.storing.why_on_host(),
        streamer.links,
        streamer.homes.host_copy.line(),
    )
