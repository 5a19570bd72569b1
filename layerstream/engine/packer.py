"""Packs one unit, on the device.

What is packed is on the host before it counts: it is read back from there, decoded, and compared with what it was made
of, bit by bit. Nothing is exchanged here.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from statistics import median

import torch

from layerstream import codec
from layerstream.device.base import Device, engine_tensors
from layerstream.engine.ledger import Ledger
from layerstream.engine.scratch import Scratch
from layerstream.host.home import PackedHome
from layerstream.host.pages_ahead import PagesAhead
from layerstream.host.store import HostStore
from layerstream.planning.packed_choice import PACKED_SHARE
from layerstream.saying import warn
from layerstream.stats import Stats
from layerstream.transfer.unit import StreamedUnit

_LEAST_TIMED_BYTES = 2**24  # of a unit whose decoding tells how fast it is
_TIMED_UNITS = 9  # the last ones count


class Packer:
    """Makes packed homes.

    Args:
        pages: mappings for what is packed.
        next_of: the unit that is packed after this one; None: nobody knows.
    """

    def __init__(
        self,
        device: Device,
        ledger: Ledger,
        scratch: Scratch,
        pages: PagesAhead,
        stats: Stats,
        next_of: Callable[[StreamedUnit], StreamedUnit | None],
    ) -> None:
        self._device = device
        self._ledger = ledger
        self._scratch = scratch
        self._pages = pages
        self._stats = stats
        self._next_of = next_of
        self._speeds: deque[float] = deque(maxlen=_TIMED_UNITS)  # of decoding, in GB/s

    def packed(self, store: HostStore, unit: StreamedUnit) -> PackedHome | str:
        """A packed home of the same bytes; or why it stays raw: it gains too little, or does not come back as it was.

        Raises:
            torch.OutOfMemoryError: the device has no room for it.
        """
        device, old = self._device, unit.home
        num_bytes = old.device_bytes
        is_32_bits = all(bound.dtype is torch.float32 for bound in unit.binding.tensors)
        with contextlib.ExitStack() as undo:
            with self._scratch.buffer(num_bytes) as raw:
                raw.zero_()
                self._scratch.copy(old, raw)
                most_bytes = int((1 - codec.LEAST_GAIN) * num_bytes)
                found = None
                for word_bytes in (4, 2) if is_32_bits else (2,):
                    found = found or device.pack(raw, word_bytes, most_bytes)
                if found is None:
                    return f"packing gains less than {codec.LEAST_GAIN:.0%}"
                packed, layout = found
                pages = self._pages.take(packed.numel(), may_be_larger=True)
                if (following := self._next_of(unit)) is not None:
                    self._pages.prepare(int(PACKED_SHARE * following.home.device_bytes))
                home = PackedHome(device, old.offsets, num_bytes, layout=layout)
                undo.callback(store.release, home)
                device.copy_back(store.hold(home, pages, packed.numel()), packed)
                del packed, found
                if not self._is_same(home, raw):
                    self._stats.num_packing_mismatches += 1
                    warn(f"`{unit.spec.name}` does not come back as it was when it is packed; it stays as it is.")
                    return "it does not come back as it was"
            undo.pop_all()
            return home

    def _is_same(self, home: PackedHome, raw: torch.Tensor) -> bool:
        """Whether what is on the host decodes to these bytes, which are on the device."""
        with self._scratch.buffer(home.device_bytes) as again:
            again.fill_(0xA5)
            marks = self._scratch.decode(home, again)
            with engine_tensors():
                is_same = torch.equal(again, raw)  # the host has waited for the decoding by now
            ms = self._device.elapsed_ms(*marks)
            if is_same and ms and home.device_bytes >= _LEAST_TIMED_BYTES:
                self._speeds.append(home.device_bytes / ms / 1e6)
                self._ledger.planner.decode_gb_per_s = median(self._speeds)
            return is_same
