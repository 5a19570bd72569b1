"""Facts of the machine, and records with their files."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import resource
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import layerstream
from layerstream.budget import parse_bytes

Record = dict[str, Any]

# Fields that say where and when, which all records of one run have in common.
FACTS = ("gpu", "link_gb_per_s", "machine", "versions", "commit", "date", "time")

NOT_BEGUN = "not begun"  # how the errors of those begin for which there was no time left


def command_line(arguments: Sequence[str]) -> str:
    """What to type to measure the same; where the results went does not belong to it."""
    kept: list[str] = []
    is_folder = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if is_folder:
            is_folder = False
        elif len(name) > len("--") and "--output".startswith(name):  # the parser takes beginnings of names
            is_folder = not equals
        else:
            kept.append(argument)
    return " ".join(["python -m benchmarks", *kept])


def facts(modules: Sequence[nn.Module], device: torch.device) -> Record:
    """The fields that say what was measured where; none says which machine it was, only what kind."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "weights_bytes": sum(t.numel() * t.element_size() for t in tensors_of(modules)),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "simulated",
        "link_gb_per_s": round(link_gb_per_s(device), 2),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "date": f"{now:%Y-%m-%d}",
        "time": f"{now:%H:%M:%S}",
    }


def peak_rss_bytes() -> int:
    """The most host memory that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rss_bytes() -> int:
    """Host memory that this process has resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def locked_bytes() -> int | None:
    """Host memory that the system has locked for this process; None where it does not say, as of what CUDA locks."""
    fields = dict(line.split(":", 1) for line in _lines("/proc/self/status") if ":" in line)
    known = [int(fields[name].split()[0]) * 1024 for name in ("VmLck", "VmPin") if name in fields]
    return max(known, default=0) or None


def are_good(records: Sequence[Record]) -> bool:
    """Whether every cell ran and no output differed."""
    return all(r["equal"] is not False and not r["error"] for r in records)


def time_of(record: Record) -> float | None:
    """Milliseconds of a denoiser's pass, or seconds of a pipeline's call; None if it was not measured."""
    time: float | None = record["ms_per_pass"] if record["form"] == "denoiser" else record["seconds"]
    return time


def typical(records: Sequence[Record]) -> list[Record]:
    """One record for each measurement that was made several times in turns: that of the median time, with the highest
    memory of all; equal if all with a time were. A time that is missing counts as the longest. Others as they are."""
    groups: dict[tuple[object, ...], list[Record]] = {}
    for each in records:
        key = tuple(each.get(name) for name in ("case", "form", "method", "vram_budget", "is_mapped"))
        groups.setdefault(key, []).append(each)
    return [each for group in groups.values() for each in _typical(group)]


def _typical(group: Sequence[Record]) -> Sequence[Record]:
    if len({each.get("round", 0) for each in group}) == 1:
        return group
    times = [math.inf if (time := time_of(each)) is None else time for each in group]
    middle = sorted(zip(times, range(len(group)), strict=True))[(len(group) - 1) // 2][1]
    peaks = [each["peak_reserved_bytes"] for each in group if each.get("peak_reserved_bytes")]
    together = {
        "num_rounds": len(group),
        "times_of_rounds": [time for time in times if time < math.inf],
        "equal": _all_of([each["equal"] for each in group if time_of(each) is not None]),
        "peak_reserved_bytes": max(peaks, default=None),
    }
    return [{**group[middle], **together}]


def _all_of(answers: Sequence[bool | None]) -> bool | None:
    return False if False in answers else None if None in answers or not answers else True


def budget_order(vram_budget: str | None) -> float:
    """By which budgets are sorted: bytes, the least before and all that is free behind every size."""
    if vram_budget in (None, "min"):
        return 0.0
    return math.inf if vram_budget == "auto" else float(parse_bytes(vram_budget))


def tensors_of(modules: Sequence[nn.Module]) -> list[torch.Tensor]:
    """Each parameter and buffer once, however many modules share it."""
    found = [t for module in modules for t in [*module.parameters(), *module.buffers()]]
    return list({id(t): t for t in found}.values())


def link_gb_per_s(device: torch.device) -> float:
    """Host-to-device speed of page-locked memory, in blocks of 64 MiB."""
    if device.type != "cuda":
        return 50.0
    host = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(2**26, dtype=torch.uint8, device=device)
    target.copy_(host, non_blocking=True)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(32):
        target.copy_(host, non_blocking=True)
    end.record()
    torch.cuda.synchronize()
    return 32 * 2**26 / start.elapsed_time(end) / 1e6


def machine() -> dict[str, Any]:
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next((int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {"cpu": names[0] if names else platform.processor(), "cores": len(names), "memory_bytes": memory}


def _lines(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text().splitlines()
    return []


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    found["layerstream"] = layerstream.__version__
    for name in ("torch", "diffusers", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str:
    """The commit measured; from the environment where the tree was copied without its history."""
    if os.environ.get("LAYERSTREAM_COMMIT"):
        return os.environ["LAYERSTREAM_COMMIT"]
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(
    records: Sequence[Record],
    directory: Path,
    topic: str,
    *,
    title: str,
    method: str,
    columns: Mapping[str, Callable[[Record], object]],
    notes: Sequence[str],
) -> None:
    """JSON, and beside it the same as Markdown.

    Args:
        topic: of the file name, which goes on with the GPU and the date.
        title: of the page; the GPU follows.
        method: a line on how it was measured.
        columns: what each column of the table shows of a record; None is an empty cell.
        notes: paragraphs below the table.
    """
    first = next((r for r in records if r["gpu"]), records[0])
    gpu = (first["gpu"] or "nothing").replace("NVIDIA ", "").split()[0].lower()
    path = directory / f"{topic}_{gpu}_{(first['date'] or 'never').replace('-', '')}"
    directory.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(records, indent=1) + "\n")
    lines = [
        f"# {title}: {first['gpu']}",
        "",
        f"- Machine: {first['gpu']}, link {first['link_gb_per_s']} GB/s measured; {first['machine']}",
        f"- Versions: {first['versions']}; commit {first['commit']}; {first['date']}",
        f"- Command: `{first['command']}`",
        f"- {method}",
        "",
        *table(records, columns),
    ]
    for note in notes:
        lines += ["", note]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def table(records: Sequence[Record], columns: Mapping[str, Callable[[Record], object]]) -> list[str]:
    """Lines of Markdown: a row for each record, with what each column shows of it; None is an empty cell."""
    rows = [[cell(each) for cell in columns.values()] for each in records]
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in rows),
    ]


def field(name: str, digits: int | None = None) -> Callable[[Record], object]:
    """A column with a field of the record as it is, or rounded."""

    def cell(each: Record) -> object:
        value = each.get(name)
        return value if value is None or digits is None else round(value, digits)

    return cell


def gigabytes(name: str) -> Callable[[Record], object]:
    """A column with a field of bytes in GB."""

    def cell(each: Record) -> object:
        value = each.get(name)
        return None if value is None else round(value / 1e9, 3)

    return cell
