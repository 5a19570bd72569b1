"""One whole pipeline, resident and streamed in the same process: seconds per call, memory, entering and leaving.

    python -m benchmarks.pipeline --case ovis --vram-budgets 6GiB,10GiB,auto --output DIRECTORY
    python -m benchmarks.pipeline --case ovis --scale tiny --device cpu     # tries the program, measures nothing

A call encodes the prompts, denoises and decodes. Resident runs first and last, each after one short call; the ratio is
to the mean of both. Streamed calls have no warm-up: the first one and the last one are told apart. Every output of
every cell is compared with the first one of the resident pipeline.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import layerstream
from benchmarks import records
from benchmarks.records import Record, are_good, clear, command_line, facts, gigabytes, placed_whole, record
from layerstream.budget import parse_bytes
from layerstream.errors import BudgetError
from layerstream.standins.pipelines import PIPELINES, build_pipeline, pipeline_call

_WARM_UP_STEPS = 2
_COLUMNS = {
    "case": records.field("case"),
    "method": records.field("method"),
    "budget": records.field("vram_budget"),
    "s/call": records.field("seconds"),
    "ratio": records.field("ratio_to_resident"),
    "s first call": records.field("seconds_first_call"),
    "its ratio": records.field("ratio_first_call"),
    "peak alloc GB": gigabytes("peak_allocated_bytes"),
    "peak reserved GB": gigabytes("peak_reserved_bytes"),
    "enter s": records.field("enter_s"),
    "GB/s": records.field("enter_gb_per_s"),
    "exit s": records.field("exit_s"),
    "GB/call": gigabytes("loaded_bytes_per_call"),
    "stall ms": records.field("stats_stall_ms", digits=1),
    "host RSS GB": gigabytes("host_peak_rss_bytes"),
    "equal": records.field("equal"),
    "error": records.field("error"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=PIPELINES, default="ovis", help="one, since the host's peak is the process's")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--vram-budgets", type=_budgets, default=["auto"], help="separated by commas")
    parser.add_argument("--steps", type=int, help="per call; default: what the case is defined with")
    parser.add_argument("--calls", type=int, default=2, help="timed calls of each cell")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    command = command_line("pipeline", sys.argv[1:] if arguments is None else arguments)
    bench = prepare(options, command)
    done: list[Record] = []
    for cell in cells(bench, options.vram_budgets):
        done.append(cell)
        rate(done)
        write(done, options.output, f"pipeline_{options.case}")
        report(cell)
    return 0 if are_good(done) else 1


def _budgets(text: str) -> list[int | str]:
    return [int(word) if word.isdigit() else word for word in text.split(",")]


@dataclass
class Bench:
    """One pipeline with the arguments of its call, and what all its records have in common."""

    pipe: Any
    call: dict[str, Any]
    device: torch.device
    num_calls: int
    common: Record
    expected: torch.Tensor | None = field(default=None)  # what the resident pipeline returned first

    @property
    def modules(self) -> list[nn.Module]:
        return [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]

    def run(self, **changes: Any) -> tuple[torch.Tensor, float]:
        """One call: its images, on the host, and its seconds."""
        generator = torch.Generator("cpu").manual_seed(0)
        self._synchronize()
        started = time.perf_counter()
        images = self.pipe(**{**self.call, **changes}, generator=generator).images
        self._synchronize()
        seconds = time.perf_counter() - started
        return images.cpu(), seconds

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Peaks:
    """The highest readings of the allocator so far.

    The library resets the counters when it learns what a phase takes, so they are read after each step of a cell, and
    what it has seen itself is counted in.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._allocated = self._reserved = 0
        clear(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def read(self, stats: Any = None) -> dict[str, int]:
        if self._device.type == "cuda":
            self._allocated = max(self._allocated, torch.cuda.max_memory_allocated())
            self._reserved = max(self._reserved, torch.cuda.max_memory_reserved())
        self._allocated = max(self._allocated, getattr(stats, "peak_allocated_bytes", 0))
        self._reserved = max(self._reserved, getattr(stats, "peak_reserved_bytes", 0))
        return {"peak_allocated_bytes": self._allocated, "peak_reserved_bytes": self._reserved}


def prepare(options: argparse.Namespace, command: str) -> Bench:
    device = torch.device(options.device)
    started = time.perf_counter()
    pipe = build_pipeline(options.case, scale=options.scale, fill_device="cuda" if device.type == "cuda" else None)
    built_s = time.perf_counter() - started
    clear(device)
    call = pipeline_call(options.case, options.scale)
    if options.steps is not None:
        call["num_inference_steps"] = options.steps
    bench = Bench(pipe, call, device, options.calls, {})
    bench.common = facts(
        options.case if options.scale == "full" else f"{options.case} (tiny)",
        form="pipeline",
        guidance="batched" if options.case == "sd35m" else "single",
        modules=bench.modules,
        device=device,
        command=command,
    )
    bench.common |= {
        "height": call["height"],
        "width": call["width"],
        "num_steps": call["num_inference_steps"],
        "num_calls": options.calls,
        "build_s": round(built_s, 3),
    }
    gb, link = bench.common["weights_bytes"] / 1e9, bench.common["link_gb_per_s"]
    print(f"{options.case}: {gb:.2f} GB of weights built in {built_s:.1f} s, link {link} GB/s", flush=True)
    return bench


def cells(bench: Bench, vram_budgets: list[int | str]) -> Iterator[Record]:
    """Each cell's record as soon as it is done."""
    yield resident(bench)
    for budget in vram_budgets:
        yield streamed(bench, budget)
    yield resident(bench)


def resident(bench: Bench) -> Record:
    result = _empty()
    peaks = Peaks(bench.device)
    try:
        with placed_whole(bench.modules, bench.device):
            bench.run(num_inference_steps=_WARM_UP_STEPS)
            for images in timed_calls(bench, peaks, result):
                if bench.expected is None:
                    bench.expected = images
                compare(images, bench.expected, result)
    except Exception as exc:
        result["error"] = told_of(exc)
    forget(bench.device)
    return record(bench.common, "resident", result | peaks.read(), equal=result["equal"])


def streamed(bench: Bench, vram_budget: int | str) -> Record:
    """One budget's cell; its failure is a record, so that the others are not lost."""
    device = bench.device
    result: Record = {**_empty(), "vram_budget": vram_budget}
    peaks = Peaks(device)
    before = _allocated_bytes(device)
    common = bench.common
    try:
        if isinstance(vram_budget, int):
            result["vram_budget_bytes"] = vram_budget
        else:
            with contextlib.suppress(BudgetError):  # "auto", "min"
                result["vram_budget_bytes"] = parse_bytes(vram_budget)
        streamer = layerstream.offload(bench.pipe, vram_budget=vram_budget, device=device)
        started = time.perf_counter()
        streamer.start()
        result["enter_s"] = round(time.perf_counter() - started, 3)
        result["enter_gb_per_s"] = round(common["weights_bytes"] / result["enter_s"] / 1e9, 2)
        peaks.read()
        with contextlib.closing(streamer):
            try:
                loaded = streamer.stats().loaded_bytes
                for images in timed_calls(bench, peaks, result):
                    compare(images, bench.expected, result)
                    loaded, before_call = streamer.stats().loaded_bytes, loaded
                    result["loaded_bytes_per_call"] = loaded - before_call
            finally:
                result |= told_by(streamer)
                peaks.read(streamer.stats())
                started = time.perf_counter()
        result["exit_s"] = round(time.perf_counter() - started, 3)
        if result.get("stats_num_paired_passes"):
            common = {**common, "guidance": "paired"}
    except Exception as exc:
        result["error"] = told_of(exc)
    forget(device)
    result["left_on_device_bytes"] = _allocated_bytes(device) - before
    return record(common, "layerstream", result | peaks.read(), equal=result["equal"])


def _empty() -> Record:
    return {"vram_budget": None, "error": None, "equal": None, "seconds": None, "seconds_first_call": None}


def _allocated_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def timed_calls(bench: Bench, peaks: Peaks, result: Record) -> Iterator[torch.Tensor]:
    """The images of each call; `result` has the seconds so far, so that a call that fails leaves those before it."""
    for number in range(bench.num_calls):
        images, seconds = bench.run()
        peaks.read()
        result["seconds"] = round(seconds, 3)
        if number == 0:
            result |= {"seconds_first_call": result["seconds"], "seconds_all_calls": []}
        result["seconds_all_calls"].append(result["seconds"])
        yield images


def compare(images: torch.Tensor, expected: torch.Tensor | None, result: Record) -> None:
    """Take one output into the cell's verdict; without an expected one there is none."""
    if expected is not None:
        result["equal"] = result["equal"] is not False and torch.equal(images, expected)
    result["is_finite"] = bool(images.isfinite().all())
    # Were nearly all values cut off at the ends of 0..1, equality would mean little.
    result["clamped_fraction"] = round(float(((images <= 0) | (images >= 1)).float().mean()), 4)


def told_of(exc: Exception) -> str:
    """The error for its record; the whole story goes to the terminal."""
    traceback.print_exc()
    return repr(exc)


def forget(device: torch.device) -> None:
    """Let go of what a cell that failed half-way still holds."""
    gc.collect()
    clear(device)


def told_by(streamer: Any) -> Record:
    """What the streamer says of itself."""
    told: Record = {f"stats_{name}": value for name, value in streamer.stats().as_dict().items()}
    told["streamer"] = str(streamer)
    if hasattr(streamer, "report"):
        try:
            told["report"] = str(streamer.report())
        except Exception as exc:  # after a failed call, whose error must not be lost
            told["report"] = told_of(exc)
    return told


def rate(done: list[Record]) -> None:
    """Give each record its ratio to the mean of the resident cells so far."""
    references = [r["seconds"] for r in done if r["method"] == "resident" and r["seconds"]]
    if not references:
        return
    mean = sum(references) / len(references)
    for each in done:
        for name, ratio in (("seconds", "ratio_to_resident"), ("seconds_first_call", "ratio_first_call")):
            each[ratio] = round(each[name] / mean, 4) if each[name] else None


def report(each: Record) -> None:
    keys = ("seconds", "ratio_to_resident", "seconds_first_call", "peak_allocated_bytes", "peak_reserved_bytes")
    keys += ("enter_s", "exit_s", "loaded_bytes_per_call", "equal", "error")
    print(each["case"], each["method"], each["vram_budget"] or "", {k: each[k] for k in keys if k in each}, flush=True)
    print(each.get("report", ""), flush=True)


def write(done: list[Record], directory: Path, topic: str) -> None:
    first = done[0]
    work = f"{first['width']} x {first['height']}, {first['num_steps']} steps"
    notes = [
        "Stall ms is the sum over all calls of the cell. Peaks are of the whole cell, activations included; "
        "allocated bytes are only seen since the library last reset the counters."
    ]
    for each in done:
        said = [each[name] for name in ("streamer", "report") if each.get(name)]
        if said:
            notes += [f"## vram_budget {each['vram_budget']}", "\n".join(["```", *said, "```"])]
    records.write(
        done,
        directory,
        topic,
        title="Whole pipeline, resident and streamed",
        method=f"{work}. Resident first and last, after a call of {_WARM_UP_STEPS} steps; s/call is the last of "
        f"{first['num_calls']} calls, ratio to the mean of both resident ones.",
        columns=_COLUMNS,
        notes=notes,
    )


if __name__ == "__main__":
    sys.exit(main())
