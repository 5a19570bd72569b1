"""`offload`, the one line, and what it would do: `plan`; what it does now: `active`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch

from layerstream.budget import parse_reserve
from layerstream.device.base import Device
from layerstream.model.components import some_components_of
from layerstream.pipeline.layer_streamer import LayerStreamer
from layerstream.pipeline.options import Store, checked_packing, checked_pairing
from layerstream.pipeline.owners import owner_of
from layerstream.pipeline.preview import plan_of
from layerstream.planning.phase_plan import AssumedReserve
from layerstream.planning.plan import Plan

T = TypeVar("T", bound=Callable[..., Any])


@overload
def offload(
    pipe: T,
    *,
    vram_budget: int | str = ...,
    device: Any = ...,
    call_timeout: float | None = ...,
    pairing: str = ...,
    packing: str = ...,
    store: Store = ...,
    store_budget: int | str = ...,
    shared_as: str | None = ...,
    links: Store = ...,
) -> LayerStreamer: ...
@overload
def offload(
    pipe: None = ...,
    *,
    vram_budget: int | str = ...,
    device: Any = ...,
    call_timeout: float | None = ...,
    pairing: str = ...,
    packing: str = ...,
    store: Store = ...,
    store_budget: int | str = ...,
    shared_as: str | None = ...,
    links: Store = ...,
) -> LayerStreamer: ...
def offload(
    pipe: Any = None,
    *,
    vram_budget: int | str = "auto",
    device: torch.device | str | int | Device | None = None,
    call_timeout: float | None = None,
    pairing: str = "off",
    packing: str = "off",
    store: Store = None,
    store_budget: int | str = "auto",
    shared_as: str | None = None,
    links: Store = None,
) -> Any:
    """Stream a pipeline's weights from host memory, block by block, just in time.

        with layerstream.offload(pipe, vram_budget="8GiB"):
            image = pipe("a serene mountain landscape at sunset").images[0]

    Output is bit-identical to the pipeline on the device. Leaving restores every parameter, hook and device.

    Args:
        pipe: a diffusers pipeline, any object with `.components`, an `nn.Module`, a dict of modules, or an object of
            any class whose attributes are modules (what else it holds is passed over). A class or function is
            decorated; without it, the result is a decorator.
        vram_budget: what the process may reserve on the device, activations and all other tensors included: int bytes,
            "8GiB" (or "8G"), "8GB", "50%" of the device's memory, "auto" (what is free, less a small reserve) or "min"
            (the least of weights: everything streamed, and no limit for the rest).
        device: where to run: a CUDA device, or "cpu" for the simulated one. Default: the current GPU, else "cpu".
        call_timeout: one call at a time: how many seconds a second caller waits for the first. None: as long as it
            takes; 0: not at all. Then it gets a `ConcurrentUseError`; the call that runs is never touched.
        pairing: "auto": where a pipeline calls its denoiser twice a step, for two texts, and loads bound it, the two
            passes run side by side, so that each load serves both, as soon as the second can be foreseen. "off": each
            call runs by itself.
        packing: whether weights are kept in host memory, and cross the bus, losslessly packed, in about two thirds of
            their bytes (bfloat16), and are decoded on the device. "auto": what passes wait for, one block after the
            other while calls run. "ahead": all blocks, on entering. "off": none.
        store: where the weights are that stream. Default: in host memory. "cuda:1": in another GPU's memory, from where
            they come over NVLink or PCIe; what they had on the host is free meanwhile. `["cuda:1", "cuda:2"]`: in the
            first, then in the next. With "cpu" at the end the host takes the rest, else all must fit.
        store_budget: what the process may reserve on each of those GPUs, as `vram_budget` is given; not "min".
        shared_as: a name under which the ranks of this host that run the same weights share one copy of them in host
            memory (`torchrun`, `accelerate launch`, or any `torch.distributed` process group). Default: each has its
            own.
        links: other GPUs, `"cuda:1"` or a list, that compute nothing: each brings a share of every load over its own
            link to the host, and hands it on over NVLink. Takes 96 MiB of each.

    Returns: a `LayerStreamer` (or, for a class or function, that, decorated).

    Raises, on entering:
        PipelineError: no pipeline, no module, or weights on the meta device.
        BudgetError: unparsable, not positive, larger than the device, or too small; with the least that works.
        DeviceError: the device does not exist.
        AlreadyOffloadedError: offloaded already, by layerstream, accelerate, diffusers or a device_map.
        CompiledWholeError: a component is compiled as a whole with `fullgraph=True`.
        HostMemoryError: the weights cannot be held in host memory.
        StoreError: the weights do not fit in `store`, or a GPU of `links` has no room for its part; with numbers.
        ArgumentError: `store` names the device itself, or a GPU twice; there is a `store_budget` without it; or
            `shared_as` without a process group; or `links` names the device itself, or a GPU twice.
        RankError: another rank shares other weights under this name, or has ended, or does not answer.

    Raises, at once:
        ArgumentError: `call_timeout` is no number of seconds, `pairing` or `packing` is none of its values, `store` or
            `links` is no device, `shared_as` no name or given with `store` or `packing`, or a decorator was given what
            cannot be called.
    """
    is_target = isinstance(pipe, type) or inspect.isfunction(pipe)
    streamer = LayerStreamer(
        None if is_target else pipe,
        vram_budget=vram_budget,
        device=device,
        call_timeout=call_timeout,
        pairing=pairing,
        packing=packing,
        store=store,
        store_budget=store_budget,
        shared_as=shared_as,
        links=links,
    )
    return streamer(pipe) if is_target else streamer


def active(pipe: Any) -> LayerStreamer | None:
    """The streamer that streams components of this pipeline, module or dict now; None if there is none.

    layerstream.active(pipe).close()  # of a cell that was run twice
    """
    streamer: LayerStreamer | None = owner_of(pipe)
    return streamer


def plan(
    pipe: Any,
    *,
    vram_budget: int | str | None = None,
    device: torch.device | str | int | Device | None = None,
    reserve: int | str | None = None,
    pairing: str = "off",
    packing: str = "off",
) -> Plan:
    """What `offload` would do with this pipeline; moves nothing. `print(plan)` shows a table.

        print(layerstream.plan(pipe, vram_budget="8GiB", reserve="1GiB"))

    Weights on the meta device are planned as well, so a model too large for this machine can be looked at.

    A pipeline that streams now gives its present plan; with arguments, the plan under these, with the times and
    activations that were measured so far.

    Args:
        pipe, device: as for `offload`.
        vram_budget: as for `offload`. Default: "auto"; of what streams on that device, its own.
        reserve: device memory that every phase of the call takes for activations: int bytes or a size such as "1GiB".
            `offload` measures it; here it is an assumption. Default: none; of what streams, what was measured.
        pairing: as for `offload`. "auto": where a component is a denoiser, two passes have room at once, so `reserve`
            counts twice there.
        packing: as for `offload`. "ahead": blocks of bfloat16 are taken to be packed in 0.68 of their bytes. "auto" is
            planned as "off": what is packed depends on times that are measured.

    Returns: a `Plan`; its `phases` say which units are resident, `least_bytes` what works, `peak_bytes` what is used.

    Raises:
        PipelineError, AdapterError, DeviceError: see `offload`.
        BudgetError: unparsable, larger than the device, or too small.
        ArgumentError: `pairing` or `packing` is none of its values.
    """
    is_packed = checked_packing(packing) == "ahead"
    num_lanes = 2 if checked_pairing(pairing) == "auto" else 1
    some_components_of(pipe)
    assumed = None if reserve is None else AssumedReserve(parse_reserve(reserve), num_lanes)
    running = active(pipe)
    if running is not None:
        if vram_budget is None and device is None and assumed is None:
            return running.plan
        return running.plan_anew(vram_budget, device, assumed)
    return plan_of(pipe, vram_budget, device, assumed, is_packed=is_packed)
