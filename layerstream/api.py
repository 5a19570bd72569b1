"""`offload`, the one line, and `LayerStreamer`, what it returns."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import math
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from html import escape
from pathlib import Path
from traceback import clear_frames
from types import TracebackType
from typing import Any, TypeVar, overload

import torch
from torch import nn

from layerstream.budget import format_budget, format_bytes, parse_reserve, resolve_budget
from layerstream.device.base import Device
from layerstream.device.cuda import CudaDevice, find_device
from layerstream.engine.streamer import Streamer
from layerstream.errors import (
    AlreadyOffloadedError,
    ArgumentError,
    BudgetError,
    DeviceError,
    StreamerStateError,
    brief,
)
from layerstream.hooks.compiled import uncompiled
from layerstream.hooks.intercept import Interception, refuse_rivals
from layerstream.interrupts import twice_if_interrupted
from layerstream.model.components import (
    components_of,
    containers_of,
    is_plain,
    layouts_of,
    refuse_scripted,
    some_components_of,
)
from layerstream.model.remembered import RememberedDevices
from layerstream.model.units import divide
from layerstream.pipeline.changes import (
    CHANGING_METHODS,
    MERGING_METHODS,
    READING_METHODS,
    adapter_layers,
    entries_of,
    merging_on,
    methods_of,
)
from layerstream.pipeline.decorating import decorated
from layerstream.pipeline.watch import (
    ACTIVE,
    RIVAL_METHODS,
    PipelineWatch,
    modules_of,
    owners_of,
    streamed_now,
)
from layerstream.planning.plan import Phase, Plan, make_plan
from layerstream.report import Report, entered_line, streamer_html
from layerstream.saying import warn
from layerstream.stats import Stats

T = TypeVar("T", bound=Callable[..., Any])

_log = logging.getLogger("layerstream")
_ACTIVE = ACTIVE
# One at a time begins to stream, or joins and leaves what decorated calls share.
_ENTERING = threading.RLock()


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
        call_timeout: float | None = None,
    ) -> None:
        self._pipe = pipe
        self._vram_budget = vram_budget
        self._device = device
        self._call_timeout = _checked_timeout(call_timeout)
        self._streamer: Streamer | None = None
        self._last: Streamer | None = None  # what it did can be asked after it is closed
        self._changes = Interception()
        self._pipelines = PipelineWatch()
        self._called: Mapping[str, nn.Module] = {}
        self._names: set[str] = set()  # of the modules of a dict
        self._remembered: RememberedDevices | None = None
        self._num_guests: int | None = None  # decorated calls that share it; None: nobody but its user ends it
        self._num_slots: int | None = None  # set by benchmarks and tests; the plan chooses otherwise

    # ---- entering and leaving

    def start(self) -> LayerStreamer:
        """Begin to stream; for notebook cells, where a `with` block does not fit. Returns itself.

        Raises:
            StreamerStateError: it is active already, or was made without a pipeline.
            PipelineError, AlreadyOffloadedError, BudgetError, DeviceError, AdapterError, CompiledWholeError,
            HostMemoryError: see `offload`. Nothing has changed then.
        """
        if self._pipe is None:
            raise StreamerStateError(
                "offload() without a pipeline is a decorator. Give it one: `with layerstream.offload(pipe):`."
            )
        while True:
            for owner in (self, *_touching(some_components_of(self._pipe))):
                owner._wait_for_closing()
            with _ENTERING:
                if not any(owner._is_closing for owner in (self, *_touching(some_components_of(self._pipe)))):
                    self._start()
                    return self

    def _start(self) -> None:
        if self.is_active:
            raise StreamerStateError(
                "this streamer is active already: `layerstream.active(pipe)` gives it, should you have lost it. Leave "
                "it (or call close()) before entering again."
            )
        self.close()  # of what ended by itself
        called = some_components_of(self._pipe)
        components = {name: uncompiled(module) for name, module in called.items()}
        refuse_active(components)
        refuse_rivals(self._pipe, components)
        refuse_scripted(components)
        device = self._make_device()
        budget = _resolve(self._vram_budget, device)
        streamer = Streamer(
            functools.partial(layouts_of, self._pipe),
            device,
            budget,
            call_timeout=self._call_timeout,
            num_slots=self._num_slots,
            find_replaced=self._find_replaced,
            let_go=self._let_go_of_dropped,
        )
        layouts = layouts_of(self._pipe)
        if not any(stack.blocks for layout in layouts for stack in layout.stacks):
            _warn_nothing_streams(components)
        homes = {t.device for module in components.values() for t in module.parameters()}
        streamer.owner = self  # hooks keep the engine alive, the engine keeps us: dropped by its user, it can be closed
        self._streamer = streamer
        try:
            streamer.open(layouts)
            self._last = streamer
            self._watch()
            plain = [type(self._pipe)] if is_plain(self._pipe) else []
            self._pipelines.install(self._pipe, [*plain, *(type(m) for m in containers_of(self._pipe))])
            if plain:
                self._remembered = RememberedDevices(self._pipe, homes, device.torch_device)
        except BaseException:
            twice_if_interrupted(self.close)
            raise
        if streamer.has_shown_progress or _log.isEnabledFor(logging.INFO):
            line = entered_line(streamer.plan, streamer.stats)
            _log.info("%s", line)
            if streamer.has_shown_progress:  # it took its time: what came of it, in the bar's place
                print(f"layerstream: {line}", file=sys.stderr)

    def _watch(self) -> None:
        """Mark the components as ours, and pause around the calls that change them."""
        self._called = components_of(self._pipe)
        self._names = _names_of_modules(self._pipe) if isinstance(self._pipe, Mapping) else set()
        components = {name: uncompiled(module) for name, module in self._called.items()}
        containers = [m for m in containers_of(self._pipe) if m not in components.values()]
        for module in containers:
            ACTIVE[module] = weakref.ref(self)
            self._watch_methods(module)
        for component, module in components.items():
            ACTIVE[module] = weakref.ref(self)
            for layer in adapter_layers(module):
                for name in MERGING_METHODS:  # of one component only: there is a call for each layer
                    self._changes.watch_change(layer, name, functools.partial(self._paused, component))
            self._watch_methods(module)

    def _watch_methods(self, module: nn.Module) -> None:
        """Pause around what changes or reads all of a module, and refuse other offloaders."""
        for name in methods_of(module, CHANGING_METHODS):
            self._changes.watch_change(module, name, self.paused)
        for name in methods_of(module, READING_METHODS):
            self._changes.watch_call(module, name, functools.partial(self._read, module))
        for name in methods_of(module, RIVAL_METHODS):
            refuse = functools.partial(self._refuse_rival_call, f"{type(module).__name__}.{name}()")
            self._changes.watch_call(module, name, refuse)

    def _find_replaced(self) -> str | None:
        """The name of a component that is another module now than when streaming began."""
        if isinstance(self._pipe, nn.Module):
            return None
        for name, module in self._called.items():
            now = self._held(name, module)
            if now is not module and isinstance(now, nn.Module) and uncompiled(now) is not uncompiled(module):
                return name
        return None

    def _let_go_of_dropped(self) -> None:
        """Components that are in a dict no longer, or again; of an object, that is seen when it happens."""
        if isinstance(self._pipe, Mapping):
            # By what it holds: describing what is inside takes milliseconds, and this is asked at each pass.
            if not _names_of_modules(self._pipe) <= self._names:
                with self._paused(None):
                    pass
            for name in [name for name in self._called if self._held(name, None) is None]:
                with self._paused(name):
                    pass

    def _held(self, name: str, default: object) -> object:
        """What the pipeline has by the name of a component, which may be a part of what it holds."""
        if isinstance(self._pipe, Mapping):
            if name in self._pipe:
                return self._pipe[name]
        elif name in getattr(self._pipe, "__dict__", {}) or "." not in name:
            return getattr(self._pipe, name, default)
        holder, _, part = name.rpartition(".")
        held = self._held(holder, None) if holder else None
        return getattr(held, part, default) if isinstance(held, nn.Module) else default

    def _unwatch(self) -> None:
        self._changes.remove()
        for module in [m for m, owner in streamed_now() if owner is self]:
            ACTIVE.pop(module, None)

    def close(self) -> None:
        """Stop streaming and restore the pipeline. Closing twice, or before starting, does nothing.

        While a call runs in another thread this only says that streaming is to end: it does when that call ends, and
        entering again waits for it.

        Raises:
            StreamerStateError: called in the middle of a call, by whoever runs it; nothing has changed.
        """
        streamer = self._streamer
        if streamer is None:
            return
        if streamer.is_inside:
            raise StreamerStateError(
                "close() was called in the middle of a call of this pipeline, which would go on without its weights. "
                "Call it when the call has returned."
            )
        streamer.gate.when_free(functools.partial(self._close_now, streamer))

    def _close_now(self, streamer: Streamer) -> None:
        if self._streamer is not streamer:
            return
        try:
            streamer.close()
        finally:
            # An interrupt, or a warning that is an error, leaves `close` after all is given back.
            if streamer.is_closed:
                self._unwatch()
                self._let_go_of_pipelines()
                self._streamer = None  # last: interrupted before, all of it is done once more

    def _let_go_of_pipelines(self) -> None:
        self._pipelines.remove()
        if self._remembered is not None:
            self._remembered.restore()
            self._remembered = None

    @property
    def _is_closing(self) -> bool:
        return self._streamer is not None and self._streamer.gate.is_closing

    def _wait_for_closing(self) -> None:
        """Where streaming is to end when a call ends, wait for that.

        Raises:
            StreamerStateError: it is this thread's own call.
        """
        streamer = self._streamer
        if streamer is not None and streamer.gate.is_closing:
            if streamer.gate.is_inside:
                raise StreamerStateError(
                    "streaming cannot begin in the middle of a call of this pipeline, at whose end it is to be closed: "
                    "another thread has called close(). Begin when the call has returned."
                )
            with streamer.gate.entered("entering again"):
                pass

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Change the pipeline while it streams: inside, the weights are at home and nothing is hooked.

            with streamer.paused():
                pipe.transformer.proj_out = MyHead()

        Afterwards streaming resumes with whatever is there then, under the same budget. What a component takes beside
        its weights is measured anew. The usual calls of diffusers, transformers and peft (loading, fusing, unfusing and
        unloading LoRA weights, `fuse_qkv_projections`, `load_state_dict`, `save_pretrained`, casts by `.to(dtype)`) do
        this by themselves. Pausing inside a pause does nothing; pausing what is not active does nothing either. Other
        threads' calls of the pipeline wait until the pause is over.

        Raises:
            StreamerStateError: a component is in the middle of its forward.
            ConcurrentUseError: a call in another thread did not end within `call_timeout`.
            BudgetError: what was made of the pipeline does not fit the budget; streaming has ended then.
        """
        with self._paused(None):
            yield

    @contextlib.contextmanager
    def _paused(self, component: str | None) -> Iterator[None]:
        """Pause one component, and those that share weights with it, or all."""
        streamer = self._streamer
        if streamer is None or streamer.is_paused_here:
            yield
            return
        components = [uncompiled(m) for m in components_of(self._pipe).values()]
        try:
            with streamer.paused(component), merging_on(streamer.device.torch_device, components):
                self._changes.remove()
                del components
                yield
        finally:
            self._unwatch()
            if streamer.is_closed:
                self._streamer = None
                self._let_go_of_pipelines()
            else:
                self._watch()

    # ---- what is told of pipelines and modules (`pipeline.watch.Owner`)

    @property
    def number(self) -> int:
        """In this order one waits for streamers, if for more than one."""
        return -1 if self._streamer is None else self._streamer.gate.number

    def using(self, what: str) -> contextlib.AbstractContextManager[object]:
        """A call of a pipeline that has some of the components: others wait meanwhile."""
        return contextlib.nullcontext() if self._streamer is None else self._streamer.gate.entered(what)

    def pausing(self) -> contextlib.AbstractContextManager[object]:
        """A method of a pipeline is about to change components."""
        return self.paused()

    def replacing(self, pipe: object, name: str, value: object) -> contextlib.AbstractContextManager[object]:
        """`value` is about to take the place of a component in `pipe`, or to become one."""
        if pipe is not self._pipe:
            return contextlib.nullcontext()
        inside = [called for called in self._called if called == name or called.startswith(f"{name}.")]
        is_ours = isinstance(value, nn.Module) and self in owners_of(value.modules())
        if inside == [name] and not is_ours:
            return self._paused(name)
        # What streams already under another name is let go of under that one, too; another module may be a component
        # that the pipeline did not have.
        is_new = isinstance(value, nn.Module) and not is_ours
        return self._paused(None) if inside or is_new else contextlib.nullcontext()

    def refuse_rival(self, what: str) -> None:
        """Another offloader is about to be switched on.

        Raises:
            AlreadyOffloadedError: unless streaming is paused.
        """
        if self._streamer is not None and not self._streamer.is_paused:
            raise AlreadyOffloadedError(
                f"{what} would offload what layerstream streams already ({self!r}). Leave that context, or call its "
                "close(), before switching on another offloader; together they are not needed.",
                streamer=self,
            )

    def watch_class(self, cls: type) -> None:
        """A pipeline of this class has taken some of the components."""
        self._pipelines.watch_class(cls)

    def _refuse_rival_call(self, what: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.refuse_rival(what)
        return original(*args, **kwargs)

    def _read(self, module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`state_dict()` of a module: the weights at home. Who writes to its entries later is found out."""
        streamer = self._streamer
        if streamer is None or (streamer.gate.is_inside and not streamer.is_idle):
            return original(*args, **kwargs)  # in the middle of this thread's own forward; others wait
        with self.paused():
            result = original(*args, **kwargs)
            entries = entries_of(result, module)
        streamer.edits.track(entries)
        return result

    def __enter__(self) -> LayerStreamer:
        return self.start()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            refused = self._explained(exc)
        finally:
            twice_if_interrupted(self.close)
        _raise_instead(refused, exc, traceback)

    def _explained(self, exc: BaseException | None) -> BudgetError | None:
        """The error for memory that the budget refused, if `exc` is of that kind."""
        if not isinstance(exc, torch.OutOfMemoryError) or self._streamer is None:
            return None
        return self._streamer.explain(exc)

    # ---- as a decorator

    def __call__(self, target: T) -> T:
        """Decorate a pipeline class (its `__call__` runs streamed) or a function.

        The function's first argument is the pipeline, unless the streamer was made with one.

        Raises:
            ArgumentError: it is neither, or a class whose objects cannot be called.
        """
        if not callable(target) or (not isinstance(target, type) and not is_plain(target)):
            raise ArgumentError(
                f"a LayerStreamer decorates a class or a function, not {brief(target)}: to run a pipeline, call the "
                "pipeline itself; to stream a pipeline, `with layerstream.offload(pipe):`."
            )
        if isinstance(target, type):
            if not any("__call__" in vars(cls) for cls in target.__mro__):
                raise ArgumentError(
                    f"class {target.__name__} has no `__call__` that could run streamed. Decorate its methods: "
                    "`@layerstream.offload()` before each; the pipeline is their first argument."
                )
            target.__call__ = decorated(target.__call__, self._around)  # type: ignore[method-assign]
            return target
        return decorated(target, self._around)  # type: ignore[return-value]

    def _around(self, args: tuple[Any, ...], name: str, is_use: bool) -> contextlib.AbstractContextManager[object]:
        """What a decorated call runs in."""
        if self._pipe is None and not args:
            raise StreamerStateError(
                "a function decorated with layerstream.offload() takes the pipeline as its first argument."
            )
        pipe = args[0] if self._pipe is None else self._pipe
        return _DecoratedCall(self, pipe, f"`{name}`", is_use)

    def _for(self, pipe: Any) -> LayerStreamer:
        """A streamer with the same options."""
        inner = LayerStreamer(pipe, vram_budget=self._vram_budget, device=self._device, call_timeout=self._call_timeout)
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
        stats = streamer.look()
        plan, copied_by = streamer.plan.with_next_gib(), streamer.device.copied_by
        return Report.of(plan, stats, streamer.phase_stats, streamer.least_bytes, copied_by)

    @contextlib.contextmanager
    def trace(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """Write a timeline of the calls inside: phases, passes, blocks, what they wait for, and loads, with device
        times, as JSON that https://ui.perfetto.dev and chrome://tracing open.

            with streamer.trace("call.json"):
                pipe("a red fox in the snow")

        Calls take more host time meanwhile, since each block is told of. Waits for the device at the end.

        Args:
            path: of a file, which is overwritten.

        Raises:
            StreamerStateError: it does not stream, or is traced already.
            OSError: the file cannot be written; nothing has been traced then.
        """
        streamer = self._streamer
        if streamer is None or streamer.is_closed:
            raise StreamerStateError(
                "nothing streams now, so there is nothing to trace: enter the offload context first."
            )
        with Path(path).open("w", encoding="utf-8") as file, streamer.traced(file):
            yield

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
            return f"LayerStreamer(not started, vram_budget={brief(self._vram_budget)})"
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
        stats = streamer.look()
        report = Report.of(streamer.plan, stats, streamer.phase_stats, streamer.least_bytes)
        return streamer_html(repr(self), streamer.plan, report)

    def _make_device(self) -> Device:
        return _device_of(self._device)


class _DecoratedCall:
    """What a decorated call runs in. Calls that overlap share one streaming; the last to leave ends it.

    Args:
        is_use: others wait until it ends.
    """

    def __init__(self, decorator: LayerStreamer, pipe: Any, what: str, is_use: bool) -> None:
        self._decorator, self._pipe, self._what, self._is_use = decorator, pipe, what, is_use
        self._inner: LayerStreamer | None = None
        self._use = contextlib.ExitStack()

    def __enter__(self) -> None:
        while True:
            self._inner = self._join()
            try:
                if self._is_use:
                    self._use.enter_context(self._inner.using(self._what))
                if self._inner.is_active:
                    return
            except BaseException:
                self._leave()
                raise
            self._leave()  # it ended while this call waited for its turn

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        refused = None if self._inner is None else self._inner._explained(exc)
        self._leave()
        _raise_instead(refused, exc, traceback)

    def _join(self) -> LayerStreamer:
        with _ENTERING:
            running = active(self._pipe)
            if running is None:
                running = self._decorator._for(self._pipe).start()
                running._num_guests = 0
            if running._num_guests is not None:
                running._num_guests += 1
            return running

    def _leave(self) -> None:
        inner, self._inner = self._inner, None
        self._use.close()
        if inner is None or inner._num_guests is None:
            return
        with _ENTERING:
            inner._num_guests -= 1
            if not inner._num_guests:
                inner.close()


def _raise_instead(refused: BudgetError | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
    """Raise `refused`, if there is such, in the place of what leaves a context."""
    if refused is not None:
        try:
            # What the call had made goes now: whoever catches the error may want the room for a smaller image.
            clear_frames(traceback)
            raise refused from exc
        finally:
            del refused, exc, traceback  # this frame is in the error's traceback, and would keep it alive


@overload
def offload(
    pipe: T, *, vram_budget: int | str = ..., device: Any = ..., call_timeout: float | None = ...
) -> LayerStreamer: ...
@overload
def offload(
    pipe: None = ..., *, vram_budget: int | str = ..., device: Any = ..., call_timeout: float | None = ...
) -> LayerStreamer: ...
def offload(
    pipe: Any = None,
    *,
    vram_budget: int | str = "auto",
    device: torch.device | str | int | Device | None = None,
    call_timeout: float | None = None,
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

    Returns: a `LayerStreamer` (or, for a class or function, that, decorated).

    Raises, on entering:
        PipelineError: no pipeline, no module, or weights on the meta device.
        BudgetError: unparsable, not positive, larger than the device, or too small; with the least that works.
        DeviceError: the device does not exist.
        AlreadyOffloadedError: offloaded already, by layerstream, accelerate, diffusers or a device_map.
        CompiledWholeError: a component is compiled as a whole with `fullgraph=True`.
        HostMemoryError: the weights cannot be held in host memory.

    Raises, at once:
        ArgumentError: `call_timeout` is no number of seconds, or a decorator was given what cannot be called.
    """
    is_target = isinstance(pipe, type) or inspect.isfunction(pipe)
    streamer = LayerStreamer(
        None if is_target else pipe, vram_budget=vram_budget, device=device, call_timeout=call_timeout
    )
    return streamer(pipe) if is_target else streamer


def active(pipe: Any) -> LayerStreamer | None:
    """The streamer that streams components of this pipeline, module or dict now; None if there is none.

    layerstream.active(pipe).close()  # of a cell that was run twice
    """
    modules = modules_of(pipe)
    if not any(isinstance(module, nn.Module) for module in modules):
        modules = list(components_of(pipe).values())
    return next((owner for owner in owners_of(modules) if owner.is_active), None)


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
    some_components_of(pipe)
    reserve_bytes = None if reserve is None else parse_reserve(reserve)
    running = active(pipe)
    if running is not None:
        if vram_budget is None and device is None and reserve_bytes is None:
            return running.plan
        return running._plan_anew(vram_budget, device, reserve_bytes)
    found = _device_of(device)
    layouts = layouts_of(pipe)
    division = divide(layouts, is_preview=True)
    units = [unit.spec for unit in division.units]
    phases = [Phase((layout.name,), layout.is_repeated, reserve_bytes or 0, is_assumed=True) for layout in layouts]
    budget = _resolve("auto" if vram_budget is None else vram_budget, found)
    return make_plan(units, phases, budget, granularity=found.rounded_bytes(1), whole=division.whole())


def _device_of(device: torch.device | str | int | Device | None) -> Device:
    if isinstance(device, bool | type) or not isinstance(device, torch.device | str | int | Device | None):
        raise DeviceError(f'device {brief(device)} is not a device. Write "cuda", "cuda:1" or "cpu" (simulated).')
    if isinstance(device, Device):
        return device
    torch_device = find_device(device)
    if torch_device.type != "cpu":
        return CudaDevice(torch_device)
    from layerstream.device.simulated import SimulatedDevice  # beside a GPU nobody needs it

    return SimulatedDevice()


def _resolve(vram_budget: int | str, device: Device) -> int | None:
    return resolve_budget(
        vram_budget, free_bytes=device.allocated_bytes() + device.free_bytes(), total_bytes=device.total_bytes()
    )


def _checked_timeout(call_timeout: float | None) -> float | None:
    if call_timeout is None:
        return None
    is_number = isinstance(call_timeout, int | float) and not isinstance(call_timeout, bool)
    if not is_number or math.isnan(call_timeout) or call_timeout < 0:
        raise ArgumentError(
            f"call_timeout must be a number of seconds, or None to wait as long as it takes, not {brief(call_timeout)}."
        )
    return float(call_timeout)


def _names_of_modules(modules: Mapping[Any, Any]) -> set[str]:
    return {name for name, module in modules.items() if isinstance(module, nn.Module)}


def _touching(components: Mapping[str, nn.Module]) -> list[LayerStreamer]:
    """Who streams any of these, a part of one, or what one is a part of."""
    inside = {id(part) for component in components.values() for part in component.modules()}
    wholes = {id(uncompiled(component)) for component in components.values()}
    found = {}
    for module, owner in streamed_now():
        if id(module) in inside or any(id(part) in wholes for part in module.modules()):
            found[id(owner)] = owner
    return list(found.values())


def refuse_active(components: Mapping[str, nn.Module]) -> None:
    """Raise if one of these, or a part of one, streams already.

    Raises:
        AlreadyOffloadedError: names it and its streamer.
    """
    for name, component in components.items():
        for owner in _touching({name: component}):
            raise AlreadyOffloadedError(
                f"`{name}` is streamed by layerstream already ({owner!r}). Leave that context, or call its close(), "
                "before entering another. (`layerstream.active(pipe)` gives it, should you have lost it, and so does "
                "this error's `.streamer`.)",
                streamer=owner,
            )


def _warn_nothing_streams(components: Mapping[str, nn.Module]) -> None:
    warn(
        f"no block stacks found in {', '.join(f'`{n}` ({type(m).__name__})' for n, m in components.items())}: each "
        "component is on the device whole. Name its stacks: layerstream.register_adapter(cls, Adapter(stacks=[...])).",
    )
