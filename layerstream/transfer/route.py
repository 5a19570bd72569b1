"""How a unit's bytes get from its home into a slot: a route of stages.

    as they are                    Copy
    packed                         CopyAndDecode: a copy into the next wire buffer, and decoding from there; of a unit
                                   with a wire buffer of its own, the copy only once

Each copies from host memory, page-locked or not, and from another GPU's; where that GPU is out of reach the copy goes
through the host (CopyThroughHost). From page-locked host memory other GPUs may carry a share, each over its own link
(CopyByLinks).

A route is prepared once for a home and a slot's buffer, and issued at each load: behind events, on streams of its own
choice, giving the event after which its bytes are there. What it has prepared is forgotten when the home is exchanged.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from layerstream.device.base import COPY_BYTES, Copies, Device, Event, Unpacking, engine_tensors, synchronize_all
from layerstream.host.home import Home, PackedHome
from layerstream.host.keeper import Keeper
from layerstream.transfer.helper import LINK_PART_BYTES, Helper
from layerstream.transfer.profiling import Ranges
from layerstream.transfer.wires import OwnWires, Wire, WireRing

_STAGING_BUFFERS = 3

Issue = Callable[[Sequence[Event]], Event]  # starts what was prepared behind these events; gives the event after it


class Route(Protocol):
    """One way for bytes to go."""

    def prepare(self, home: Home, buffer: torch.Tensor, name: str) -> Issue:
        """What brings the bytes of `home` into `buffer` (uint8 [>= device_bytes], on the device); made once, used
        often.

        Args:
            name: of the unit, for people.
        """


class Routes:
    """The way from each kind of home.

    Args:
        wires, own_wires: buffers for what is packed.
        ranges: what wants to know of decoding.
        helpers: other GPUs whose links to the host are used, too.
    """

    def __init__(
        self,
        device: Device,
        wires: WireRing,
        own_wires: OwnWires,
        ranges: Ranges,
        helpers: Sequence[Helper] = (),
    ) -> None:
        self._device = device
        self._copy = Copy(device)
        self._by_links = CopyByLinks(device, helpers) if helpers else None
        self._through_host: dict[Keeper, CopyThroughHost] = {}
        self._copy_and_decode = CopyAndDecode(device, self._copy_of, wires, own_wires, ranges)

    def prepare(self, home: Home, buffer: torch.Tensor, name: str) -> Issue:
        """See `Route`."""
        route = self._copy_and_decode if isinstance(home, PackedHome) else self._copy_of(home)
        return route.prepare(home, buffer, name)

    def prepare_copy(self, home: Home, buffer: torch.Tensor, name: str) -> Issue:
        """What brings the bytes of `home` into `buffer` as they are at home."""
        return self._copy_of(home).prepare(home, buffer, name)

    def is_staged(self, home: Home) -> bool:
        """Whether loads of it are more than one copy after the other, and can be timed only as a whole."""
        return self._copy_of(home) is not self._copy

    def _copy_of(self, home: Home) -> Route:
        keeper = home.keeper
        if keeper is None and self._by_links is not None and home.is_pinned:
            return self._by_links
        if keeper is None or keeper.is_reached:
            return self._copy
        if keeper not in self._through_host:
            self._through_host[keeper] = CopyThroughHost(self._device, keeper)
        return self._through_host[keeper]

    def close(self) -> None:
        """Let go of buffers on the host. The device must be idle."""
        self._copy.close()
        while self._through_host:
            self._through_host.popitem()[1].close()
        if self._by_links is not None:
            self._by_links.close()


class Copy:
    """Copies the bytes as they are, on the device's copy stream.

    What is not page-locked goes through a small ring of buffers that are, for which the host waits.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._staging: _StagingRing | None = None

    def prepare(self, home: Home, buffer: torch.Tensor, name: str) -> Issue:
        pairs = home.pairs(buffer)
        if home.is_pinned:
            return functools.partial(
                self._device.copy, self._device.prepare([(target, source) for target, source, _ in pairs])
            )
        if self._staging is None:
            self._staging = _StagingRing(self._device)
        return functools.partial(self._staging.copy, pairs)

    def close(self) -> None:
        """Let go of the buffers. The device must be idle."""
        self._staging = None


class CopyThroughHost:
    """Copies from a GPU that is out of reach: in parts, to the host by its copy stream, and from there by that of the
    device, without the host waiting for either. A few buffers take turns; each is written to anew once the part that
    was in it is on the device."""

    def __init__(self, device: Device, keeper: Keeper) -> None:
        self._device, self._keeper = device, keeper
        self._buffers = _staging_buffers(device)
        self._free: list[Event] = [None] * len(self._buffers)
        self._next = 0

    def prepare(self, home: Home, buffer: torch.Tensor, name: str) -> Issue:
        pairs = [pair[:2] for pair in home.pairs(buffer)]
        if not self._buffers:  # the driver does the same, and has the host wait
            return functools.partial(self._device.copy, self._device.prepare(pairs, is_locked=False))
        return functools.partial(self._copy, pairs)

    def _copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Event]) -> Event:
        device, keeper = self._device, self._keeper.device
        arrived: Event = None
        for target, source in pairs:
            number = self._next
            self._next = (number + 1) % len(self._buffers)
            staging, free = self._buffers[number][: source.numel()], self._free[number]
            try:
                left = keeper.copy(keeper.prepare([(staging, source)]), [] if free is None else [free])
                self._free[number] = arrived = device.copy(device.prepare([(target, staging)]), [left, *after])
            except BaseException:  # both may be on their way, and nothing says when the buffer is free
                synchronize_all([device, keeper])
                raise
        return device.record_copies() if arrived is None else arrived

    def close(self) -> None:
        """Let go of the buffers. The device must be idle."""
        self._keeper.device.synchronize()
        self._buffers, self._free = [], []


class CopyByLinks:
    """Copies from page-locked host memory over several links at once: parts go straight to the device, and over the
    links of other GPUs to buffers there, from which the device takes them over the way between the GPUs.

    Each link gets an equal share, part by part in turn. What comes from the helpers has a copy stream of its own: on
    one stream, the device's own link stood still for each of these, and two links brought 74 GB/s in place of one's 53
    (two H200s).
    """

    def __init__(self, device: Device, helpers: Sequence[Helper]) -> None:
        self._device = device
        self._helpers = helpers

    def prepare(self, home: Home, buffer: torch.Tensor, name: str) -> Issue:
        parts = [
            (target[at : at + LINK_PART_BYTES], source[at : at + LINK_PART_BYTES])
            for target, source, _ in home.pairs(buffer)
            for at in range(0, source.numel(), LINK_PART_BYTES)
        ]
        loads = [0] * (1 + len(self._helpers))  # bytes over the device's own link, and over each helper's
        own: list[tuple[torch.Tensor, torch.Tensor]] = []
        by_helper: list[Issue] = []
        for target, source in parts:
            number = min(range(len(loads)), key=loads.__getitem__)
            loads[number] += source.numel()
            if number:
                by_helper.append(functools.partial(self._helpers[number - 1].copy, target, source))
            else:
                own.append((target, source))
        return functools.partial(self._issue, self._device.prepare(own), by_helper)

    def _issue(self, own: Copies, by_helper: Sequence[Issue], after: Sequence[Event]) -> Event:
        arrived = self._device.copy(own, after)
        if not by_helper:
            return arrived
        try:
            for issue in by_helper:
                issue(after)
            return self._device.copy_beside(self._device.prepare([]), [arrived])
        except BaseException:  # what was begun may be on its way, and nothing says when a helper's buffer is free
            synchronize_all([self._device, *(helper.device for helper in self._helpers)])
            raise

    def close(self) -> None:
        """Let go of the buffers. The device must be idle."""
        for helper in self._helpers:
            helper.close()


class CopyAndDecode:
    """Copies packed bytes into the wire buffer whose turn it is, and decodes them from there into the slot. Where the
    home has a wire buffer of its own they go there, once, and every load decodes them from there."""

    def __init__(
        self,
        device: Device,
        copy_of: Callable[[Home], Route],
        wires: WireRing,
        own_wires: OwnWires,
        ranges: Ranges,
    ) -> None:
        self._device = device
        self._copy_of = copy_of
        self._wires = wires
        self._own_of = own_wires.of
        self._ranges = ranges

    def prepare(self, home: Home, buffer: torch.Tensor, name: str) -> Issue:
        assert isinstance(home, PackedHome)
        # Made here: who looks at a slot's memory is counted when its loads are prepared.
        target = buffer[: home.device_bytes]
        by_wire: weakref.WeakKeyDictionary[Wire, tuple[Issue, Unpacking]] = weakref.WeakKeyDictionary()

        def issue(after: Sequence[Event]) -> Event:
            own = self._own_of.get(home)
            wire = self._wires.next(home.wire_bytes) if own is None else own
            known = by_wire.get(wire)
            if known is None:
                unpacking = self._device.prepare_unpack(wire.buffer[: home.wire_bytes], home.layout, target)
                known = by_wire[wire] = self._copy_of(home).prepare(home, wire.buffer, name), unpacking
            copy, unpacking = known
            try:
                if own is None:
                    before = [copy([wire.free]), *after]
                else:
                    if own.filled is None:
                        own.filled = copy([own.free])
                    # Also much later: nothing else orders decoding behind the copy, which ran on another stream.
                    before = [own.filled, *after]
                if self._ranges.is_on:
                    with self._ranges.decoding(name, home.device_bytes, before):
                        wire.free = event = self._device.unpack(unpacking, before)
                else:
                    wire.free = event = self._device.unpack(unpacking, before)
            except BaseException:  # the copy may be on its way, and decoding behind it
                wire.free = self._device.record_copies()
                raise
            return event

        return issue


def _staging_buffers(device: Device) -> list[torch.Tensor]:
    """A few page-locked buffers that take turns; fewer, or none, where these are refused."""
    with engine_tensors():
        buffers = [device.pinned_staging(COPY_BYTES) for _ in range(_STAGING_BUFFERS)]
    return [buffer for buffer in buffers if buffer is not None]


class _StagingRing:
    """Copies from pageable memory through a few small page-locked buffers.

    The host copies into a buffer (and waits for the copy that read it last), the device copies out of it. Where
    even these are refused, the pageable memory is given to the device as it is, and the driver does the same.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers = _staging_buffers(device)
        self._events: list[Event] = [None] * len(self._buffers)
        self._next = 0

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor, bool]], after: Sequence[Event]) -> Event:
        """Like `Device.copy`, for pairs of which some are page-locked; blocks the host for the others."""
        event = self._copy([], after)
        for target, source, is_pinned in pairs:
            if is_pinned or not self._buffers:
                event = self._copy([(target, source)], [], is_locked=is_pinned)
                continue
            number, self._next = self._next, (self._next + 1) % len(self._buffers)
            if self._events[number] is not None:
                self._device.synchronize_event(self._events[number])
            staged = self._buffers[number][: source.numel()]
            staged.copy_(source)
            self._events[number] = event = self._copy([(target, staged)], [])
        return event

    def _copy(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Event], *, is_locked: bool = True
    ) -> Event:
        return self._device.copy(self._device.prepare(pairs, is_locked=is_locked), after)
