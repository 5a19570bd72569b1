"""What the engine must reach, checked on the records of a run: each line says met, or by how much it is missed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from benchmarks.cases import WITH_PEERS
from benchmarks.records import Record, budget_order, time_of, typical

_NOISE = 1.01  # a budget that is slower than a smaller one by less is not told
_GIB = 2**30
_FITS = {"denoiser": 1.005, "pipeline": 1.008}  # where everything fits, to resident
_OF_BUS = 1.008  # a pass that the bus bounds, to the time its bytes take over the link
_OF_HOST = 1.15  # a pass of many small blocks at the least budget, to what bounds it
# By case and budget, of whole calls, or of the case's only form: the most that a field may be.
_BOUNDS: Mapping[str, Mapping[str, Sequence[tuple[str, float]]]] = {
    "sd35m": {"6GiB": [("ratio_to_resident", 1.10)], "10GiB": [("ratio_to_resident", 1.03)]},
    "ovis": {"10GiB": [("ratio_to_resident", 1.02)]},
    "longcat": {"10GiB": [("ratio_to_resident", 1.03)]},
    "nextstep": {
        "auto": [("token_ratio", 1.02)],
        "24GiB": [("token_ratio", 1.3), ("token_of_limit", 1.05)],
        "16GiB": [("token_ratio", 3.2), ("token_of_limit", 1.05)],
        "6GiB": [("token_ratio", 6.0), ("token_of_limit", 1.05)],
    },
    "glm": {"12GiB": [("token_of_limit", 1.05), ("call_of_limit", 1.05)]},
    "mammoth": {"12GiB": [("token_of_limit", 1.05), ("call_of_limit", 1.05)]},
    "longcat-rewrite": {"12GiB": [("token_of_limit", 1.05), ("call_of_limit", 1.05)]},
    "qwen": {"12GiB": [("pass_of_limit", 1.02)], "24GiB": [("pass_of_limit", 1.02)]},
    "wan22": {"12GiB": [("ratio_to_resident", 1.02), ("switch_ratio", 1.1)]},
}
# With both passes of a step side by side: the most that a pass may take, to resident.
_PAIRED: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("ovis", "denoiser"): {"min": 1.15, "5GiB": 1.05, "6GiB": 1.03},
    ("longcat", "denoiser"): {"min": 1.25, "4GiB": 1.06, "5GiB": 1.03},
    ("qwen", "denoiser"): {"12GiB": 1.10},
    ("ovis", "pipeline"): {"4GiB": 1.25, "6GiB": 1.06},
    ("longcat", "pipeline"): {"4GiB": 1.25, "6GiB": 1.06},
}
# With all blocks packed.
_PACKED: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("ovis", "denoiser"): {"8GiB": 1.04},
    ("longcat", "denoiser"): {"7GiB": 1.05},
    ("sd35m", "denoiser"): {"2GiB": 1.04, "min": 1.06},
    ("nextstep", "pipeline"): {"24GiB": 1.10, "16GiB": 1.35},
    ("glm", "pipeline"): {"12GiB": 1.5},
    ("mammoth", "pipeline"): {"12GiB": 1.5},
    ("sd35m", "pipeline"): {"6GiB": 1.06, "4GiB": 1.12},
    ("ovis", "pipeline"): {"6GiB": 1.04, "4GiB": 1.12},
    ("longcat", "pipeline"): {"6GiB": 1.05, "4GiB": 1.12},
}
_PACKED_PAIRED: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("qwen", "denoiser"): {"12GiB": 1.05, "8GiB": 1.10},
    ("ovis", "pipeline"): {"6GiB": 1.04, "4GiB": 1.12},
    ("longcat", "pipeline"): {"6GiB": 1.05, "4GiB": 1.12},
}
# With the weights on another GPU.
_STORED: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("ovis", "denoiser"): {"min": 1.04},
    ("longcat", "denoiser"): {"min": 1.04},
    ("nextstep", "pipeline"): {"6GiB": 1.6},
}
# Over two GPUs' links.
_LINKS: Mapping[tuple[str, str], Mapping[str, float]] = {("ovis", "denoiser"): {"min": 1.25}}
_OTHERS = {  # how they are told, and what they must reach
    "paired": ("in pairs", _PAIRED),
    "packed": ("packed", _PACKED),
    "packed_auto": ("packed as needed", _PACKED),
    "packed_paired": ("packed, in pairs", _PACKED_PAIRED),
    "stored": ("from another GPU", _STORED),
    "links": ("over two links", _LINKS),
}
_SAID = {
    "token_ratio": "a token to a resident one's time",
    "token_of_limit": "a token to its limit",
    "pass_of_limit": "a pass to its limit",
    "call_of_limit": "a call to its limit",
    "ratio_to_resident": "to resident",
    "switch_ratio": "the slowest step at the switch to the others",
}
_CALLS_AND_WEIGHTS = (("glm", "24GiB"), ("mammoth", "24GiB"))  # the call, and its weights' way over the bus


def lines(done: Sequence[Record]) -> list[str]:
    """A line for each target that these records can tell of, in the order of the cases."""
    found = []
    told = typical(done)
    for case, form in dict.fromkeys((r["case"], r["form"]) for r in told):
        alike = [r for r in told if (r["case"], r["form"]) == (case, form) and time_of(r) is not None]
        found += [f"- {case}, {form}: {line}" for line in _of_one(alike, form)]
    return found


def _of_one(records: Sequence[Record], form: str) -> Iterator[str]:
    ours = {r["vram_budget"]: r for r in records if r["method"] == "layerstream" and not r["is_mapped"]}
    rival = next((r for r in records if r["method"] == "vllm_omni"), None)
    least = ours.get("min")
    if form == "denoiser" and least is not None and rival is not None:
        share = _share(least, rival)
        told = f"{share:.3f} x its time"
        num_bytes = least.get("loaded_bytes_per_pass")  # all blocks, as it streams them, too
        if num_bytes and least["peak_reserved_bytes"] and rival["peak_reserved_bytes"]:
            mine, its = (
                f"{_gb_per_s(r, num_bytes)}{_of_link(r)} in {r['peak_reserved_bytes'] / 1e9:.2f} GB reserved"
                for r in (least, rival)
            )
            told += f"; GB/s over the bus: {mine}, where it has {its}"
        yield _verdict("at the least budget as fast as vllm-omni's hooks", share, 1.0, told)
    resident = _times([r for r in records if r["method"] == "resident"])
    spread = max(resident) / min(resident) - 1 if len(resident) > 1 else 0.0
    yield from _bounds(ours, form, spread)
    yield from _bounds_of_others(records, form, spread)
    if form == "denoiser":
        yield from _bound_passes(ours, resident)
    yield from _replicas(records, ours, spread)
    yield from _two_links(records)
    at_ten = ours.get("10GiB")
    if form == "denoiser" and at_ten is not None and at_ten["case"].startswith("ovis"):
        ratio = at_ten["ratio_to_resident"]
        yield _verdict("at 10 GiB at most 1.05 x resident", ratio, 1.05, f"{ratio:.3f} x, {_bound(at_ten)}")
    fits = ours.get("auto")
    if fits is not None:
        ratio, passes = fits["ratio_to_resident"], fits.get("ms_per_pass_range")
        told = f"{ratio:.3f} x{_rounds(fits)}" + (f", passes of {passes[0]} to {passes[1]} ms" if passes else "")
        yield _verdict(f"when everything fits at most {_FITS[form]} x", ratio, _FITS[form], told, spread)
    if form == "pipeline" and "6GiB" in ours:
        reserved = ours["6GiB"]["peak_reserved_bytes"]
        if reserved:
            yield _verdict("6 GiB hold all that is reserved", reserved, 6 * _GIB, f"{reserved / _GIB:.2f} GiB")
    entered = [r for r in ours.values() if r.get("enter_gb_per_s")]
    if entered:
        best, worst = (pick(r["enter_gb_per_s"] for r in entered) for pick in (max, min))
        size = entered[0]["weights_bytes"] / 1e9
        told = f"{worst} to {best} GB/s of {size:.1f} GB, the first time of each process{_page_locking(entered)}"
        yield _verdict("entering in place at 15 GB/s or more", -best, -15, told)
    mapped = next((r for r in records if r["is_mapped"] and r.get("enter_gb_per_s")), None)
    if mapped is not None:
        speed = mapped["enter_gb_per_s"]
        yield _verdict(
            "entering from mapped files at 4 GB/s or more", -speed, -4, f"{speed} GB/s{_page_locking([mapped])}"
        )
    yield from _memory(records, list(ours.values()))
    yield from _order(ours, resident)


def _times(records: Sequence[Record]) -> list[float]:
    """Of all processes that these stand for."""
    return [time for r in records for time in r.get("times_of_rounds") or [time_of(r) or 0.0]]


def _rounds(record: Record) -> str:
    """How far the processes differ that this one is the median of."""
    times = record.get("times_of_rounds") or []
    if len(times) < 2:
        return ""
    return f" (the median of {len(times)} processes, {100 * (max(times) / min(times) - 1):.1f} % apart)"


def _bounds(ours: Mapping[str | None, Record], form: str, spread: float) -> Iterator[str]:
    for budget, record in ours.items():
        case = record["case"].removesuffix(" (tiny)")
        bounds = () if form == "denoiser" and case in WITH_PEERS else _BOUNDS.get(case, {}).get(budget or "", ())
        for name, bound in bounds:
            value = record.get(name)
            if value is not None:
                said, told = f"under {budget}, {_SAID[name]}, at most {bound} x", f"{value:.3f} x{_rounds(record)}"
                yield _verdict(said, value, bound, told, spread if name == "ratio_to_resident" else 0.0)
        crossing = record.get("weights_cross_s")
        if (case, budget) in _CALLS_AND_WEIGHTS and crossing is not None and record["ratio_to_resident"]:
            resident = record["seconds"] / record["ratio_to_resident"]
            limit = 1.05 * resident + crossing
            told = f"{record['seconds']:.2f} s, resident {resident:.2f} s, the weights {crossing:.2f} s"
            yield _verdict(f"under {budget}, 1.05 x and the weights' way over the bus", record["seconds"], limit, told)


def _bounds_of_others(records: Sequence[Record], form: str, spread: float) -> Iterator[str]:
    for record in records:
        how, of_all = _OTHERS.get(record["method"], ("", {}))
        case = record["case"].removesuffix(" (tiny)")
        bound = of_all.get((case, form), {}).get(record["vram_budget"] or "")
        ratio = record["token_ratio" if case == "nextstep" else "ratio_to_resident"]
        if bound is not None and ratio is not None:
            said = f"{how} under {record['vram_budget']}, to resident, at most {bound} x"
            yield _verdict(said, ratio, bound, f"{ratio:.3f} x{_rounds(record)}", spread)


def _two_links(records: Sequence[Record]) -> Iterator[str]:
    """How fast loads come over two links, as the engine has measured it, beside one."""
    both = next((r for r in records if r["method"] == "links" and (r.get("links") or {}).get("")), None)
    if both is not None and both.get("link_gb_per_s"):
        speed, one = both["links"][""], both["link_gb_per_s"]
        told = f"{speed:.1f} GB/s, one link {one:.1f}"
        yield _verdict("two links load at least 1.85 times as fast as one", -speed / one, -1.85, told)


def _replicas(records: Sequence[Record], ours: Mapping[str | None, Record], spread: float) -> Iterator[str]:
    """Of two processes with one copy in host memory, beside one alone under the same budget."""
    both = next((r for r in records if r["method"] == "replicas"), None)
    alone = ours.get(both["vram_budget"]) if both is not None else None
    if both is None or alone is None or not both.get("replica_ms_per_pass"):
        return
    slower = max(both["ms_per_pass"], both["replica_ms_per_pass"]) / alone["ms_per_pass"]
    told = f"{both['ms_per_pass']} and {both['replica_ms_per_pass']} ms, alone {alone['ms_per_pass']}"
    equal = "equal" if both["replica_equal"] else "DIFFERENT"
    yield _verdict("two replicas, each at most 1.03 x one alone", slower, 1.03, f"{told}; the other {equal}", spread)
    held, limit = sum(both["pss_bytes"]), both["weights_bytes"] + 3 * _GIB
    told = f"{held / 1e9:.2f} GB, the limit {limit / 1e9:.2f}"
    yield _verdict("host memory of both at most weights + 3 GiB", held, limit, told)


def _bound_passes(ours: Mapping[str | None, Record], resident: Sequence[float]) -> Iterator[str]:
    """Passes that the bus bounds, and those of the least budget that perhaps the host does."""
    for budget, record in ours.items():
        loaded, link = record.get("loaded_bytes_per_pass"), record.get("link_gb_per_s")
        if not loaded or not link or not resident:
            continue
        crossing, time = loaded / link / 1e6, record["ms_per_pass"]
        if record["case"].startswith("sd15"):
            limit = max(statistics.median(resident), crossing)
            told = f"{time / limit:.3f} x of {limit:.2f} ms{_rounds(record)}"
            yield _verdict(f"under {budget}, at most {_OF_HOST} x what bounds it", time / limit, _OF_HOST, told)
        elif record.get("predicted_bound") == "bus":
            told = f"{time / crossing:.4f} x of {crossing:.2f} ms{_rounds(record)}"
            yield _verdict(f"under {budget}, at most {_OF_BUS} x its bytes' time", time / crossing, _OF_BUS, told)


def _memory(records: Sequence[Record], ours: Sequence[Record]) -> Iterator[str]:
    known = [r for r in ours if r["host_peak_rss_bytes"]]
    if known:
        most = max(known, key=lambda r: r["host_peak_rss_bytes"])
        resident = [r["host_peak_rss_bytes"] for r in records if r["method"] == "resident" and r["host_peak_rss_bytes"]]
        limit = 1.02 * most["weights_bytes"] + _GIB
        told = f"{most['host_peak_rss_bytes'] / 1e9:.2f} GB, the limit {limit / 1e9:.2f}"
        told += f"; a resident process has {max(resident) / 1e9:.2f}" if resident else ""
        yield _verdict("host memory 1.02 x weights + 1 GiB", most["host_peak_rss_bytes"], limit, told)
    left = [r for r in ours if r["exit_s"] is not None]
    if left:
        slowest = max(left, key=lambda r: r["exit_s"])
        told = f"{slowest['exit_s']:.2f} s at most"
        locked = slowest.get("locked_bytes")
        told += f", which unlocks {locked / 1e9:.1f} GB of pages" if locked else ""
        yield _verdict("leaving in 0.5 s", slowest["exit_s"], 0.5, told)
    kept = [r["left_on_device_bytes"] for r in ours if r.get("left_on_device_bytes") is not None]
    usual = [r["left_on_device_bytes"] for r in records if r["method"] == "resident" and r.get("left_on_device_bytes")]
    if kept:
        most_kept, limit = max(kept), max(usual, default=0)
        told = f"{most_kept / 1e6:.1f} MB, a resident process {limit / 1e6:.1f} (libraries' workspaces)"
        yield _verdict("leaving no more on the device than running does", most_kept, limit, told)


def _order(ours: dict[str | None, Record], resident: Sequence[float]) -> Iterator[str]:
    """Whether more memory was never slower."""
    ordered = [ours[budget] for budget in sorted((b for b in ours if b is not None), key=budget_order)]
    if len(ordered) < 2:
        return
    slower = [(a, b) for a, b in pairwise(ordered) if _share(b, a) > _NOISE]
    told = "; ".join(
        f"{b['vram_budget']} takes {100 * (_share(b, a) - 1):.1f} % more than {a['vram_budget']} "
        f"({_loaded(b)} GB a pass over the bus after {_loaded(a)})"
        for a, b in slower
    )
    yield _verdict(
        "no budget slower than a smaller one (by 1 % or more)", len(slower), 0, (told or "none is") + _spread(resident)
    )


def _verdict(target: str, value: float, limit: float, told: str, spread: float = 0.0) -> str:
    """A miss within the spread of the resident processes is none."""
    if value <= limit:
        return f"{target}: met, {told}"
    if value <= limit * (1 + spread):
        return f"{target}: met within the {100 * spread:.1f} % by which the resident processes differ, {told}"
    by = f" by {100 * (value - limit) / abs(limit):.1f} %" if limit else ""
    return f"{target}: missed{by}, {told}"


def _share(one: Record, other: Record) -> float:
    return (time_of(one) or 0.0) / (time_of(other) or 1.0)


def _spread(times: Sequence[float]) -> str:
    """How far two processes differ that do the same."""
    return f"; the resident processes differ by {100 * (max(times) / min(times) - 1):.1f} %" if len(times) > 1 else ""


def _page_locking(entered: Sequence[Record]) -> str:
    """What of entering is the kernel's: it makes the pages of mapped files ours, and pins all."""
    known = [r for r in entered if r.get("stats_pin_s")]
    if not known:
        return ""
    slowest = min(known, key=lambda r: r["enter_gb_per_s"])
    seconds = slowest["stats_pin_s"]
    speed = slowest["stats_pinned_bytes"] / seconds / 1e9
    return f"; the slowest took {slowest['enter_s']:.2f} s, {seconds:.2f} of it to page-lock ({speed:.1f} GB/s)"


def _gb_per_s(record: Record, num_bytes: int) -> float:
    return round(num_bytes / record["ms_per_pass"] / 1e6, 1)


def _of_link(record: Record) -> str:
    """What the bus gave in the same process before."""
    return f" of {record['link_gb_per_s']} measured" if record.get("link_gb_per_s") else ""


def _bound(record: Record) -> str:
    bound, predicted = record.get("predicted_bound"), record.get("predicted_ms_per_pass")
    return f"predicted {predicted} ms, {bound}-bound" if bound else "nothing streams"


def _loaded(record: Record) -> str:
    num_bytes = record.get("loaded_bytes_per_pass") or record.get("loaded_bytes_per_call") or 0
    return f"{num_bytes / 1e9:.2f}"
