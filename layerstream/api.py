"""`offload`, the one line, and `LayerStreamer`, what it returns."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from html import escape
from traceback import clear_frames
from types import TracebackType
from typing import Any, TypeVar, overload

import torch
from torch import nn

from layerstream.adapters.registry import adapter_for
from layerstream.budget import format_budget, format_bytes, parse_reserve, resolve_budget
from layerstream.changes import (
    CHANGING_METHODS,
    MERGING_METHODS,
    READING_METHODS,
    adapter_layers,
    merging_on,
    methods_of,
)
from layerstream.compiled import uncompiled
from layerstream.device import CudaDevice, Device, find_device
from layerstream.errors import AlreadyOffloadedError, LayerstreamWarning, PipelineError, StreamerStateError
from layerstream.intercept import Interception, refuse_rivals
from layerstream.plan import Phase, Plan, make_plan
from layerstream.report import Report, streamer_html
from layerstream.simulated import SimulatedDevice
from layerstream.stats import Stats
from layerstream.streamer import Streamer
from layerstream.units import ComponentLayout, divide

T = TypeVar("T", bound=Callable[..., Any])

# Who streams which component, so that entering twice is refused; weak both ways, so that nothing here keeps a
# pipeline alive that its user has dropped without closing.
_ACTIVE: weakref.WeakKeyDictionary[nn.Module, weakref.ref[LayerStreamer]] = weakref.WeakKeyDictionary()


class LayerStreamer:
    """Streams a pipeline's weights while it is active: as a context manager, by `start` and `close`, or as a decorator.

    Made by `layerstream.offload`, which documents the arguments. Nothing happens before it is entered; after leaving,
    by return or by any exception, the pipeline is as it was. It can be entered again. It prints its plan, and notebooks
    show its report as well; what one GiB more would buy is in them once `plan` or `report()` was asked for.
    """

    def __init__(
        self,
        pipe: Any = None,
        *,
        vram_budget: int | str = "auto",
        device: torch.device | str | int | Device | None = None,
    ) -> None:
        self._pipe = pipe
        self._vram_budget = vram_budget
        self._device = device
        self._streamer: Streamer | None = None
        self._last: Streamer | None = None  # what it did can be asked after it is closed
        self._changes = Interception()
        self._called: Mapping[str, nn.Module] = {}
        self._num_slots: int | None = None  # set by benchmarks and tests; the plan chooses otherwise

    # ---- entering and leaving

    def start(self) -> LayerStreamer:
        """Begin to stream; for notebook cells, where a `with` block does not fit. Returns itself.

        Raises:
            StreamerStateError: it is active already, or was made without a pipeline.
            PipelineError, AlreadyOffloadedError, BudgetError, DeviceError, AdapterError, CompiledWholeError: see
                `offload`. Nothing has changed then.
        """
        if self._pipe is None:
            raise StreamerStateError(
                "offload() without a pipeline is a decorator. Give it one: `with layerstream.offload(pipe):`."
            )
        if self.is_active:
            raise StreamerStateError(
                "this streamer is active already. Leave it (or call close()) before entering again."
            )
        self.close()  # of what ended by itself
        called = _components(self._pipe)
        components = {name: uncompiled(module) for name, module in called.items()}
        _refuse_active(components)
        refuse_rivals(self._pipe, components)
        device = self._make_device()
        budget = _resolve(self._vram_budget, device)
        streamer = Streamer(
            functools.partial(_layouts, self._pipe),
            device,
            budget,
            num_slots=self._num_slots,
            find_replaced=self._find_replaced,
        )
        layouts = _layouts(self._pipe)
        if not any(stack.blocks for layout in layouts for stack in layout.stacks):
            _warn_nothing_streams(components)
        streamer.owner = self  # hooks keep the engine alive, the engine keeps us: dropped by its user, it can be closed
        streamer.open(layouts)
        self._streamer = self._last = streamer
        try:
            self._watch()
        except BaseException:
            self.close()
            raise
        return self

    def _watch(self) -> None:
        """Mark the components as ours, and pause around the calls that change them."""
        self._called = _components(self._pipe)
        components = {name: uncompiled(module) for name, module in self._called.items()}
        for component, module in components.items():
            for layer in adapter_layers(module):
                for name in MERGING_METHODS:  # of one component only: there is a call for each layer
                    self._changes.watch_change(layer, name, functools.partial(self._paused, component))
        for owner in [self._pipe, *components.values()]:
            if isinstance(owner, nn.Module):
                _ACTIVE[owner] = weakref.ref(self)
            if not isinstance(owner, Mapping):
                for name in methods_of(owner, CHANGING_METHODS):
                    self._changes.watch_change(owner, name, self.paused)
                for name in methods_of(owner, READING_METHODS):
                    self._changes.watch_change(owner, name, self._paused_if_idle)

    def _find_replaced(self) -> str | None:
        """The name of a component that is another module now than when streaming began."""
        if isinstance(self._pipe, nn.Module):
            return None
        for name, module in self._called.items():
            is_dict = isinstance(self._pipe, Mapping)
            now = self._pipe.get(name, module) if is_dict else getattr(self._pipe, name, module)
            if now is not module and isinstance(now, nn.Module) and uncompiled(now) is not uncompiled(module):
                return name
        return None

    def _unwatch(self) -> None:
        self._changes.remove()
        for module in [m for m, owner in _ACTIVE.items() if owner() is self]:
            del _ACTIVE[module]

    def close(self) -> None:
        """Stop streaming and restore the pipeline. Closing twice, or before starting, does nothing.

        Raises:
            ConcurrentUseError: another thread is in the middle of a call; nothing has changed.
        """
        streamer = self._streamer
        if streamer is None:
            return
        try:
            streamer.close()
        finally:
            # An interrupt, or a warning that is an error, leaves `close` after all is given back.
            if streamer.is_closed:
                self._streamer = None
                self._unwatch()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Change the pipeline while it streams: inside, the weights are at home and nothing is hooked.

            with streamer.paused():
                pipe.transformer.proj_out = MyHead()

        Afterwards streaming resumes with whatever is there then, under the same budget. What a component takes beside
        its weights is measured anew. The usual calls of diffusers, transformers and peft (loading, fusing, unfusing and
        unloading LoRA weights, `fuse_qkv_projections`, `load_state_dict`, `save_pretrained`, casts by `.to(dtype)`) do
        this by themselves. Pausing inside a pause does nothing; pausing what is not active does nothing either.

        Raises:
            StreamerStateError: a component is in the middle of its forward.
            BudgetError: what was made of the pipeline does not fit the budget; streaming has ended then.
        """
        with self._paused(None):
            yield

    @contextlib.contextmanager
    def _paused(self, component: str | None) -> Iterator[None]:
        """Pause one component, and those that share weights with it, or all."""
        streamer = self._streamer
        if streamer is None or streamer.is_paused:
            yield
            return
        components = [uncompiled(m) for m in _components(self._pipe).values()]
        try:
            with streamer.paused(component), merging_on(streamer.device.torch_device, components):
                self._changes.remove()
                yield
        finally:
            self._unwatch()
            if streamer.is_closed:
                self._streamer = None
            else:
                self._watch()

    @contextlib.contextmanager
    def _paused_if_idle(self) -> Iterator[None]:
        is_idle = self._streamer is not None and self._streamer.is_idle
        with self.paused() if is_idle else contextlib.nullcontext():
            yield

    def __enter__(self) -> LayerStreamer:
        return self.start()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        refused = None
        if isinstance(exc, torch.OutOfMemoryError) and self._streamer is not None:
            refused = self._streamer.explain(exc)
        self.close()
        if refused is not None:
            try:
                # What the call had made goes now: whoever catches the error may want the room for a smaller image.
                clear_frames(traceback)
                raise refused from exc
            finally:
                del refused, exc, traceback  # this frame is in the error's traceback, and would keep it alive

    # ---- as a decorator

    def __call__(self, target: T) -> T:
        """Decorate a pipeline class (its `__call__` runs streamed) or a function.

        The function's first argument is the pipeline, unless the streamer was made with one.
        """
        if isinstance(target, type):
            target.__call__ = self._wrap(target.__call__)  # type: ignore[method-assign]
            return target
        return self._wrap(target)  # type: ignore[return-value]

    def _wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def generate(*args: Any, **kwargs: Any) -> Any:
                with self._around(args):
                    return (yield from function(*args, **kwargs))

            return generate
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def run(*args: Any, **kwargs: Any) -> Any:
                with self._around(args):
                    return await function(*args, **kwargs)

            return run

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._around(args):
                return function(*args, **kwargs)

        return call

    def _around(self, args: tuple[Any, ...]) -> LayerStreamer | _Already:
        """What a decorated call runs in; nothing new where its pipeline is streamed already."""
        if self._pipe is None and not args:
            raise StreamerStateError(
                "a function decorated with layerstream.offload() takes the pipeline as its first argument."
            )
        pipe = args[0] if self._pipe is None else self._pipe
        if any(uncompiled(module) in _ACTIVE for module in _components(pipe).values()):
            return _Already()
        inner = LayerStreamer(pipe, vram_budget=self._vram_budget, device=self._device)
        inner._num_slots = self._num_slots
        return inner

    # ---- what it did

    @property
    def is_active(self) -> bool:
        """Whether it streams. A change of the pipeline that it could not go on with ends that."""
        return self._streamer is not None and not self._streamer.is_closed

    def stats(self) -> Stats:
        """The counters since the last start, as they are now.

        Raises:
            StreamerStateError: it was never started.
        """
        return replace(self._started("stats").look())

    @property
    def plan(self) -> Plan:
        """The present plan: what was measured so far is in it, and what one GiB more would buy.

        Raises:
            StreamerStateError: it was never started.
        """
        return self._started("plan").plan.with_next_gib()

    def report(self) -> Report:
        """What happened since the last start: bytes, stalls and peak of each phase, and what bounds it.

        Raises:
            StreamerStateError: it was never started.
        """
        streamer = self._started("report")
        return Report.of(streamer.plan.with_next_gib(), streamer.look(), streamer.phase_stats)

    def _plan_anew(
        self, vram_budget: int | str | None, device: torch.device | str | int | Device | None, reserve_bytes: int | None
    ) -> Plan:
        """The plan under other arguments; those that are None are as they are now."""
        streamer = self._started("plan")
        present, found = streamer.plan, streamer.device
        other = found if device is None else _device_of(device)
        if other.torch_device != found.torch_device:  # where no times were measured
            found, vram_budget = other, "auto" if vram_budget is None else vram_budget
            present = replace(present, costs=None, granularity=other.rounded_bytes(1))
        budget = present.budget_bytes
        if vram_budget is not None:
            # The allocator is held to our own budget now; what would be free without it is all that others leave.
            total_bytes = found.total_bytes()
            free_bytes = total_bytes - found.context_bytes()
            budget = resolve_budget(vram_budget, free_bytes=free_bytes, total_bytes=total_bytes)
        return present.under(budget, reserve_bytes=reserve_bytes).with_next_gib()

    def _started(self, what: str) -> Streamer:
        if self._last is None:
            raise StreamerStateError(f"no {what} yet: the streamer was never started.")
        return self._last

    def __str__(self) -> str:
        return repr(self) if self._last is None else f"{self!r}\n{self._last.plan}"

    def __repr__(self) -> str:
        if self._last is None:
            return f"LayerStreamer(not started, vram_budget={self._vram_budget!r})"
        stats = self._last.stats
        state = "active" if self.is_active else "closed"
        budget = format_budget(stats.budget_bytes or None)
        return (
            f"LayerStreamer({state}, {budget}: {stats.num_resident_blocks} blocks resident, "
            f"{stats.num_streamed_blocks} streamed, at most {format_bytes(stats.peak_device_bytes)} of weights on the "
            "device)"
        )

    def _repr_html_(self) -> str:
        if self._last is None:
            return f"<code>{escape(repr(self))}</code>"
        streamer = self._last
        report = Report.of(streamer.plan, streamer.look(), streamer.phase_stats)
        return streamer_html(repr(self), streamer.plan, report)

    def _make_device(self) -> Device:
        return _device_of(self._device)


class _Already:
    """The context of a decorated call inside an outer offload."""

    def __enter__(self) -> None: ...
    def __exit__(self, *exc: object) -> None: ...


@overload
def offload(pipe: T, *, vram_budget: int | str = ..., device: Any = ...) -> LayerStreamer: ...
@overload
def offload(pipe: None = ..., *, vram_budget: int | str = ..., device: Any = ...) -> LayerStreamer: ...
def offload(
    pipe: Any = None,
    *,
    vram_budget: int | str = "auto",
    device: torch.device | str | int | Device | None = None,
) -> Any:
    """Stream a pipeline's weights from host memory, block by block, just in time.

        with layerstream.offload(pipe, vram_budget="8GiB"):
            image = pipe("a serene mountain landscape at sunset").images[0]

    Output is bit-identical to the pipeline on the device. Leaving restores every parameter, hook and device.

    Args:
        pipe: a diffusers pipeline, any object with `.components`, an `nn.Module`, or a dict of modules. A class or
            function is decorated; without it, the result is a decorator.
        vram_budget: what the process may reserve on the device, activations and all other tensors included: int bytes,
            "8GiB" (or "8G"), "8GB", "50%" of the device's memory, "auto" (what is free, less a small reserve) or "min"
            (the least of weights: everything streamed, and no limit for the rest).
        device: where to run: a CUDA device, or "cpu" for the simulated one. Default: the current GPU, else "cpu".

    Returns: a `LayerStreamer` (or, for a class or function, that, decorated).

    Raises, on entering:
        PipelineError: no pipeline, no module, or weights on the meta device.
        BudgetError: unparsable, not positive, larger than the device, or too small; with the least that works.
        DeviceError: the device does not exist.
        AlreadyOffloadedError: offloaded already, by layerstream, accelerate, diffusers or a device_map.
        CompiledWholeError: a component is compiled as a whole with `fullgraph=True`.
    """
    is_target = isinstance(pipe, type) or inspect.isfunction(pipe)
    streamer = LayerStreamer(None if is_target else pipe, vram_budget=vram_budget, device=device)
    return streamer(pipe) if is_target else streamer


def plan(
    pipe: Any,
    *,
    vram_budget: int | str | None = None,
    device: torch.device | str | int | Device | None = None,
    reserve: int | str | None = None,
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

    Returns: a `Plan`; its `phases` say which units are resident, `least_bytes` what works, `peak_bytes` what is used.

    Raises:
        PipelineError, AdapterError, DeviceError: see `offload`.
        BudgetError: unparsable, larger than the device, or too small.
    """
    reserve_bytes = None if reserve is None else parse_reserve(reserve)
    for component in _components(pipe).values():
        owner = _ACTIVE.get(uncompiled(component))
        streamer = owner() if owner is not None else None
        if streamer is not None:
            if vram_budget is None and device is None and reserve_bytes is None:
                return streamer.plan
            return streamer._plan_anew(vram_budget, device, reserve_bytes)
    found = _device_of(device)
    layouts = _layouts(pipe)
    units = [unit.spec for unit in divide(layouts, is_preview=True).units]
    phases = [Phase((layout.name,), layout.is_repeated, reserve_bytes or 0, is_assumed=True) for layout in layouts]
    budget = _resolve("auto" if vram_budget is None else vram_budget, found)
    return make_plan(units, phases, budget, granularity=found.rounded_bytes(1))


def _device_of(device: torch.device | str | int | Device | None) -> Device:
    if device is not None and not isinstance(device, torch.device | str | int):
        return device
    torch_device = find_device(device)
    return SimulatedDevice() if torch_device.type == "cpu" else CudaDevice(torch_device)


def _resolve(vram_budget: int | str, device: Device) -> int | None:
    return resolve_budget(
        vram_budget, free_bytes=device.allocated_bytes() + device.free_bytes(), total_bytes=device.total_bytes()
    )


def _layouts(pipe: Any) -> list[ComponentLayout]:
    """The pipeline's components as their adapters describe them, as they are now."""
    return [
        replace(adapter_for(uncompiled(module)).layout(name, uncompiled(module)), called=module)
        for name, module in _components(pipe).items()
    ]


def _components(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's modules by name, as it calls them (compiled or not), each once."""
    found: Mapping[Any, Any]
    if isinstance(pipe, nn.Module):
        found = {type(uncompiled(pipe)).__name__: pipe}
    elif isinstance(pipe, Mapping):
        strange = [f"{k!r}: {type(v).__name__}" for k, v in pipe.items() if not isinstance(v, nn.Module)]
        if strange:
            raise PipelineError(f"a dict given to offload must hold modules only; it holds {', '.join(strange)}.")
        found = pipe
    elif isinstance(getattr(pipe, "components", None), Mapping):
        found = pipe.components
    else:
        raise PipelineError(
            f"cannot stream a {type(pipe).__name__}: it is no diffusers pipeline (no `.components`), no "
            "torch.nn.Module and no dict of modules."
        )
    components: dict[str, nn.Module] = {}
    for name, module in found.items():
        if isinstance(module, nn.Module) and not any(
            uncompiled(module) is uncompiled(known) for known in components.values()
        ):
            components[str(name)] = module
    if not components:
        raise PipelineError(f"{type(pipe).__name__} has no modules: there are no weights to stream.")
    return components


def _refuse_active(components: Mapping[str, nn.Module]) -> None:
    for name, component in components.items():
        inside = set(component.modules())
        for active, owner in list(_ACTIVE.items()):
            if active in inside or any(module is component for module in active.modules()):
                streamer = owner()
                raise AlreadyOffloadedError(
                    f"`{name}` is streamed by layerstream already ({streamer!r}). Leave that context, or call its "
                    "close(), before entering another. (This error's `.streamer` is it, should you have lost it.)",
                    streamer=streamer,
                )


def _warn_nothing_streams(components: Mapping[str, nn.Module]) -> None:
    warnings.warn(
        f"no block stacks found in {', '.join(f'`{n}` ({type(m).__name__})' for n, m in components.items())}: each "
        "component is on the device whole. Name its stacks: layerstream.register_adapter(cls, Adapter(stacks=[...])).",
        LayerstreamWarning,
        stacklevel=4,
    )
