"""Lossless packing of bf16 weights, to two thirds: see `format.py` for the form, `kernels.py` for how it is done fast.

On the CPU and on a GPU the bytes are the same. Triton is imported at the first use on a GPU, and never elsewhere.
"""

from __future__ import annotations

import torch

from layerstream.codec import launch, reference
from layerstream.codec.format import FORMAT_VERSION, MOST_WORDS, PackedRun
from layerstream.codec.launch import CodecUnavailableError, prepare, warm_up
from layerstream.torch_private import current_raw_stream

__all__ = [
    "FORMAT_VERSION",
    "LEAST_GAIN",
    "CodecUnavailableError",
    "PackedRun",
    "decode",
    "encode",
    "prepare",
    "warm_up",
]

LEAST_GAIN = 0.1  # of a run's bytes: below it a run is better left as it is


def encode(words: torch.Tensor) -> tuple[torch.Tensor, PackedRun] | None:
    """Pack a run, on its device. Blocks the host.

    On a GPU it runs on the current stream and takes less than 10 % of the run's bytes until it knows how long the
    packed run is, and then less than 3 % beside the packed run. On the CPU it takes about the packed run once more.

    Args:
        words: flat and contiguous, a number of elements divisible by 8. Elements of 2 bytes: of any dtype, for their 16
            bits are what is packed, as if they were bf16. Elements of 4 bytes (fp32): their high halves are. On a GPU
            its address is divisible by 16.
    Returns: uint8 [num_bytes], and what is to be kept of it beside the bytes. None: packing does not gain `LEAST_GAIN`;
        or of elements of 4 bytes not all low halves are zero; or there are none, or more than `MOST_WORDS`.
    Raises:
        CodecUnavailableError: on a GPU for which no kernel can be had.
        ValueError: the number of elements, their size or the address does not fit.
    """
    if not 0 < words.numel() <= MOST_WORDS:
        return None
    word_bytes = words.element_size()
    if word_bytes not in (2, 4):
        raise ValueError(f"elements of {word_bytes} bytes cannot be packed: they are of 2, or of 4")
    if words.numel() % 8:
        raise ValueError(f"{words.numel()} elements cannot be packed: their number is divisible by 8")
    most_bytes = int(words.numel() * word_bytes * (1 - LEAST_GAIN))
    words = words.detach().view(torch.int16)
    if words.is_cuda:
        return launch.encode(words, word_bytes, most_bytes)
    return reference.encode(words, word_bytes, most_bytes)


def decode(wire: torch.Tensor, layout: PackedRun, target: torch.Tensor) -> None:
    """Unpack a run, on its device. On a GPU it runs on the current stream, and does not block the host.

    Args:
        wire: uint8 [>= num_bytes], contiguous.
        target: uint8 [raw_bytes], contiguous, on the same device. The addresses of both are divisible by 16.
    Raises:
        CodecUnavailableError: on a GPU for which no kernel can be had.
        ValueError: a size or an address does not fit.
    """
    if target.is_cuda:
        start = prepare(wire, layout, target)
        start(current_raw_stream(target.device.index))
    else:
        reference.decode(wire, layout, target)
