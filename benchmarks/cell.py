"""One measurement, in the process that it has for itself."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import statistics
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import layerstream
from benchmarks import cases, repeats, weights
from benchmarks.cases import Form, Work
from benchmarks.methods import METHODS, OURS, MissingPeerError, Setup
from benchmarks.records import FACTS, Record, facts, locked_bytes, peak_rss_bytes, rss_bytes
from layerstream.budget import parse_bytes
from layerstream.errors import BudgetError
from layerstream.standins.repository.full_size.specs import Scale

_SLOW_PASS_MS = 1000  # what takes longer is timed fewer times
_SLOW_PASSES = 2
_PASSES = 10  # timed, where the case says nothing
# All methods are warmed up alike, as far as that takes this long: an H200 that has computed for two seconds more takes
# 2.5 % longer for the same pass (results/denoisers-turns_h200_20261129.md: resident came after two passes there).
_WARM_UPS, _WARM_UP_SECONDS = 10, 4.0
_EXPERT_ROUNDS = 2  # of a step of each expert, before those that are timed
_FEW_STEPS = (1, 3)  # of calls that warm up, and from which a call that would take too long is extrapolated
_WARM_UP_CALLS, _WARM_UP_STEPS = 3, 3  # of ours, before the call that is told; the last is a whole one
_LEAST_SECONDS, _MOST_CALLS = 5.0, 3  # of whole calls: short ones are timed more than once
_LEAST_SECONDS_WITH_TOKENS = 2.0  # such calls repeat much within
_LOOP, _ISSUED = 300_000, 500  # what tells how fast the host is
_SLOW_CALL_S = 5.0  # after a first step that takes so long, warming up more changes little


@dataclass(frozen=True)
class Cell:
    """What to measure.

    Attributes:
        passes: timed passes of a denoiser; None: those of the case's steps, or ten.
        steps: of a pipeline's call; None: what the case is defined with.
        call_seconds: a peer's call that would take longer is extrapolated from calls of a few steps.
        tells_first_call: a pipeline's first call is a whole one, too, and told; else calls of a few steps come first.
        is_mapped: the weights lie in a mapped file, as a checkpoint's do, rather than in memory of their own.
        round: of measurements that are made several times in turns, which time this is.
        folder: where the case's weights are, and the output of the first resident measurement.
    """

    case: str
    form: Form
    method: str
    folder: str
    vram_budget: int | str | None = None
    scale: Scale = "full"
    device: str = "cuda"
    passes: int | None = None
    steps: int | None = None
    call_seconds: float = 120
    tells_first_call: bool = True
    is_mapped: bool = False
    round: int = 0


def prepare(cell: Cell) -> None:
    """Draw the case's weights and keep them in files, unless they are there."""
    folder = Path(cell.folder) / "weights"
    if not weights.is_stored(folder):
        weights.store(_drawn(cell).modules, folder)


def _drawn(cell: Cell) -> Work:
    """The case with its weights, in memory of their own; the same in every process on this device."""
    return cases.build(cell.case, cell.form, cell.scale, fill_device="cuda" if cell.device == "cuda" else None)


def refusal(cell: Cell) -> str | None:
    """Why a budget is too small for our least plan; None if it is not. Measures nothing."""
    work = cases.build(cell.case, cell.form, cell.scale, is_filled=False)
    try:
        layerstream.plan(work.target, vram_budget=cell.vram_budget or "auto", device=cell.device)
    except BudgetError as exc:
        return str(exc)
    return None


def measure(cell: Cell, command: str) -> Record:
    """The cell's record; what goes wrong is in it."""
    device = torch.device(cell.device)
    method = METHODS[cell.method]
    is_read = weights.is_stored(Path(cell.folder) / "weights")
    work = cases.build(cell.case, cell.form, cell.scale, is_filled=False) if is_read else _drawn(cell)
    work.steps = cell.steps
    # The libraries' progress bars would make a semaphore for other processes, which nobody takes away.
    tqdm.set_lock(threading.RLock())
    if is_read:
        weights.give(work.modules, Path(cell.folder) / "weights", is_mapped=cell.is_mapped)
    record = {**empty_record(cell, command), **facts(list(work.modules.values()), device)}
    try:
        method.check()
        _measure(cell, work, device, record)
    except MissingPeerError as exc:
        record["error"] = str(exc)
    except torch.OutOfMemoryError as exc:
        record["error"] = f"does not fit on this device: {exc}"[:300]
    except Exception as exc:
        traceback.print_exc()
        record["error"] = repr(exc)[:1000]
    record["host_peak_rss_bytes"] = peak_rss_bytes()
    return record


def empty_record(cell: Cell, command: str) -> Record:
    """What is known of a measurement before it is made; null for the rest."""
    names = ("weights_bytes", "vram_budget_bytes", "ms_per_pass", "seconds", "seconds_first_call", "ratio_to_resident")
    names += ("enter_s", "exit_s", "peak_reserved_bytes", "peak_allocated_bytes", "host_peak_rss_bytes", "locked_bytes")
    record: Record = dict.fromkeys((*names, *FACTS, "predicted_ms_per_pass", "equal", "error"))
    record |= {
        "case": cell.case if cell.scale == "full" else f"{cell.case} (tiny)",
        "form": cell.form,
        "guidance": cases.GUIDANCE[cell.case],
        "method": cell.method,
        "vram_budget": cell.vram_budget,
        "is_mapped": cell.is_mapped,
        "round": cell.round,
        "command": command,
    }
    if isinstance(cell.vram_budget, int):
        record["vram_budget_bytes"] = cell.vram_budget
    elif cell.vram_budget is not None:
        with contextlib.suppress(BudgetError):  # "auto", "min"
            record["vram_budget_bytes"] = parse_bytes(cell.vram_budget)
    return record


def _measure(cell: Cell, work: Work, device: torch.device, record: Record) -> None:
    method = METHODS[cell.method]
    memory = _Memory(device)
    with method.mode() if cell.form == "denoiser" else contextlib.nullcontext(), contextlib.ExitStack() as undo:
        setup = Setup(work, device, cell.vram_budget, undo, folder=Path(cell.folder))
        gc.collect()
        gc.freeze()  # the libraries' objects: going through them takes a pass' time, at no moment in particular
        record["host_rss_before_bytes"] = rss_bytes()
        started = time.perf_counter()
        method.apply(setup)
        memory.synchronize()
        record["enter_s"] = round(time.perf_counter() - started, 4)
        record["enter_gb_per_s"] = round(record["weights_bytes"] / record["enter_s"] / 1e9, 2)
        record["locked_bytes"] = locked_bytes()
        try:
            repeated = _calls_with_tokens if work.repeated else _calls
            run = _passes if cell.form == "denoiser" else repeated
            run(cell, setup, memory, record)
            record |= _host_speed(device)
        finally:
            record |= setup.tell()
            memory.read(record)
            started = time.perf_counter()
    memory.synchronize()
    record["exit_s"] = round(time.perf_counter() - started, 4)
    setup.tell = dict
    gc.collect()
    record["left_on_device_bytes"] = memory.left_bytes()


def _passes(cell: Cell, setup: Setup, memory: _Memory, record: Record) -> None:
    """Time passes, and compare the output for each text."""
    work, device, counters = setup.work, setup.device, setup.counters
    turns = work.turns(device)
    numbered = list(enumerate(turns))
    outputs: dict[int, torch.Tensor] = {}
    held: list[int] = []

    def step(number: int, turn: tuple[str, dict[str, Any]]) -> None:
        name, given = turn
        if counters is not None:
            held.append(counters.held_bytes(work.modules[name]))
        outputs[number] = work.modules[name](**given)[0]

    num_needed = METHODS[cell.method].num_warm_ups
    num_alike = num_needed if _are_experts(turns) else max(num_needed, _WARM_UPS)
    num_each = work.passes_per_step
    began = time.perf_counter()
    for number, turn in enumerate(_warm_up_turns(numbered, num_alike)):
        started = time.perf_counter()
        if number >= _even(num_needed) and number % num_each == 0 and started - began > _WARM_UP_SECONDS:
            break
        is_told = cell.method == "resident" and number == 0
        with repeats.measuring_used(record) if is_told else contextlib.nullcontext():
            step(*turn)
        memory.synchronize()
        seconds = time.perf_counter() - started
    memory.read(record)
    count = cases.passes_of(turns, cell.case, cell.passes, _PASSES)
    if seconds >= _SLOW_PASS_MS / 1e3 and work.about.num_steps is None:
        count = min(count, _SLOW_PASSES)
    count = (
        math.ceil(count / len(turns)) * len(turns) if _are_experts(turns) else math.ceil(count / num_each) * num_each
    )
    held.clear()
    loaded = None if counters is None else counters.loaded_bytes()
    wanted = itertools.cycle(numbered)
    times = _timed(lambda: step(*next(wanted)), count, device, record)
    record["num_passes"] = count
    # Of steps: where the two passes of one run side by side, neither has a time of its own.
    by_step = [sum(times[i : i + num_each]) / num_each for i in range(0, count, num_each)]
    record["ms_per_pass"] = round(statistics.median(by_step), 3)
    record["ms_per_pass_range"] = [round(min(by_step), 3), round(max(by_step), 3)]
    seconds_each = round(record["ms_per_pass"] / 1e3, 6)
    record |= {"pass_s": seconds_each, "pass_loop_s": seconds_each, "pass_outside_s": 0.0}
    if counters is not None and loaded is not None:
        record["loaded_bytes_per_pass"] = (counters.loaded_bytes() - loaded) // count
        record["pass_held_bytes"] = int(statistics.median(held))
    if _are_experts(turns):
        record |= _at_the_switch(times, turns, work.passes_per_step)
    told = {f"pass {number}": [output.cpu()] for number, output in sorted(outputs.items())}
    _compare(told, Path(cell.folder) / "expected_denoiser.pt", cell.method, record)


def _are_experts(turns: Sequence[tuple[str, Any]]) -> bool:
    return len({name for name, _ in turns}) > 1


def _warm_up_turns(numbered: Sequence[tuple[int, Any]], count: int) -> list[tuple[int, Any]]:
    """So many passes before those that are timed; of experts, whose passes take long, a step of each at a time."""
    names = list(dict.fromkeys(name for _, (name, _) in numbered))
    if len(names) == 1:
        return [turn for turn, _ in zip(itertools.cycle(numbered), range(_even(count)), strict=False)]
    one_step = [turn for name in names for turn in [t for t in numbered if t[1][0] == name][:2]]
    return one_step[::2] if count <= 2 else one_step * _EXPERT_ROUNDS


def _at_the_switch(times: Sequence[float], turns: Sequence[tuple[str, Any]], passes_per_step: int) -> Record:
    """The step in which another expert begins, beside the other steps of the same call."""
    steps = [sum(times[i : i + passes_per_step]) for i in range(0, len(times), passes_per_step)]
    experts = [turns[i % len(turns)][0] for i in range(0, len(times), passes_per_step)]
    switches = [i for i in range(1, len(steps)) if experts[i] != experts[i - 1]]
    slowest = max(steps[i] for i in switches)
    others = [step for i, step in enumerate(steps) if i not in switches]
    return {
        "ms_of_steps": [round(step, 3) for step in steps],
        "ms_at_switch": round(slowest, 3),
        "switch_ratio": round(slowest / statistics.median(others), 4),
    }


def _even(count: int) -> int:
    """So that each text has its turn, and the first comes first again."""
    return count + count % 2


def _timed(step: Any, count: int, device: torch.device, record: Record) -> list[float]:
    """Milliseconds of each of `count` steps on the device."""
    if device.type != "cuda":
        times = []
        for _ in range(count):
            started = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - started))
        return times
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    started = time.perf_counter()
    for event in events[1:]:
        step()
        event.record()
    record["host_ms_per_pass"] = round(1e3 * (time.perf_counter() - started) / count, 3)
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def _calls(cell: Cell, setup: Setup, memory: _Memory, record: Record) -> None:
    """Time calls, and compare their images."""
    work, method = setup.work, METHODS[cell.method]
    call = work.call()
    steps = call["num_inference_steps"]
    record |= {"height": call["height"], "width": call["width"], "num_steps": steps, "seconds_all_calls": []}
    record["alloc_retries_all_calls"] = []  # warm-ups included
    outputs: dict[str, list[torch.Tensor]] = {}

    def timed(count: int) -> float:
        memory.synchronize()
        before, started = memory.num_retries(), time.perf_counter()
        images = work.run_pipeline(num_inference_steps=count)
        memory.synchronize()
        seconds = round(time.perf_counter() - started, 3)
        record["alloc_retries_all_calls"].append(memory.num_retries() - before)
        memory.read(record)
        outputs[f"{count} steps"] = [images]
        return seconds

    if cell.method in OURS and not cell.tells_first_call:
        # Measures, loads what may stay, and tells how many passes a call has, which the plan of the next is made by.
        for count in (*[min(_WARM_UP_STEPS, steps)] * (_WARM_UP_CALLS - 1), steps):
            timed(count)
    elif cell.method in OURS:  # a script that calls once is told what it gets, and one that goes on
        record["seconds_all_calls"].append(timed(steps))
        record["seconds_first_call"] = record["seconds_all_calls"][0]
    else:
        limit = math.inf if cell.method == "resident" else cell.call_seconds
        record["seconds"] = _extrapolated(timed, steps, limit, math.ceil(method.num_warm_ups / work.passes_per_step))
        record["is_extrapolated"] = record["seconds"] is not None
    if not record.get("is_extrapolated") and (record["seconds_first_call"] or 0) < cell.call_seconds:
        loaded = setup.tell().get("stats_loaded_bytes")
        times: list[float] = []
        while sum(times) < _LEAST_SECONDS and len(times) < _MOST_CALLS:
            times.append(timed(steps))
        record["seconds_all_calls"] += times
        record["seconds"] = round(statistics.median(times), 3)
        if loaded is not None:
            record["loaded_bytes_per_call"] = (setup.tell()["stats_loaded_bytes"] - loaded) // len(times)
    elif record["seconds_all_calls"]:
        record["seconds"] = record["seconds_all_calls"][-1]
    if cell.method == "resident":
        record["seconds_first_call"] = record["seconds"]  # what first calls are compared with has its kernels loaded
    _compare(outputs, Path(cell.folder) / "expected_pipeline.pt", cell.method, record)


def _calls_with_tokens(cell: Cell, setup: Setup, memory: _Memory, record: Record) -> None:
    """Time calls in which a language model writes tokens, and each token; compare their images."""
    work, device = setup.work, setup.device
    call = work.call()
    height, width = work.size()
    record |= {"height": height, "width": width, "num_steps": call[work.about.steps], "seconds_all_calls": []}
    outputs: dict[str, list[torch.Tensor]] = {}
    watches = repeats.watch(work, setup.counters, device, setup.undo)

    def timed(name: str) -> float:
        for each in watches:
            each.begun.clear()
        memory.synchronize()
        started = time.perf_counter()
        images = work.run_pipeline() if name == "call" else work.run_short()
        memory.synchronize()
        seconds = round(time.perf_counter() - started, 3)
        memory.read(record)
        outputs[name] = [images]
        return seconds

    def note(module: torch.nn.Module) -> None:
        for each in watches:
            each.note_use(module)

    if cell.method == "resident":
        with repeats.noting_use(note):
            timed("short")
    else:
        num_short = _WARM_UP_CALLS
        if cell.method in OURS and cell.tells_first_call:
            record["seconds_all_calls"].append(timed("call"))
            record["seconds_first_call"] = record["seconds_all_calls"][0]
            num_short -= 1
        for _ in range(num_short):
            timed("short")
    loaded = None if setup.counters is None else setup.counters.loaded_bytes()
    times: list[float] = []
    while sum(times) < _LEAST_SECONDS_WITH_TOKENS and len(times) < _MOST_CALLS:
        times.append(timed("call"))
    if cell.method == "resident":
        before = outputs["call"]
        times.append(timed("call"))
        record["repeats_itself"] = all(map(torch.equal, before, outputs["call"]))
    record["seconds_all_calls"] += times
    record["seconds"] = round(statistics.median(times), 3)
    if setup.counters is not None and loaded is not None:
        record["loaded_bytes_per_call"] = (setup.counters.loaded_bytes() - loaded) // len(times)
    for each in watches:
        record |= each.fields()
    if cell.method == "resident":
        record["seconds_first_call"] = record["seconds"]
    _compare(outputs, Path(cell.folder) / "expected_pipeline.pt", cell.method, record)


def _extrapolated(timed: Any, steps: int, limit: float, num_warm_up_steps: int) -> float | None:
    """Warm up; seconds of a call if that is more than `limit`, from calls of few steps, else None."""
    few, more = _FEW_STEPS
    least = timed(few)
    profiles = num_warm_up_steps > more  # in its first passes, which tell nothing of those that follow
    if profiles:
        timed(num_warm_up_steps)
    if profiles or least <= _SLOW_CALL_S:
        least = timed(few)
    if least * steps <= limit or steps <= more:
        return None
    per_step = (timed(more) - least) / (more - few)
    seconds: float = round(least + per_step * (steps - few), 3)
    return seconds if seconds > limit else None


def _compare(outputs: dict[str, list[torch.Tensor]], path: Path, method: str, record: Record) -> None:
    """With the outputs of the first resident measurement, which keeps them for the others."""
    if record.get("repeats_itself") is False:
        record["error"] = "two resident calls differ from each other, so that nothing can be compared with them"
        return
    if method == "resident" and not path.exists():
        torch.save(outputs, path)
    record["is_finite"] = all(bool(output.isfinite().all()) for each in outputs.values() for output in each)
    if path.exists():
        expected = torch.load(path)
        pairs = [pair for key in outputs for pair in zip(outputs[key], expected.get(key, ()), strict=False)]
        record["equal"] = bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


def _host_speed(device: torch.device) -> Record:
    """What this process gets of its CPU: milliseconds of a loop of Python, and microseconds to issue an operator. A
    denoiser of many small blocks is bound by both, and a machine is not always ours alone."""
    started = time.perf_counter()
    for _ in range(_LOOP):
        pass
    looped = time.perf_counter()
    number = torch.zeros(1, device=device)
    for _ in range(_ISSUED):  # fewer than the device queues
        number.add_(1)
    issued = time.perf_counter()
    return {
        "python_loop_ms": round(1000 * (looped - started), 3),
        "issue_us": round(1e6 * (issued - looped) / _ISSUED, 3),
    }


class _Memory:
    """The highest readings of the allocator so far. Methods reset its counters, so they are read after each step."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._peaks = {"peak_allocated_bytes": 0, "peak_reserved_bytes": 0}
        self._before = 0
        if self._is_cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def read(self, record: Record) -> None:
        if self._is_cuda:
            now = {
                "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
                "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
            }
            self._peaks = {name: max(self._peaks[name], now[name]) for name in now}
        told = record.get("stats_peak_reserved_bytes") or 0  # what the method has seen before it reset the counters
        self._peaks["peak_reserved_bytes"] = max(self._peaks["peak_reserved_bytes"], told)
        record.update(self._peaks)

    def num_retries(self) -> int:
        """How often the allocator had to give memory back before it got more: each time waits for the device."""
        return int(torch.cuda.memory_stats().get("num_alloc_retries", 0)) if self._is_cuda else 0

    def left_bytes(self) -> int:
        return torch.cuda.memory_allocated() - self._before if self._is_cuda else 0

    def synchronize(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize()
