"""Starts the kernels: compiles each once for a device, keeps what that gave, and launches it with addresses.

An ordinary launch of Triton looks at every argument each time, which takes longer than a small kernel runs. A launch
here hands plain numbers to what was compiled: `compiled[grid](*arguments, stream=...)`, which Triton 3.2 to 3.9 have.
Where a version does not, the ordinary launch does the same.

Nothing here is imported with the package, and Triton only at the first use.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

from layerstream.codec.format import GROUP_TILES, OCTET_WORDS, PackedRun
from layerstream.codec.heads import heads
from layerstream.codec.reference import section
from layerstream.errors import LayerstreamError
from layerstream.torch_private import current_raw_stream

_log = logging.getLogger("layerstream.codec")

_UNPACK_WARPS = 4  # measured: 2, 8 and 16 are as fast or slower
# These GPUs run 64 warps a multiprocessor if none has more than 32 registers a lane. Unpacking takes up to 40 unless
# told, and does with 32: Triton 3.6 spills none then, 3.9 at most 8 bytes.
_GPUS_OF_64_WARPS = (80, 90, 100, 103)
_ALIGNMENT = 16  # of all addresses: the kernels are compiled for it

# What each kernel takes before its constants, in order: what its pointers point to, and any number for a number.
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "unpack": (torch.int32, torch.int64, torch.int32, torch.int32, torch.int64, 8, 8),
    "histogram": (torch.int16, torch.int16, torch.int32, 8),
    "rank": (torch.int16, torch.uint8, torch.uint8),
    "pack": (torch.int16, torch.uint8, *[torch.int32] * 2, torch.int64, *[torch.int32] * 3, 8, 8),
}
_WARPS = {"unpack": _UNPACK_WARPS, "histogram": 8, "rank": 8, "pack": GROUP_TILES}

Argument = torch.Tensor | int
Launch = Callable[[int], None]  # starts what was prepared on the stream of this number


class CodecUnavailableError(LayerstreamError, RuntimeError):
    """No kernel can pack or unpack on this device: Triton is missing, or what it makes does not compile or run here."""


def prepare(wire: torch.Tensor, layout: PackedRun, target: torch.Tensor, *, is_holding: bool = True) -> Launch:
    """What unpacks a run, made once and used often; each time it is one launch, and does not block the host.

    Args:
        wire: uint8 [>= num_bytes], on the device. Its address is divisible by 16.
        target: uint8 [raw_bytes], on the same device, likewise.
    Returns: takes the number of a stream of that device, and starts the kernel there. The device must be the current
        one then. It holds on to both tensors.
    Raises:
        CodecUnavailableError: see there.
        ValueError: a size or an address does not fit.
    """
    layout.check_sizes(wire.numel(), target.numel())
    arguments: list[Argument] = [
        section(wire, layout.head, torch.int32),
        section(wire, layout.marks, torch.int64),
        section(wire, layout.codes, torch.int32),
        section(wire, layout.exceptions, torch.int32),
        target.view(torch.int64),
        layout.num_words // OCTET_WORDS,
        layout.num_tiles,
    ]
    grid = -(-layout.num_tiles // _UNPACK_WARPS)
    constants = (layout.word_bytes == 4, _UNPACK_WARPS, _takes_ptx(target.device))
    return _bind("unpack", target.device, grid, arguments, constants, is_holding=is_holding)


def encode(words: torch.Tensor, word_bytes: int, most_bytes: int) -> tuple[torch.Tensor, PackedRun] | None:
    """Pack a run, on its device and the current stream. Blocks the host once, until the bits are counted.

    Takes less than 10 % of the run's bytes until the bits are counted, and less than 3 % beside what it returns.

    Args:
        words: int16 [n], the 16-bit words; with word_bytes 4 [2 n], each after a zero. Its address is divisible by 16.
        word_bytes: 2 or 4.
        most_bytes: of the packed run, for it to be of use.
    Returns: uint8 [num_bytes] and what it is; None: it would have more bytes, or a low half is not zero.
    Raises:
        CodecUnavailableError: see there.
        ValueError: the number of words or the address does not fit.
    """
    device = words.device
    num_words = words.numel() * 2 // word_bytes
    layout = PackedRun(num_words, word_bytes, 0, 0)  # refuses what cannot be packed; the totals are not known yet
    groups, tiles, is_wide = layout.num_groups, layout.num_tiles, word_bytes == 4
    with _current(device):
        stream = current_raw_stream(device.index) if device.type == "cuda" else 0

        def start(name: str, arguments: Sequence[Argument], constants: tuple[object, ...]) -> None:
            _bind(name, device, groups, arguments, constants)(stream)

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        counted = empty(groups, 256, dtype=torch.int16)
        is_lossy = torch.zeros(groups, dtype=torch.int32, device=device)
        ranks, tables = empty(groups, 256, dtype=torch.uint8), empty(groups, 16, dtype=torch.uint8)
        start("histogram", [words, counted, is_lossy, num_words], (is_wide,))
        start("rank", [counted, ranks, tables], ())
        del counted
        counts = empty(groups, GROUP_TILES, 3, dtype=torch.int32)
        unused = [counts, ranks.view(torch.int64), counts, counts, counts]  # is only looked at where it is written
        start("pack", [words, ranks, counts, *unused, num_words, tiles], (is_wide, False, GROUP_TILES))
        found = heads(tables, counts)
        num_code_words, num_exceptions, is_any_lossy = torch.cat([found.totals, is_lossy.max()[None].long()]).tolist()
        del counts, unused, tables
        layout = PackedRun(num_words, word_bytes, num_code_words, num_exceptions)
        if is_any_lossy or layout.num_bytes > most_bytes:
            return None

        wire = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
        head = section(wire, layout.head, torch.int32)
        head.copy_(found.head.flatten())
        arguments: list[Argument] = [
            words,
            ranks,
            is_lossy,  # stands for the counts, which are not written now
            head,
            section(wire, layout.marks, torch.int64),
            section(wire, layout.codes, torch.int32),
            section(wire, layout.exceptions, torch.int32),
            found.first_exception,
            num_words,
            tiles,
        ]
        start("pack", arguments, (is_wide, True, GROUP_TILES))
    return wire, layout


def warm_up(device: torch.device) -> None:
    """Compile all kernels for a device, and try them on a small run. Blocks the host, for seconds the first time.

    Raises:
        CodecUnavailableError: Triton is missing, something does not compile or start, or what comes back is not the
        same.
    """
    number = torch.arange(3 * 4096, device="cpu")
    words = (0x3C00 + (number * 40503 >> 4) % 0x400).where(number % 500 > 0, number * 31).to(torch.int16)
    for run in (words, torch.stack([torch.zeros_like(words), words], 1).flatten()):
        run = run.to(device)
        result = torch.zeros_like(run)
        try:
            packed = encode(run, 2 * run.numel() // words.numel(), 2 * run.numel())
            if packed is not None:
                with _current(device):
                    stream = current_raw_stream(result.device.index) if device.type == "cuda" else 0
                    prepare(*packed, result.view(torch.uint8))(stream)
            is_same = torch.equal(run, result)
        except CodecUnavailableError:
            raise
        except Exception as exc:
            raise CodecUnavailableError(f"Triton's kernels cannot be started on {device}: {exc}") from exc
        if not is_same:
            raise CodecUnavailableError(f"Triton's kernels give wrong words on {device}: leave its weights unpacked")


def _bind(
    name: str,
    device: torch.device,
    grid: int,
    arguments: Sequence[Argument],
    constants: tuple[object, ...],
    *,
    is_holding: bool = True,
) -> Launch:
    """A launch of one kernel on these arguments. An ordinary one holds on to them in any case."""
    values: list[object] = []
    for each in arguments:
        values.append(each.data_ptr() if isinstance(each, torch.Tensor) else each)
        if isinstance(each, torch.Tensor) and each.data_ptr() % _ALIGNMENT:
            raise ValueError(f"an address is not divisible by {_ALIGNMENT}: {each.data_ptr():#x}")
    function = getattr(_kernels(), name)
    if device.type == "cuda":
        compiled, takes_constants = _compiled(name, device.index, constants)
        values += constants if takes_constants else ()
        if hasattr(compiled, "__getitem__"):
            held = arguments if is_holding else ()
            return functools.partial(_launch, compiled[(grid, 1, 1)], tuple(values), held)
        _log.debug("Triton has no launch of what is compiled: the ordinary one is used")
    options = _options(name, device)
    return functools.partial(_launch_ordinarily, function[(grid,)], arguments, constants, options, device)


def _launch(run: Callable[..., None], values: tuple[object, ...], held: object, stream: int) -> None:
    run(*values, stream=stream)


def _launch_ordinarily(
    run: Callable[..., None],
    arguments: Sequence[Argument],
    constants: tuple[object, ...],
    options: dict[str, int],
    device: torch.device,
    stream: int,
) -> None:
    with torch.cuda.stream(torch.cuda.ExternalStream(stream, device)) if device.type == "cuda" else _NOTHING:
        run(*arguments, *constants, **options)


_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


@functools.cache
def _compiled(name: str, index: int, constants: tuple[object, ...]) -> tuple[Any, bool]:
    """What Triton made of a kernel for a device, loaded there, and whether a launch takes the constants too."""
    device = torch.device("cuda", index)
    function = getattr(_kernels(), name)
    try:
        version = import_module("triton").__version__
        with _current(device):
            compiled = function.warmup(*_ARGUMENTS[name], *constants, grid=(1,), **_options(name, device))
            getattr(compiled, "run", None)  # builds the launcher and loads the code
    except Exception as exc:  # of the compiler, of ptxas, of a C compiler that is missing
        raise CodecUnavailableError(f"Triton cannot compile the kernel {name} for {device}: {exc}") from exc
    major, minor = (int(part) for part in version.split(".")[:2])
    return compiled, (major, minor) >= (3, 3)


def _options(name: str, device: torch.device) -> dict[str, int]:
    options = {"num_warps": _WARPS[name]}
    if name == "unpack" and _takes_ptx(device) and _target(device.index).arch in _GPUS_OF_64_WARPS:
        options["maxnreg"] = 32
    return options


def _takes_ptx(device: torch.device) -> bool:
    return device.type == "cuda" and bool(_target(device.index).backend == "cuda")


@functools.cache
def _target(index: int) -> Any:
    """What Triton compiles for, on a device."""
    _kernels()
    with _current(torch.device("cuda", index)):
        return import_module("triton.runtime.driver").driver.active.get_current_target()


def _kernels() -> Any:
    try:
        return import_module("layerstream.codec.kernels")
    except Exception as exc:  # it may be missing, or be there and of no use
        raise CodecUnavailableError(f"packed weights need Triton, which cannot be imported: {exc}") from exc


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which a device is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else _NOTHING
