"""What a call repeats, tokens and passes, timed from within: how long each takes, loads and finds on the device.

[Note: limit] Of what repeats, with W bytes of weights used each time, M bytes of weights on the device when it begins
(slots included), and the bus' speed: a pass takes max(compute, (W - M) / speed) at least, and a token
outside + max(loop, (W - M) / speed). `loop` is the part in which the language model runs, `outside` the rest (heads,
projectors, sampling), both of the resident model. A byte that is loaded ahead meanwhile lies in a slot, so is in M.
What all weights together do not leave room for crosses the bus in each call once more, when its turn begins.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from benchmarks.cases import Repeated, Work
from benchmarks.records import Record, tensors_of

KINDS = ("token", "pass")
_FIRST_PASSES = 2  # of a denoiser in a call: what may stay is loaded in them


@dataclass
class Counters:
    """What the method counts; a method that loads nothing has none.

    Attributes:
        loaded_bytes: over the bus so far.
        held_bytes: of weights of the component of a module that are on the device now, slots included.
    """

    loaded_bytes: Callable[[], int]
    held_bytes: Callable[[nn.Module], int]


@dataclass
class _Begun:
    """One token or pass: marks of the device's time at its beginning and end."""

    begin: Any
    is_counted: bool
    loaded_bytes: int
    held_bytes: int
    end: Any = None


@dataclass
class Watch:
    """Marks the beginning and end of each token or pass of a call, by hooks that wait for nothing."""

    repeated: Repeated
    counters: Counters | None
    is_cuda: bool
    begun: list[_Begun] = field(default_factory=list)
    used: dict[int, torch.Tensor] = field(default_factory=dict)

    def install(self, work: Work, undo: contextlib.ExitStack) -> None:
        begin = work.part(self.repeated.first).register_forward_pre_hook(self._begin, with_kwargs=True)
        end = work.part(self.repeated.last).register_forward_hook(self._end)
        undo.callback(begin.remove)
        undo.callback(end.remove)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_token = self.repeated.kind == "token"
        is_counted = _is_one_token(args, kwargs) if is_token else len(self.begun) >= _FIRST_PASSES
        counters = self.counters
        loaded, held = (0, 0) if counters is None else (counters.loaded_bytes(), counters.held_bytes(module))
        self.begun.append(_Begun(self._mark(), is_counted, loaded, held))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.begun:
            self.begun[-1].end = self._mark()

    def _mark(self) -> Any:
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def note_use(self, module: nn.Module) -> None:
        """Count the weights of a module that runs as used, in the second of what repeats."""
        counted = [each.is_counted for each in self.begun]
        if counted and counted[-1] and sum(counted) == 2:
            recurses = isinstance(module, nn.MultiheadAttention)  # calls none of what it holds
            weights = [*module.parameters(recurse=recurses), *module.buffers(recurse=recurses)]
            self.used |= {id(tensor): tensor for tensor in weights}

    @property
    def used_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.used.values())

    def fields(self) -> Record:
        """Fields of the record on the last call, times in seconds; call when the device has done all."""
        pairs = [(a, b) for a, b in zip(self.begun, self.begun[1:], strict=False) if a.is_counted and b.is_counted]
        if not pairs:
            return {}
        kind = self.repeated.kind
        times = [self._seconds(a.begin, b.begin) for a, b in pairs]
        loops = [self._seconds(a.begin, a.end) for a, _ in pairs]
        made: Record = {
            f"num_{kind}s": len(self.begun) if kind == "pass" else sum(each.is_counted for each in self.begun),
            f"num_{kind}s_timed": len(times),
            f"{kind}_s": _rounded(statistics.mean(times)),
            f"{kind}_s_median": _rounded(statistics.median(times)),
            f"{kind}_s_range": [_rounded(min(times)), _rounded(max(times))],
            f"{kind}_loop_s": _rounded(statistics.mean(loops)),
            f"{kind}_outside_s": _rounded(statistics.mean(times) - statistics.mean(loops)),
        }
        if self.used:
            made[f"{kind}_used_bytes"] = self.used_bytes
        if self.counters is not None:
            made[f"{kind}_loaded_bytes"] = (pairs[-1][1].loaded_bytes - pairs[0][0].loaded_bytes) // len(pairs)
            made[f"{kind}_held_bytes"] = int(statistics.median(a.held_bytes for a, _ in pairs))
        return made

    def _seconds(self, begin: Any, end: Any) -> float:
        seconds: float = begin.elapsed_time(end) / 1e3 if self.is_cuda else end - begin
        return seconds


def watch(work: Work, counters: Counters | None, device: torch.device, undo: contextlib.ExitStack) -> list[Watch]:
    """Watches over what the work's calls repeat, until `undo` is closed."""
    made = [Watch(repeated, counters, device.type == "cuda") for repeated in work.repeated]
    for each in made:
        each.install(work, undo)
    return made


@contextlib.contextmanager
def noting_use(note: Callable[[nn.Module], None]) -> Iterator[None]:
    """Tell of each module that runs."""
    handle = register_module_forward_pre_hook(lambda module, args: note(module))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def measuring_used(record: Record) -> Iterator[None]:
    """Write into the record how many bytes of weights are used by the passes inside."""
    used: set[nn.Module] = set()
    with noting_use(used.add):
        yield
    tensors = [t for m in used for t in (tensors_of([m]) if isinstance(m, nn.MultiheadAttention) else _own(m))]
    record["pass_used_bytes"] = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def limit(done: Sequence[Record]) -> None:
    """Give records the limits of what they repeat ([Note: limit]), from the resident ones of the same case and form."""
    for each in done:
        alike = [r for r in done if (r["case"], r["form"], r["method"]) == (each["case"], each["form"], "resident")]
        for kind in KINDS:
            _limit_one(each, alike, kind)
        _limit_call(each, alike)


def _limit_one(each: Record, alike: Sequence[Record], kind: str) -> None:
    loop, outside, used = (_mean(alike, f"{kind}_{name}") for name in ("loop_s", "outside_s", "used_bytes"))
    now, resident = each.get(f"{kind}_s"), _mean(alike, f"{kind}_s")
    if now and resident:
        each[f"{kind}_ratio"] = round(now / resident, 4)
    held = each.get(f"{kind}_held_bytes")
    if now is None or loop is None or outside is None or used is None or held is None or not each.get("link_gb_per_s"):
        return
    bus = max(0.0, used - held) / each["link_gb_per_s"] / 1e9
    each[f"{kind}_limit_s"] = _rounded(outside + max(loop, bus))
    each[f"{kind}_of_limit"] = round(now / (outside + max(loop, bus)), 4)


def _limit_call(each: Record, alike: Sequence[Record]) -> None:
    """Of a whole call: the resident one's time, what the limits of all that it repeats add, and the first way over the
    bus of what does not stay from call to call."""
    resident, link = _mean(alike, "seconds"), each.get("link_gb_per_s")
    counts = {kind: each.get(f"num_{kind}s") or 0 for kind in KINDS if each.get(f"{kind}_limit_s") is not None}
    if resident is None or not link or not counts or each.get("seconds") is None:
        return
    added = sum((each[f"{kind}_limit_s"] - (_mean(alike, f"{kind}_s") or 0.0)) * n for kind, n in counts.items())
    budget = each.get("vram_budget_bytes")
    first = 0.0
    if budget is not None and each["weights_bytes"] > budget:
        # A prompt's pass is none of the tokens, and finds nothing; the first pass of a denoiser is one of the passes.
        crossing = {"token": _mean(alike, "token_used_bytes") or 0, "pass": each.get("pass_held_bytes", 0)}
        first = sum(crossing[kind] / link / 1e9 for kind in counts)
    each["call_first_loads_s"] = round(first, 3)
    each["call_limit_s"] = round(resident + added + first, 3)
    each["call_of_limit"] = round(each["seconds"] / (resident + added + first), 4)
    each["weights_cross_s"] = round(each["weights_bytes"] / link / 1e9, 3)


def _mean(records: Sequence[Record], name: str) -> float | None:
    known = [r[name] for r in records if r.get(name) is not None]
    return sum(known) / len(known) if known else None


def _own(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _is_one_token(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a pass is of one token in each row, rather than of a prompt."""
    given = [*args[:1], *(kwargs.get(name) for name in ("hidden_states", "input_ids", "inputs_embeds"))]
    tensor = next((each for each in given if isinstance(each, torch.Tensor)), None)
    return tensor is not None and tensor.ndim >= 2 and tensor.shape[1] == 1


def _rounded(seconds: float) -> float:
    return round(seconds, 6)
