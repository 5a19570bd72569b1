"""One denoiser, resident and streamed in the same process: time per pass, memory, entering and leaving, equality.

    python -m benchmarks.denoiser --case ovis --slots 2 4 --output DIRECTORY
    python -m benchmarks.denoiser --case ovis --scale tiny --device cpu     # tries the program, measures nothing

Resident runs first and last; the ratio is to the mean of both. Times are medians of passes measured by device
events after two warm-up passes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import layerstream
from benchmarks.records import (
    are_good,
    clear,
    command_line,
    facts,
    field,
    gigabytes,
    placed_whole,
    record,
    write,
)
from layerstream.standins import DENOISERS, build_denoiser, denoiser_inputs

_WARM_UP_PASSES = 2
_COLUMNS = {
    "case": field("case"),
    "method": field("method"),
    "plan": field("plan"),
    "ms/pass": field("ms_per_pass"),
    "link limit": field("link_limit_ms_per_pass"),
    "ratio": field("ratio_to_resident"),
    "peak alloc GB": gigabytes("peak_allocated_bytes"),
    "peak reserved GB": gigabytes("peak_reserved_bytes"),
    "enter s": field("enter_s"),
    "GB/s": field("enter_gb_per_s"),
    "exit s": field("exit_s"),
    "GB/pass": gigabytes("loaded_bytes_per_pass"),
    "stall ms": field("stats_stall_ms", digits=1),
    "host RSS GB": gigabytes("host_peak_rss_bytes"),
    "equal": field("equal"),
    "error": field("error"),
}


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
    command = command_line("denoiser", sys.argv[1:] if arguments is None else arguments)
    records = []
    for case in options.case:
        records += measure(case, options, command)
        write(
            records,
            options.output,
            "denoiser",
            title="Denoisers, resident and streamed",
            method=f"{_WARM_UP_PASSES} warm-up passes, then medians; resident first and last, ratio to their mean.",
            columns=_COLUMNS,
            notes=[
                "Stall ms is the sum over the whole run of the cell. Activations are inside the peaks, not the budget."
            ],
        )
    return 0 if are_good(records) else 1


def measure(case: str, options: argparse.Namespace, command: str) -> list[dict[str, Any]]:
    """All records of one case."""
    device = torch.device(options.device)
    fill_device = "cuda" if device.type == "cuda" else None
    model = build_denoiser(case, scale=options.scale, fill_device=fill_device)
    inputs = denoiser_inputs(case, model, device=device, dtype=torch.bfloat16, scale=options.scale)
    clear(device)
    common = facts(
        case if options.scale == "full" else f"{case} (tiny)",
        form="denoiser",
        guidance="single",
        modules=[model],
        device=device,
        command=command,
    )
    print(f"{case}: {common['weights_bytes'] / 1e9:.2f} GB of weights, link {common['link_gb_per_s']} GB/s", flush=True)

    def step() -> torch.Tensor:
        with torch.inference_mode():
            return model(**inputs)[0]

    records, expected = [], None
    with placed_whole([model], device):
        first = timed(step, options.passes, device)
        expected = step().clone()
        records.append(record(common, "resident", first, equal=True))
    plans = [("slots", n) for n in options.slots] + [("budget", b) for b in options.vram_budget]
    for kind, value in plans:
        records.append(streamed(model, step, expected, kind, value, options, device, common))
        report(records[-1])
    with placed_whole([model], device):
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


def report(each: dict[str, Any]) -> None:
    keys = ("ms_per_pass", "link_limit_ms_per_pass", "ratio_to_resident", "host_ms_per_pass", "peak_allocated_bytes")
    keys += ("peak_reserved_bytes", "enter_s", "enter_gb_per_s", "exit_s", "equal", "error")
    print(each["case"], each["method"], each.get("plan", ""), {k: each.get(k) for k in keys if k in each}, flush=True)


if __name__ == "__main__":
    sys.exit(main())
