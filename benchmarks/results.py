"""The files of a run: all records as JSON, and beside it the same as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import records, targets
from benchmarks.records import Record, field, gigabytes

_SHARED = {
    "case": field("case"),
    "form": field("form"),
    "method": field("method"),
    "budget": lambda record: f"{record['vram_budget']}, mapped" if record.get("is_mapped") else record["vram_budget"],
}
_PASSES = {
    "ms/pass": field("ms_per_pass"),
    "ratio": field("ratio_to_resident"),
    "predicted ms": field("predicted_ms_per_pass"),
    "host ms": field("host_ms_per_pass"),
    "GB/pass": gigabytes("loaded_bytes_per_pass"),
}
_CALLS = {
    "s/call": lambda record: f"~{record['seconds']}" if record.get("is_extrapolated") else record.get("seconds"),
    "ratio": field("ratio_to_resident"),
    "s first call": field("seconds_first_call"),
    "its ratio": field("ratio_first_call"),
    "GB/call": gigabytes("loaded_bytes_per_call"),
}
_COSTS = {
    "peak alloc GB": gigabytes("peak_allocated_bytes"),
    "peak reserved GB": gigabytes("peak_reserved_bytes"),
    "enter s": field("enter_s", digits=2),
    "GB/s": field("enter_gb_per_s", digits=1),
    "exit s": field("exit_s", digits=2),
    "stall ms": field("stats_stall_ms", digits=1),
    "host RSS GB": gigabytes("host_peak_rss_bytes"),
    "before enter": gigabytes("host_rss_before_bytes"),
    "locked GB": gigabytes("locked_bytes"),
    "equal": field("equal"),
    "error": field("error"),
}
_NOTES = [
    "Each row was measured in a process of its own, resident first and last; ratios are to the mean of both. A "
    "denoiser's time is the median of its passes, which take turns between the texts of guidance, after all warm-ups. "
    "A pipeline's is a whole call after calls of few steps (after those in which a method profiles); of layerstream, "
    "where a first call is told, after that one alone. Of short calls it is the median of two or three. `~`: "
    "extrapolated from calls of one and three steps, because a whole one would take too long. `mapped`: the weights "
    "lie in a mapped file when streaming begins. Peaks are of the whole process, activations and warm-ups included. "
    "Stall ms is the sum over all passes of the process. Host RSS is the peak of the process, libraries included; "
    "before enter: with the weights loaded.",
]


def write(done: Sequence[Record], directory: Path, topic: str) -> None:
    """Write `<topic>_<gpu>_<date>.json` and `.md`, whole at any time: the files are replaced, never added to."""
    forms = {record["form"] for record in done}
    columns = dict(_SHARED)
    columns |= _PASSES if "denoiser" in forms else {}
    columns |= _CALLS if "pipeline" in forms else {}
    columns |= _COSTS
    notes = list(_NOTES)
    told = targets.lines(done)
    if told:
        notes += ["## Targets", "\n".join(told)]
    for record in done:
        said = [record[name] for name in ("plan", "report") if record.get(name)]
        if said:
            title = f"{record['case']} {record['form']}, vram_budget {record['vram_budget'] or 'auto'}"
            notes += [f"## {title}", "\n".join(["```", *said, "```"])]
    records.write(
        done,
        directory,
        topic,
        title=f"{topic.replace('-', ' ')}",
        method="Random normal weights at true size, bfloat16.",
        columns=columns,
        notes=notes,
    )
