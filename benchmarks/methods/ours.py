"""layerstream."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torch
from torch import nn

import layerstream
from benchmarks.methods.base import Method, MissingPeerError, Setup
from benchmarks.records import Record
from benchmarks.repeats import Counters
from layerstream.device.simulated import SimulatedDevice
from layerstream.pipeline.options import device_of


def _apply(
    setup: Setup,
    pairing: str = "off",
    packing: str = "off",
    *,
    is_stored: bool = False,
    is_reached: bool = True,
    has_links: bool = False,
) -> None:
    # On the simulated device activations count only while somebody looks at the operators that make them.
    device = SimulatedDevice() if setup.device.type == "cpu" else setup.device
    budget = setup.vram_budget or "auto"
    other: Any = None
    if is_stored or has_links:
        other = SimulatedDevice(name="other") if setup.device.type == "cpu" else _next_gpu(setup.device)
    streamer = layerstream.offload(
        setup.work.target,
        vram_budget=budget,
        device=device,
        pairing=pairing,
        packing=packing,
        store=other if is_stored else None,
        links=other if has_links else None,
    )
    if not is_reached:  # as between two cards that have no way to each other
        setup.undo.enter_context(mock.patch.object(type(device_of(device)), "reaches", return_value=False))
    setup.undo.enter_context(streamer)
    if isinstance(device, SimulatedDevice):
        setup.undo.enter_context(device.accounting())

    setup.tell = functools.partial(tell_of, streamer)
    setup.counters = _counters(streamer)


def tell_of(streamer: layerstream.LayerStreamer) -> Record:
    """What the engine says of itself."""
    stats = streamer.stats()
    predicted = [p.prediction for p in streamer.plan.phases if p.prediction is not None and p.phase.is_repeated]
    return {
        **{f"stats_{name}": value for name, value in stats.as_dict().items()},
        "locked_bytes": stats.pinned_bytes,  # what CUDA page-locks does not show in the system's own count
        "predicted_ms_per_pass": round(predicted[0].ms_per_pass, 3) if predicted else None,
        "predicted_bound": predicted[0].bound if predicted else None,
        "packed_share": round(stats.packed_bytes / stats.unpacked_bytes, 4) if stats.unpacked_bytes else None,
        "decode_gb_per_s": streamer.plan.costs.decode_gb_per_s if streamer.plan.costs is not None else None,
        "stats_pairing": streamer._last.pairing.reasons() if streamer._last is not None else {},
        "links": streamer._last.links if streamer._last is not None else {},
        "plan": str(streamer),
        "report": str(streamer.report()),
    }


def _next_gpu(device: torch.device) -> torch.device:
    count = torch.cuda.device_count()
    if count < 2:
        raise MissingPeerError("there is one GPU here, and what is stored on another needs two")
    return torch.device("cuda", ((device.index or 0) + 1) % count)


def _counters(streamer: layerstream.LayerStreamer) -> Counters:
    """The engine's own numbers: to ask for `stats()` within a call would look at the device, and take time."""

    def engine() -> Any:
        return streamer._streamer

    @functools.cache
    def component_of(module: nn.Module) -> str | None:
        return next((name for name, part in streamer._hold.called.items() if module in set(part.modules())), None)

    def held_bytes(module: nn.Module) -> int:
        # What stays of other components is of no use to this one.
        transfer, name = engine()._transfer, component_of(module)
        others = (unit.own_slot for unit in transfer.with_own_slot if unit.spec.component != name)
        held: int = transfer.weights_bytes - sum(slot.buffer.numel() for slot in others)
        return held

    return Counters(lambda: engine().stats.loaded_bytes, held_bytes)


# Two measure what a pass takes, three how long, and the next is planned with both.
LAYERSTREAM = Method("layerstream", _apply, num_warm_ups=8, takes_budget=True)
# The same, with the two passes of a step side by side: foreseen after some steps, then measured and timed anew.
PAIRED = Method("paired", functools.partial(_apply, pairing="auto"), num_warm_ups=32, takes_budget=True)
# Where they are packed while calls run, at most a twentieth of the time, it takes some hundred passes.
PACKED_AUTO = Method(
    "packed_auto", functools.partial(_apply, packing="auto"), ("denoiser",), num_warm_ups=240, takes_budget=True
)
# With all blocks packed on entering; and with that and pairs.
PACKED = Method("packed", functools.partial(_apply, packing="ahead"), num_warm_ups=8, takes_budget=True)
PACKED_PAIRED = Method(
    "packed_paired", functools.partial(_apply, pairing="auto", packing="ahead"), num_warm_ups=32, takes_budget=True
)
# With the weights in another GPU's memory; and the same through the host, as where two GPUs cannot reach each other.
STORED = Method("stored", functools.partial(_apply, is_stored=True), num_warm_ups=8, takes_budget=True)
STORED_APART = Method(
    "stored_apart", functools.partial(_apply, is_stored=True, is_reached=False), num_warm_ups=8, takes_budget=True
)
# With a share of each load over another GPU's link to the host.
LINKS = Method("links", functools.partial(_apply, has_links=True), num_warm_ups=8, takes_budget=True)
LINKS_PACKED = Method(
    "links_packed", functools.partial(_apply, packing="ahead", has_links=True), num_warm_ups=8, takes_budget=True
)
