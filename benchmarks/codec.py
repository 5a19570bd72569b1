"""The codec alone: `python -m benchmarks.codec --output DIR`. Needs a GPU, and takes about a minute.

`--device cpu --tiny` tries it on the CPU: with few words, through plain torch, without what only a GPU can show.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.records import Record, field
from layerstream import codec
from layerstream.arguments import Parser

_LARGE_BYTES, _SMALL_BYTES, _TINY_BYTES = 342_000_000, 100_000_000, 2_000_000
_REPEATS = 15
_SPIN_CYCLES = 1_000_000  # half a millisecond and more: launches are queued before the first one runs
_MATRIX = 8192
_PATTERN = (3, 2, 3, 2, 3)  # matmuls for each unpacked run: 2.6


def _normal(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n, device=generator.device, generator=generator)


def _uniform(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(n, device=generator.device, generator=generator)


def _student(n: int, generator: torch.Generator) -> torch.Tensor:
    chi = sum(_normal(n, generator).square_() for _ in range(4))
    return _normal(n, generator) / (chi / 4).sqrt_() * 0.02


def _with_zeros(n: int, generator: torch.Generator) -> torch.Tensor:
    return (_normal(n, generator) * 0.02).masked_fill_(_uniform(n, generator) < 0.02, 0)


def _of_many_scales(n: int, generator: torch.Generator) -> torch.Tensor:
    scales = torch.exp(_uniform(-(-n // 65536), generator) * 2.77 - 5.3)
    return _normal(n, generator) * scales.repeat_interleave(65536)[:n]


# Weights in fp32, which become bf16; random bits are no weights, and made apart.
_WEIGHTS: dict[str, Callable[[int, torch.Generator], torch.Tensor]] = {
    "normal": lambda n, g: _normal(n, g) * 0.02,
    "student-t(4)": _student,
    "2 % zeros": _with_zeros,
    "fp16 origin": lambda n, g: (_normal(n, g) * 0.02).half().float(),
    "near 1 (LN)": lambda n, g: 1 + 0.05 * _normal(n, g),
    "uniform": lambda n, g: (_uniform(n, g) - 0.5) * 0.1,
    "many scales": _of_many_scales,
}
DATA = (*_WEIGHTS, "random bits")


def words_of(data: str, n: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """int16 [n], the bits of bf16 weights; the same for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    if data == "random bits":
        return torch.randint(-32768, 32768, (n,), device=device, generator=generator, dtype=torch.int16)
    return _WEIGHTS[data](n, generator).bfloat16().view(torch.int16)


def _clock_ms(run: Callable[[], object], device: torch.device, repeats: int = _REPEATS) -> float:
    """Median milliseconds on the device; on the CPU by its clock."""
    run()
    times = []
    for _ in range(repeats):
        if device.type == "cpu":
            begin = time.perf_counter()
            run()
            times.append((time.perf_counter() - begin) * 1e3)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_SPIN_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _unpack(wire: torch.Tensor, layout: codec.PackedRun, target: torch.Tensor) -> Callable[[], None]:
    """What unpacks on the current stream, prepared once."""
    if not target.is_cuda:
        return lambda: codec.decode(wire, layout, target)
    start = codec.prepare(wire, layout, target)
    return lambda: start(torch.cuda.current_stream().cuda_stream)


def _packed(words: torch.Tensor) -> tuple[torch.Tensor, codec.PackedRun]:
    """A run packed even where that gains nothing."""
    module = codec.launch if words.is_cuda else codec.reference
    packed = module.encode(words, 2, 2 * words.numel() * 2)
    assert packed is not None
    return packed


def _measure(data: str, num_bytes: int, device: torch.device, name: str) -> Record:
    """One data set at one size: bits, speed both ways, and whether what comes back is equal."""
    words = words_of(data, num_bytes // 256 * 128, device)
    raw_bytes = words.numel() * 2
    extra_bytes = None
    if device.type == "cuda":
        _packed(words)  # what it compiles is allocated once
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before_bytes = torch.cuda.memory_allocated()
    wire, layout = _packed(words)
    if device.type == "cuda":
        extra_bytes = torch.cuda.max_memory_allocated() - before_bytes
    target = torch.full((raw_bytes,), 0x55, dtype=torch.uint8, device=device)
    unpack = _unpack(wire, layout, target)
    unpack()
    is_equal = torch.equal(target.view(torch.int16), words)
    target.fill_(0x55)
    unpack_ms = _clock_ms(unpack, device)
    is_equal = is_equal and torch.equal(target.view(torch.int16), words)
    pack_ms = _clock_ms(lambda: _packed(words), device, 5)
    return {
        "data": data,
        "size": name,
        "raw_bytes": raw_bytes,
        "packed_bytes": layout.num_bytes,
        "bits_a_weight": layout.num_bytes * 8 / words.numel(),
        "gains": layout.num_bytes <= raw_bytes * (1 - codec.LEAST_GAIN),
        "unpack_ms": unpack_ms,
        "unpack_tb_per_s": raw_bytes / unpack_ms / 1e9,
        "pack_gb_per_s": raw_bytes / pack_ms / 1e6,
        "pack_extra_bytes": extra_bytes,
        "pack_extra_beside_result": None if extra_bytes is None else (extra_bytes - layout.num_bytes) / raw_bytes,
        "equal": is_equal,
    }


def _measure_copy(num_bytes: int, device: torch.device, name: str) -> Record:
    source = words_of("random bits", num_bytes // 256 * 128, device)
    target = torch.zeros_like(source)
    copy_ms = _clock_ms(lambda: target.copy_(source), device)
    return {
        "data": "device copy",
        "size": name,
        "raw_bytes": source.numel() * 2,
        "unpack_ms": copy_ms,
        "unpack_tb_per_s": source.numel() * 2 / copy_ms / 1e9,
        "equal": torch.equal(source, target),
    }


def _host_us(num_bytes: int, device: torch.device) -> float:
    """What one launch takes of the host: the median of 200, with nothing to wait for."""
    words = words_of("normal", num_bytes // 256 * 128, device)
    wire, layout = _packed(words)
    start = codec.prepare(wire, layout, torch.empty(words.numel() * 2, dtype=torch.uint8, device=device))
    stream = torch.cuda.current_stream().cuda_stream
    start(stream)
    times = []
    for _ in range(20):  # few at a time: a full queue would block the host
        torch.cuda.synchronize()
        for _ in range(10):
            begin = time.perf_counter_ns()
            start(stream)
            times.append(time.perf_counter_ns() - begin)
    torch.cuda.synchronize()
    return statistics.median(times) / 1e3


class _Matmuls:
    """Matmuls of 8192 x 8192 in bf16, with something else now and then in another stream."""

    def __init__(self) -> None:
        shape = (_MATRIX, _MATRIX)
        self._a, self._b = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self._out = torch.empty_like(self._a)
        for _ in range(10):  # the card reaches the clock that it can keep
            self._ms(None, 0)

    def slow_down(self, run: Callable[[], object], priority: int, repeats: int = 7) -> tuple[float, float, float]:
        """By how much it slows the matmuls, as a part of their time: median, least and most of runs in turns with bare
        ones."""
        self._ms(run, priority)
        bare, ratios = self._ms(None, 0), []
        for _ in range(repeats):
            full, after = self._ms(run, priority), self._ms(None, 0)
            ratios.append(2 * full / (bare + after) - 1)
            bare = after
        return statistics.median(ratios), min(ratios), max(ratios)

    def _ms(self, run: Callable[[], object] | None, priority: int, rounds: int = 4) -> float:
        main, side = torch.cuda.current_stream(), torch.cuda.Stream(priority=priority)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for number in _PATTERN * rounds:
            if run is not None:
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    run()
            for _ in range(number):
                torch.mm(self._a, self._b, out=self._out)
        main.wait_stream(side)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def _measure_slow_down(num_bytes: int, device: torch.device) -> list[Record]:
    words = words_of("normal", num_bytes // 256 * 128, device)
    wire, layout = _packed(words)
    target = torch.empty(words.numel() * 2, dtype=torch.uint8, device=device)
    copied = torch.empty_like(words)
    matmuls = _Matmuls()
    found = []
    kinds: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "unpack": _unpack(wire, layout, target),
        "device copy": lambda: copied.copy_(words),
    }
    for kind, run in kinds.items():
        for priority in (-1, 0):
            target.fill_(0x55)
            copied.fill_(0x55)
            median, least, most = matmuls.slow_down(run, priority)
            result = copied if kind == "device copy" else target.view(torch.int16)
            found.append(
                {
                    "data": f"matmuls + {kind}",
                    "size": "high priority" if priority else "same priority",
                    "slow_down": median,
                    "slow_down_least": least,
                    "slow_down_most": most,
                    "equal": kind == "nothing" or torch.equal(result, words),
                }
            )
    return found


def _percent(name: str) -> Callable[[Record], object]:
    def cell(each: Record) -> object:
        value = each.get(name)
        return None if value is None else f"{100 * value:.1f} %"

    return cell


_COLUMNS: dict[str, Callable[[Record], object]] = {
    "data": field("data"),
    "size": field("size"),
    "bits a weight": field("bits_a_weight", 3),
    "unpack TB/s of output": field("unpack_tb_per_s", 3),
    "unpack ms": field("unpack_ms", 4),
    "pack GB/s": field("pack_gb_per_s", 1),
    "pack, memory beside the result": _percent("pack_extra_beside_result"),
    "host us a launch": field("host_us", 1),
    "slower by": _percent("slow_down"),
    "least": _percent("slow_down_least"),
    "most": _percent("slow_down_most"),
    "equal": field("equal"),
}
_METHOD = (
    f"Unpacking by device events, launched behind a spinning kernel, median of {_REPEATS}; packing likewise, of 5, "
    "with its one wait of the host"
)
_NOTES = [
    "Each row's words were compared with `torch.equal`. A device copy moves its bytes twice, as unpacking moves 1 + "
    "0.67 times its output. Memory: the most that packing had allocated at once, less the packed run, as a part of the "
    "raw run. Host us: the median of 200 launches of what was prepared.",
    f"Matmuls: of {_MATRIX} x {_MATRIX} in bf16. For every 2.6 of them a run of normal weights of the larger size is "
    "unpacked (or copied) in another stream, behind an event. Seven pairs with and without, in turns.",
]


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(
        prog="python -m benchmarks.codec", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="few words, to try the script")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --tiny tries the script")
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    begin = time.perf_counter()
    if device.type == "cuda":
        codec.warm_up(device)
    common: dict[str, Any] = {
        "compile_s": round(time.perf_counter() - begin, 2),
        **records.facts([], device),
        "command": records.command_line(arguments).replace("benchmarks", "benchmarks.codec", 1),
    }
    common["versions"] |= {"triton": _triton_version()}
    sizes = {"tiny": _TINY_BYTES} if options.tiny else {"342 MB": _LARGE_BYTES, "100 MB": _SMALL_BYTES}
    found = []
    for name, num_bytes in sizes.items():
        found += [_measure(data, num_bytes, device, name) for data in DATA]
        found.append(_measure_copy(num_bytes, device, name))
    if device.type == "cuda":
        for name, num_bytes in sizes.items():
            for each in found:
                if each["data"] == "normal" and each["size"] == name:
                    each["host_us"] = _host_us(num_bytes, device)
        found += _measure_slow_down(max(sizes.values()), device)
    done = [{**each, **common} for each in found]
    title = "The codec, alone"
    records.write(done, options.output, "codec", title=title, method=_METHOD, columns=_COLUMNS, notes=_NOTES)
    print("\n".join(records.table(done, _COLUMNS)))
    return 0 if all(each["equal"] for each in done) else 1


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


if __name__ == "__main__":
    sys.exit(main())
