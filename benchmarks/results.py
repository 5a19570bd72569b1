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
# Of what a call repeats: a column is there where a record has something for it.
_REPEATED = {
    "s/token": field("token_s", digits=4),
    "token ratio": field("token_ratio"),
    "GB/token": gigabytes("token_loaded_bytes"),
    "held GB": gigabytes("token_held_bytes"),
    "limit s/token": field("token_limit_s", digits=4),
    "of it": field("token_of_limit"),
    "s/pass": lambda record: None if record["form"] == "denoiser" else field("pass_s", digits=4)(record),
    "limit s/pass": field("pass_limit_s", digits=4),
    "of this": field("pass_of_limit"),
    "limit s/call": field("call_limit_s", digits=2),
    "of that": field("call_of_limit"),
    "slowest step at the switch": field("switch_ratio"),
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
_REPEATED_NOTES = [
    "Tokens and passes are timed within the last call, on the device, from the beginning of one to that of the next: "
    "tokens without the prompt's pass, passes of a call without its first two. Calls that write tokens come after "
    "three short ones (fewer tokens, three steps), or a whole one and two short ones where a first call is told.",
    "Limits: what repeats uses W bytes of weights, of which M are on the device when it begins (held GB: slots "
    "included, and of the same component what is not used, too), and the link has the speed that was measured in the "
    "same process. A pass takes max(compute, (W - M) / link) at least, a token t_outside + "
    "max(t_loop, (W - M) / link). "
    "t_loop is the part of a token in which the language model runs, t_outside the rest (heads, projectors, sampling), "
    "both resident. W is counted where it runs resident: the weights of all modules that a token or pass calls, an "
    "embedding whole. A byte that is loaded ahead in t_outside lies in a slot, and so is in M. The limit of a call is "
    "the resident call with each token and pass at its limit; where all weights together are more than the budget, "
    "what a prompt's pass and a denoiser's first pass do not find crosses the bus as well (call_first_loads_s). Passes "
    "that read a whole text again come on top.",
]


def write(done: Sequence[Record], directory: Path, topic: str) -> None:
    """Write `<topic>_<gpu>_<date>.json` and `.md`, whole at any time: the files are replaced, never added to."""
    forms = {record["form"] for record in done}
    columns = dict(_SHARED)
    columns |= _PASSES if "denoiser" in forms else {}
    columns |= _CALLS if "pipeline" in forms else {}
    told = {name: cell for name, cell in _REPEATED.items() if any(cell(record) is not None for record in done)}
    columns |= told
    columns |= _COSTS
    notes = [*_NOTES, *(_REPEATED_NOTES if told else [])]
    medians = _medians(done)
    if medians:
        notes += ["## Medians", "\n".join(medians)]
    reached = targets.lines(done)
    if reached:
        notes += ["## Targets", "\n".join(reached)]
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


def _medians(done: Sequence[Record]) -> list[str]:
    """Lines of a table, where anything was measured in several rounds."""
    told = [record for record in records.typical(done) if record.get("num_rounds")]
    if not told:
        return []
    columns = {
        **_SHARED,
        "processes": field("num_rounds"),
        "ms a pass, or s a call": records.time_of,
        "least and most": lambda record: "{} to {}".format(*_ends(record["times_of_rounds"])),
        "ratio": field("ratio_to_resident"),
        "peak reserved GB": gigabytes("peak_reserved_bytes"),
        "equal": field("equal"),
    }
    return records.table(told, columns)


def _ends(times: Sequence[float]) -> tuple[float | None, float | None]:
    return min(times, default=None), max(times, default=None)
