"""One denoiser, resident and streamed in the same process: time per pass, memory, entering and leaving, equality.

    python -m benchmarks.denoiser --case ovis --slots 2 4 --output DIRECTORY
    python -m benchmarks.denoiser --case ovis --scale tiny --device cpu     # tries the program, measures nothing

Resident runs first and last; the ratio is to the mean of both. Times are medians of passes measured by device
events after two warm-up passes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import layerstream
from layerstream.standins import DENOISERS, build_denoiser, denoiser_inputs

_WARM_UP_PASSES = 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.denoiser", description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=DENOISERS, default=["ovis"])
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--slots", type=int, nargs="+", default=[2, 4], help="streamed with so many slots")
    parser.add_argument("--vram-budget", nargs="*", default=[], help="also with these budgets of weights")
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    command = command_line(sys.argv[1:] if arguments is None else arguments)
    records = []
    for case in options.case:
        records += measure(case, options, command)
        gpu = records[0]["gpu"].replace("NVIDIA ", "").split()[0].lower()
        write(records, options.output, f"denoiser_{gpu}_{datetime.date.today():%Y%m%d}")
    return 0 if all(r["equal"] is not False and not r["error"] for r in records) else 1


def command_line(arguments: list[str]) -> str:
    """What to type to measure the same; where the results went does not belong to it."""
    kept = list(arguments)
    if "--output" in kept:
        position = kept.index("--output")
        del kept[position : position + 2]
    return " ".join(["python -m benchmarks.denoiser", *kept])


def measure(case: str, options: argparse.Namespace, command: str) -> list[dict[str, Any]]:
    """All records of one case."""
    device = torch.device(options.device)
    fill_device = "cuda" if device.type == "cuda" else None
    model = build_denoiser(case, scale=options.scale, fill_device=fill_device)
    inputs = denoiser_inputs(case, model, device=device, dtype=torch.bfloat16, scale=options.scale)
    clear(device)
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    common = {
        "case": case if options.scale == "full" else f"{case} (tiny)",
        "form": "denoiser",
        "guidance": "single",
        "weights_bytes": weights,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "simulated",
        "link_gb_per_s": round(link_gb_per_s(device), 2),
        "machine": machine(),
        "versions": versions(),
        "command": command,
        "commit": commit(),
        "date": f"{datetime.date.today():%Y-%m-%d}",
    }
    print(f"{case}: {weights / 1e9:.2f} GB of weights, link {common['link_gb_per_s']} GB/s", flush=True)

    def step() -> torch.Tensor:
        with torch.inference_mode():
            return model(**inputs)[0]

    records, expected = [], None
    with placed_whole(model, device):
        first = timed(step, options.passes, device)
        expected = step().clone()
        records.append(record(common, "resident", first, equal=True))
    plans = [("slots", n) for n in options.slots] + [("budget", b) for b in options.vram_budget]
    for kind, value in plans:
        records.append(streamed(model, step, expected, kind, value, options, device, common))
        report(records[-1])
    with placed_whole(model, device):
        last = timed(step, options.passes, device)
        records.append(record(common, "resident", last, equal=bool(torch.equal(step(), expected))))
    mean = (first["ms_per_pass"] + last["ms_per_pass"]) / 2
    for each in records:
        if each["ms_per_pass"]:
            each["ratio_to_resident"] = round(each["ms_per_pass"] / mean, 4)
    report(records[0])
    report(records[-1])
    return records


def streamed(
    model: nn.Module,
    step: Callable[[], torch.Tensor],
    expected: torch.Tensor,
    kind: str,
    value: Any,
    options: argparse.Namespace,
    device: torch.device,
    common: dict[str, Any],
) -> dict[str, Any]:
    """One cell; its failure is a record, so that the others are not lost."""
    clear(device)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    result: dict[str, Any] = {"vram_budget_bytes": None, "error": None, "equal": None, "ms_per_pass": None}
    try:
        streamer = layerstream.offload(model, vram_budget="min" if kind == "slots" else value, device=device)
        if kind == "slots":
            streamer._num_slots = value
        started = time.perf_counter()
        streamer.start()
        result["enter_s"] = round(time.perf_counter() - started, 3)
        with contextlib.closing(streamer):
            result |= timed(step, options.passes, device)
            loads = streamer.stats().loaded_bytes
            outputs = [step() for _ in range(3)]
            result["loaded_bytes_per_pass"] = (streamer.stats().loaded_bytes - loads) // 3
            result["equal"] = all(torch.equal(o, expected) for o in outputs)
            del outputs
            result |= {f"stats_{k}": v for k, v in streamer.stats().as_dict().items()}
            started = time.perf_counter()
        result["exit_s"] = round(time.perf_counter() - started, 3)
        if device.type == "cuda":
            torch.cuda.synchronize()
            result["left_on_device_bytes"] = torch.cuda.memory_allocated() - before
        result["enter_gb_per_s"] = round(common["weights_bytes"] / result["enter_s"] / 1e9, 2)
        limit = result["loaded_bytes_per_pass"] / common["link_gb_per_s"] / 1e6
        result["link_limit_ms_per_pass"] = round(limit, 2)
    except Exception as exc:
        result["error"] = repr(exc)
    result["plan"] = f"{kind}={value}"
    return record(common, "layerstream", result, equal=result["equal"])


def record(common: dict[str, Any], method: str, measured: dict[str, Any], *, equal: bool | None) -> dict[str, Any]:
    empty = {"vram_budget_bytes": None, "enter_s": None, "exit_s": None, "predicted_ms_per_pass": None, "error": None}
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**common, "method": method, **empty, **measured, "equal": equal, "host_peak_rss_bytes": usage}


def timed(step: Callable[[], torch.Tensor], passes: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds per pass and the memory peaks, warm."""
    for _ in range(_WARM_UP_PASSES):
        step()
    if device.type != "cuda":
        times = []
        for _ in range(passes):
            started = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - started))
        return {"ms_per_pass": round(statistics.median(times), 3), "peak_allocated_bytes": 0, "peak_reserved_bytes": 0}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(passes + 1)]
    events[0].record()
    started = time.perf_counter()
    for event in events[1:]:
        step()
        event.record()
    host_ms = 1e3 * (time.perf_counter() - started) / passes
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return {
        "ms_per_pass": round(statistics.median(times), 3),
        "ms_per_pass_range": [round(min(times), 3), round(max(times), 3)],
        "host_ms_per_pass": round(host_ms, 3),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


@contextlib.contextmanager
def placed_whole(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on the device, as `.to(device)` leaves it; afterwards its host tensors themselves are back."""
    tensors = [*model.parameters(), *model.buffers()]
    homes = [t.data for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home
        clear(device)


def clear(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def link_gb_per_s(device: torch.device) -> float:
    """Host-to-device speed of page-locked memory, in blocks of 256 MiB."""
    if device.type != "cuda":
        return 50.0
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(2**28, dtype=torch.uint8, device=device)
    target.copy_(host, non_blocking=True)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(8):
        target.copy_(host, non_blocking=True)
    end.record()
    torch.cuda.synchronize()
    return 8 * 2**28 / start.elapsed_time(end) / 1e6


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


def report(each: dict[str, Any]) -> None:
    keys = ("ms_per_pass", "link_limit_ms_per_pass", "ratio_to_resident", "host_ms_per_pass", "peak_allocated_bytes")
    keys += ("peak_reserved_bytes", "enter_s", "enter_gb_per_s", "exit_s", "equal", "error")
    print(each["case"], each["method"], each.get("plan", ""), {k: each.get(k) for k in keys if k in each}, flush=True)


def write(records: list[dict[str, Any]], directory: Path, name: str) -> None:
    """JSON, and the same as a Markdown table."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n")
    first = records[0]
    lines = [
        f"# Denoisers, resident and streamed: {first['gpu']}",
        "",
        f"- Machine: {first['gpu']}, link {first['link_gb_per_s']} GB/s measured; {first['machine']}",
        f"- Versions: {first['versions']}; commit {first['commit']}; {first['date']}",
        f"- Command: `{first['command']}`",
        f"- {_WARM_UP_PASSES} warm-up passes, then medians; resident first and last, ratio to their mean.",
        "",
        "| case | method | plan | ms/pass | link limit | ratio | peak alloc GB | peak reserved GB | enter s | GB/s "
        "| exit s | GB/pass | stall ms | host RSS GB | equal | error |",
        "|" + "---|" * 16,
    ]
    for r in records:
        cells = [r["case"], r["method"], r.get("plan", ""), r["ms_per_pass"], r.get("link_limit_ms_per_pass")]
        cells += [r.get("ratio_to_resident"), _gb(r.get("peak_allocated_bytes")), _gb(r.get("peak_reserved_bytes"))]
        cells += [r["enter_s"], r.get("enter_gb_per_s"), r["exit_s"], _gb(r.get("loaded_bytes_per_pass"))]
        stall = r.get("stats_stall_ms")
        cells += [None if stall is None else round(stall, 1), _gb(r["host_peak_rss_bytes"]), r["equal"], r["error"]]
        lines.append("| " + " | ".join("" if c is None else str(c) for c in cells) + " |")
    lines += [
        "",
        "Stall ms is the sum over the whole run of the cell. Activations are inside the peaks, not the budget.",
    ]
    (directory / f"{name}.md").write_text("\n".join(lines) + "\n")


def _gb(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else round(num_bytes / 1e9, 3)


if __name__ == "__main__":
    sys.exit(main())
