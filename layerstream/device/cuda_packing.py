"""Packing and decoding on a CUDA GPU, by the kernels of `layerstream.codec`, decoding on a stream of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from layerstream.codec import launch, reference
from layerstream.codec.format import PackedRun
from layerstream.codec.launch import CodecUnavailableError
from layerstream.errors import brief

Launch = Callable[[int], None]  # starts decoding on the stream of that number


class CudaPacking:
    """The kernels, and the stream that decodes."""

    def __init__(self, torch_device: torch.device) -> None:
        self._torch_device = torch_device
        self._stream: torch.cuda.Stream | None = None

    @functools.cached_property
    def why_not(self) -> str:
        """Why there are no kernels; "": there are, they are compiled, and have given back what they were given."""
        try:
            launch.warm_up(self._torch_device)
        except CodecUnavailableError as exc:
            return brief(str(exc))
        return ""

    def pack(self, raw: torch.Tensor, word_bytes: int, most_bytes: int) -> tuple[torch.Tensor, PackedRun] | None:
        """See `Unpacker`."""
        return launch.encode(raw.view(torch.int16), word_bytes, most_bytes)

    def prepare(self, wire: torch.Tensor, layout: PackedRun, target: torch.Tensor) -> Launch:
        """See `Unpacker`."""
        return launch.prepare(wire, layout, target, is_holding=False)

    def unpack(self, start: Launch, after: Sequence[Any]) -> torch.cuda.Event:
        """See `Unpacker`."""
        stream = self._behind_all(after)
        with torch.cuda.device(self._torch_device):
            start(stream.cuda_stream)
        return _recorded(stream)

    def mark(self, after: Sequence[Any]) -> torch.cuda.Event:
        """See `Unpacker.mark_unpacking`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._behind_all(after))
        return event

    def _behind_all(self, events: Sequence[Any]) -> torch.cuda.Stream:
        # A block that is there sooner is of more use than compute that ends sooner: decoding goes first.
        stream = self._stream = self._stream or torch.cuda.Stream(self._torch_device, priority=-1)
        for event in events:
            stream.wait_event(event)
        return stream

    def behind(self, copies: torch.cuda.Event) -> torch.cuda.Event:
        """An event after copies and all decoding so far."""
        if self._stream is None:
            return copies
        self._stream.wait_event(copies)
        return _recorded(self._stream)

    def unpack_on_host(self, wire: torch.Tensor, layout: PackedRun, target: torch.Tensor) -> None:
        """See `Unpacker`."""
        reference.decode(wire, layout, target)


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event
