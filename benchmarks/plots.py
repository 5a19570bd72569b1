"""Pictures of time against memory, two short tables for the README and long ones for the benchmarks' page, made from
the result files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases import CASES, FORMS
from benchmarks.methods import OURS
from benchmarks.pages import write_parts
from benchmarks.records import NOT_BEGUN, Record, budget_order, time_of, typical

TARGET = "bench-plots"
SHORT, OPTIONS, LONG = "short table", "table of options", "long table"  # names of the parts of pages
_COLOURS = {
    "resident": "black",
    "layerstream": "tab:red",
    "paired": "tab:pink",
    "packed": "darkred",
    "packed_auto": "gold",
    "packed_paired": "deeppink",
    "stored": "darkviolet",
    "stored_apart": "mediumpurple",
    "links": "teal",
    "links_packed": "darkcyan",
    "replicas": "indigo",
    "diffusers_leaf": "tab:blue",
    "diffusers_block": "tab:cyan",
    "model_offload": "tab:green",
    "sequential": "tab:olive",
    "vllm_omni": "tab:orange",
    "flextensor": "tab:purple",
    "mmgp": "tab:brown",
}
_METHODS = list(_COLOURS)
_LABELS = {
    "paired": "layerstream, passes paired",
    "packed": "layerstream, packed",
    "packed_auto": "layerstream, packed as needed",
    "packed_paired": "layerstream, packed and paired",
    "stored": "layerstream, from another GPU",
    "stored_apart": "layerstream, from another GPU through the host",
    "links": "layerstream, over two GPUs' links",
    "links_packed": "layerstream, packed, over two GPUs' links",
    "replicas": "layerstream, two replicas on two GPUs",
    "diffusers_leaf": "diffusers, leaf level with streams",
    "diffusers_block": "diffusers, block level with streams",
    "model_offload": "diffusers, model offload",
    "sequential": "accelerate, sequential offload",
    "vllm_omni": "vllm-omni, layerwise",
    "flextensor": "FlexTensor",
}
# Of the short tables: what readers know the cases by, our budgets, and the card that the others must fit.
_MODELS = {
    "sd35m": "Stable Diffusion 3.5 medium",
    "ovis": "Ovis-Image-7B",
    "longcat": "LongCat-Image",
    "qwen": "Qwen-Image",
}
_SHORT_BUDGETS = ("10GiB", "6GiB")
_CARD_GIB = 12
_WITH_OPTIONS = {"paired": "paired", "packed": "packed", "packed_paired": "packed and paired"}  # and their rows' names
_SWEEP = 3  # budgets of ours that make a picture


class NoResultsError(Exception):
    """There is nothing to draw."""


def make(results: Path, readme: Path, page: Path) -> list[Path]:
    """Draw a picture for each case and form, and put the tables into the README and the page; returns the pictures.

    A picture is of one GPU (`_drawn`), and so is each short table.

    Raises:
        NoResultsError: no result files of the harness at true size.
        NoPlaceError: a page without a place for its table.
    """
    records = read(results)
    write_parts(readme, {SHORT: short_table(records), OPTIONS: options_table(records)}, TARGET)
    write_parts(page, {LONG: table(records)}, TARGET)
    return [
        _draw(_drawn([r for r in records if (r["case"], r["form"]) == pair]), results / "{}_{}.png".format(*pair))
        for pair in _pairs(records)
    ]


def read(results: Path) -> list[Record]:
    """What was measured at true size, the newest of each cell; files from before the harness have other fields."""
    measured = [
        {**record, "file": path.stem}
        for path in results.glob("*.json")
        for record in typical(json.loads(path.read_text()))
        if "is_mapped" in record and not record["is_mapped"] and not record["case"].endswith("(tiny)")
    ]
    found: dict[tuple[object, ...], Record] = {}
    for record in sorted(measured, key=lambda r: (r["date"], r.get("time") or "", r["file"])):
        key = tuple(record.get(name) for name in ("case", "form", "method", "vram_budget", "gpu"))
        # A failure takes no older time away.
        if key not in found or time_of(record) is not None or time_of(found[key]) is None:
            found[key] = record
    if not found:
        raise NoResultsError(f"no results of `python -m benchmarks` at true size in {results}")
    return list(found.values())


def short_table(records: Sequence[Record]) -> list[str]:
    """Lines of Markdown: whole calls in seconds and GiB, a column for each case, on the GPU with most of them, of
    those with all their steps; none where no whole call was measured."""
    calls = _of_one_gpu([r for r in records if r["form"] == "pipeline"])
    columns = [case for case in _MODELS if (case, "pipeline") in _pairs(calls)]
    if not columns:
        return []
    found = {(r["case"], r["method"], r["vram_budget"]): r for r in calls}
    rows = [("all of it on the GPU", [found.get((case, "resident", None)) for case in columns])]
    for budget in _SHORT_BUDGETS:
        rows.append((f"**layerstream, {budget}**", [found.get((case, "layerstream", budget)) for case in columns]))
    fastest = [_fastest_other(calls, case) for case in columns]
    rows.append((f"the fastest other way within {_CARD_GIB} GiB", fastest))
    offload = [found.get((case, "model_offload", None)) for case in columns]
    rows.append(("diffusers' `enable_model_cpu_offload()`", offload))
    lines = [
        "| one image | " + " | ".join(_MODELS[case] for case in columns) + " |",
        "|---|" + "---|" * len(columns),
        *("| " + " | ".join([name, *map(_short_cell, cells)]) + " |" for name, cells in rows),
    ]
    others: dict[str, list[str]] = {}
    for case, record in zip(columns, fastest, strict=True):
        if record is not None:
            others.setdefault(_LABELS.get(record["method"], record["method"]), []).append(_MODELS[case])
    if others:
        told = "; ".join(f"{method} ({' and '.join(cases)})" for method, cases in others.items())
        lines += ["", f"The fastest other ways: {told}."]
    return lines


def _fastest_other(calls: Sequence[Record], case: str) -> Record | None:
    """Of other libraries' calls that gave the same image within the card's memory."""
    timed = [
        (time, r["method"], r)
        for r in calls
        if r["case"] == case and r["equal"] and r["method"] not in ("resident", *OURS)
        if (time := time_of(r)) is not None and (r["peak_reserved_bytes"] or 0) <= _CARD_GIB * 2**30
    ]
    return min(timed, default=(0.0, "", None))[2]


def _short_cell(record: Record | None) -> str:
    if record is None:
        return ""
    time, peak = time_of(record), record["peak_reserved_bytes"]
    if time is None or peak is None:
        return (record["error"] or "not told").split(", in ")[0]
    return f"{'~' if record.get('is_extrapolated') else ''}{time:.1f} s, {_gib(record)}"


def options_table(records: Sequence[Record]) -> list[str]:
    """Lines of Markdown: passes of denoisers with pairing and packing, as ratios to resident and GiB, a column for each
    case, on the GPU with most of them; none where none was measured.

    Two groups of rows: the least memory, and the largest budget under which each option was measured; without options,
    under such budgets only. All outputs are bit-equal.
    """
    passes = [r for r in records if r["form"] == "denoiser" and r["equal"] and r["peak_reserved_bytes"]]
    gpu = _most_measured([r for r in passes if r["method"] in _WITH_OPTIONS])
    passes = [r for r in passes if r["gpu"] == gpu and r["ratio_to_resident"]]
    of_case = {case: [r for r in passes if r["case"] == case] for case in _MODELS}
    columns = [case for case in _MODELS if any(r["method"] in _WITH_OPTIONS for r in of_case[case])]
    if not columns:
        return []
    resident = [next((r for r in of_case[case] if r["method"] == "resident"), None) for case in columns]
    rows = [("", "all of it on the GPU", [each and f"1 x, {_gib(each)}" for each in resident])]
    for memory, is_least in (("**least**", True), ("**tight**", False)):
        ours = [_under_tight_budgets(of_case[case], is_least=is_least) for case in columns]
        others = [_other_beside(of_case[case], each) for case, each in zip(columns, ours, strict=True)]
        group = [
            (name, [_option_cell(each.get(method)) for each in ours])
            for method, name in [("layerstream", "layerstream"), *_WITH_OPTIONS.items()]
        ]
        group.append(("another library", [_option_cell(each, is_named=True) for each in others]))
        filled = [(name, cells) for name, cells in group if any(cells)]
        rows += [("" if n else memory, name, cells) for n, (name, cells) in enumerate(filled)]
    return [
        "| memory | one pass | " + " | ".join(_MODELS[case] for case in columns) + " |",
        "|---|---|" + "---|" * len(columns),
        *("| " + " | ".join([memory, name, *(cell or "" for cell in cells)]) + " |" for memory, name, cells in rows),
        "",
        f"GPU: {gpu}.",
    ]


def _under_tight_budgets(passes: Sequence[Record], *, is_least: bool) -> dict[str, Record]:
    """Of each of our methods that of the largest budget under which an option was measured, or of the least memory."""
    budgets = {r["vram_budget"] for r in passes if r["method"] in _WITH_OPTIONS} - {"auto"}
    ours = [r for r in passes if r["method"] in OURS and r["vram_budget"] in budgets]
    found = [r for r in ours if (r["vram_budget"] == "min") is is_least]
    return {r["method"]: r for r in sorted(found, key=lambda r: budget_order(r["vram_budget"]))}


def _other_beside(passes: Sequence[Record], ours: dict[str, Record]) -> Record | None:
    """Another library's: the fastest with no more memory than the most of ours, or that with the least memory."""
    others = [r for r in passes if r["method"] not in ("resident", *OURS)]
    limit = max((r["peak_reserved_bytes"] for r in ours.values()), default=None)
    if limit is None or not others:
        return None
    within = [r for r in others if r["peak_reserved_bytes"] <= limit]
    if within:
        return min(within, key=lambda r: r["ratio_to_resident"])
    return min(others, key=lambda r: r["peak_reserved_bytes"])


def _option_cell(record: Record | None, *, is_named: bool = False) -> str:
    if record is None:
        return ""
    name = _LABELS.get(record["method"], record["method"]).split(", ")[0]
    return f"{record['ratio_to_resident']:.2f} x, {_gib(record)}" + (f" ({name})" if is_named else "")


def _gib(record: Record) -> str:
    return f"{record['peak_reserved_bytes'] / 2**30:.1f} GiB"


def table(records: Sequence[Record]) -> list[str]:
    """Lines of Markdown: a table for each GPU that ran something resident, the one with most times first."""
    gpus = Counter(r["gpu"] for r in records if time_of(r) is not None)
    lines = ["Times as ratios to resident in the same run / peak of reserved GB; bold: bit-equal."]
    for gpu, _ in gpus.most_common():
        alike = [r for r in records if r["gpu"] == gpu]
        if _has(alike, "resident"):
            lines += ["", f"### {gpu}", "", *_table_of_one_gpu(alike)]
    return lines


def _table_of_one_gpu(alike: Sequence[Record]) -> list[str]:
    """A row for each method and budget of which something was begun, a column for each case and form with a time;
    below, why those without a time have none."""
    measured = _pairs(alike)
    pairs = [(case, form) for form in FORMS for case in CASES if (case, form) in measured]
    begun = {(r["method"], r["vram_budget"]) for r in alike if not (r["error"] or "").startswith(NOT_BEGUN)}
    rows = sorted(begun, key=lambda row: (_METHODS.index(row[0]), budget_order(row[1])))
    found = {(r["case"], r["form"], r["method"], r["vram_budget"]): r for r in alike}
    reasons: dict[str, int] = {}
    lines = [
        "| | " + " | ".join(f"{case}, {form}" for case, form in pairs) + " |",
        "|---|" + "---|" * len(pairs),
    ]
    for method, budget in rows:
        cells = [_cell(found.get((*pair, method, budget)), reasons) for pair in pairs]
        name = _LABELS.get(method, method) + (f", {budget}" if budget else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if reasons:
        lines += ["", "No time: " + "; ".join(f"[{number}] {reason}" for reason, number in reasons.items()) + "."]
    return lines


def _cell(record: Record | None, reasons: dict[str, int]) -> str:
    """What the table says of a record: without a time, the number in `reasons` of why, which is added there."""
    if record is None:
        return ""
    if time_of(record) is None:
        innermost = ", in ".join((record["error"] or "not told").split(", in ")[:2])
        return f"[{reasons.setdefault(innermost, len(reasons) + 1)}]"
    if record["method"] == "resident":
        mean = (time_of(record) or 0.0) / (record["ratio_to_resident"] or 1.0)  # of the first and the last
        ratio = f"{mean:.1f} ms" if record["form"] == "denoiser" else f"{mean:.2f} s"
    else:
        mark = "~" if record.get("is_extrapolated") else ""
        ratio = f"{mark}{record['ratio_to_resident']:.2f} x" if record["ratio_to_resident"] else "?"
    peak = record["peak_reserved_bytes"]
    text = ratio if peak is None else f"{ratio} / {peak / 1e9:.1f}"
    return f"**{text}**" if record["equal"] else text


def _drawn(records: Sequence[Record]) -> list[Record]:
    """What one picture shows of a case and form: the GPU that measured resident, a sweep of our budgets and one of our
    options, where there is such a GPU; else that with most times."""
    of_gpu = {gpu: [r for r in records if r["gpu"] == gpu] for gpu in dict.fromkeys(r["gpu"] for r in records)}
    whole = [
        each
        for each in of_gpu.values()
        if _has(each, "resident") and _has(each, "layerstream", _SWEEP) and any(_has(each, m) for m in _WITH_OPTIONS)
    ]
    return _of_one_gpu([r for each in whole for r in each] or records)


def _draw(alike: Sequence[Record], path: Path) -> Path:
    """Draw records of one case, form and GPU."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    case, form, gpu = (alike[0][name] for name in ("case", "form", "gpu"))
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for method, extrapolated in sorted({_kind(r) for r in alike}, key=lambda kind: (_METHODS.index(kind[0]), kind[1])):
        points = sorted(
            (r["peak_reserved_bytes"] / 1e9, time_of(r))
            for r in alike
            if _kind(r) == (method, extrapolated) and time_of(r) is not None and r["peak_reserved_bytes"]
        )
        if points:
            line = "o-" if method in OURS else "o"
            fill, mark = ("none", ", extrapolated") if extrapolated else ("full", "")
            label = _LABELS.get(method, method) + mark
            axes.plot(*zip(*points, strict=True), line, color=_COLOURS[method], fillstyle=fill, label=label)
    axes.set_xlabel("peak of reserved device memory, GB")
    axes.set_ylabel("ms a pass" if form == "denoiser" else "s a call")
    axes.set_yscale("log")
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted("{x:g}")
    resident = next((time_of(r) for r in alike if r["method"] == "resident" and time_of(r) is not None), None)
    if resident is not None:
        axes.axhline(resident, color=_COLOURS["resident"], linestyle=":", linewidth=1)
    axes.set_title(f"{case}, {form}, {gpu}")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _kind(record: Record) -> tuple[str, bool]:
    """Its method, and whether its time is extrapolated: what a colour and a mark stand for."""
    return record["method"], bool(record.get("is_extrapolated"))


def _of_one_gpu(records: Sequence[Record]) -> list[Record]:
    """Those of the GPU with most times."""
    gpu = _most_measured(records)
    return [r for r in records if r["gpu"] == gpu] if gpu else []


def _most_measured(records: Sequence[Record]) -> str | None:
    """The GPU with most times."""
    gpus = Counter(r["gpu"] for r in records if time_of(r) is not None)
    return max(gpus, key=lambda name: gpus[name], default=None)


def _has(records: Sequence[Record], method: str, count: int = 1) -> bool:
    """Whether so many of these are times of a method."""
    return sum(r["method"] == method and time_of(r) is not None for r in records) >= count


def _pairs(records: Sequence[Record]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((r["case"], r["form"]) for r in records if time_of(r) is not None))
