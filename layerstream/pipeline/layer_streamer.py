"""`LayerStreamer`, what `offload` returns."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn

from layerstream.device.base import Device
from layerstream.engine.homes import Elsewhere
from layerstream.engine.streamer import Streamer
from layerstream.errors import BudgetError, StreamerStateError, brief
from layerstream.hooks.compiled import uncompiled
from layerstream.hooks.intercept import refuse_rivals
from layerstream.host.ranks import HostRanks
from layerstream.interrupts import twice_if_interrupted
from layerstream.model.components import components_of, layouts_of, refuse_scripted, some_components_of
from layerstream.model.units import ComponentLayout
from layerstream.pipeline.changes import entries_of, merging_on
from layerstream.pipeline.decorating import decorated_target
from layerstream.pipeline.hold import Hold
from layerstream.pipeline.options import (
    Store,
    budget_bytes_on,
    checked_name,
    checked_packing,
    checked_pairing,
    checked_store,
    checked_timeout,
    device_of,
    helpers_of,
    keepers_of,
)
from layerstream.pipeline.owners import ENTERING, refuse_active, touching
from layerstream.pipeline.preview import plan_anew
from layerstream.pipeline.sharing import decorated_call, raise_instead
from layerstream.pipeline.telling import html_of, line_of, report_of, tell_entered, traced_to
from layerstream.planning.phase_plan import AssumedReserve
from layerstream.planning.plan import Plan
from layerstream.report import Report
from layerstream.saying import warn
from layerstream.stats import Stats

T = TypeVar("T", bound=Callable[..., Any])


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
        pairing: str = "off",
        packing: str = "off",
        store: Store = None,
        store_budget: int | str = "auto",
        shared_as: str | None = None,
        links: Store = None,
    ) -> None:
        self._pipe = pipe
        self._vram_budget = vram_budget
        self._device = device
        self._call_timeout = checked_timeout(call_timeout)
        self._pairing = checked_pairing(pairing)
        self._packing = checked_packing(packing)
        self._store, self._store_budget = checked_store(store), store_budget
        self._shared_as = checked_name(shared_as, store, packing)
        self._links = checked_store(links, name="links")
        self._streamer: Streamer | None = None
        self._last: Streamer | None = None  # what it did can be asked after it is closed
        self._hold = Hold(pipe)
        self.num_guests: int | None = None  # decorated calls that share it; None: nobody but its user ends it
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
            for owner in (self, *touching(some_components_of(self._pipe))):
                _wait_for_closing(owner._streamer)
            with ENTERING:
                if not any(_is_closing(o._streamer) for o in (self, *touching(some_components_of(self._pipe)))):
                    self._start()
                    return self

    def _start(self) -> None:
        if self.is_active:
            raise StreamerStateError(
                "this streamer is active already: `layerstream.active(pipe)` gives it, should you have lost it. Leave "
                "it (or call close()) before entering again."
            )
        self.close()  # of what ended by itself
        components = _components_to_stream(self._pipe)
        device = device_of(self._device)
        budget = budget_bytes_on(self._vram_budget, device)
        streamer = Streamer(
            functools.partial(layouts_of, self._pipe),
            device,
            budget,
            call_timeout=self._call_timeout,
            num_slots=self._num_slots,
            find_replaced=self._hold.find_replaced,
            let_go=functools.partial(self._hold.let_go_of_dropped, self),
            is_pairing=self._pairing == "auto",
            packing=self._packing,
            elsewhere=self._elsewhere(device),
        )
        layouts = layouts_of(self._pipe)
        _warn_if_nothing_streams(layouts, components)
        homes = {t.device for module in components.values() for t in module.parameters()}
        streamer.owner = self  # hooks keep the engine alive, the engine keeps us: dropped by its user, it can be closed
        self._streamer = streamer
        try:
            streamer.open(layouts)
            self._last = streamer
            self._hold.take(self, homes, device.torch_device)
        except BaseException:
            twice_if_interrupted(self.close)
            raise
        tell_entered(streamer)

    def _elsewhere(self, device: Device) -> Elsewhere:
        """Other GPUs and ranks that take part.

        Raises:
            ArgumentError, DeviceError, BudgetError: see `offload`.
        """
        keepers, is_all_stored = keepers_of(self._store, self._store_budget, device)
        ranks = None if self._shared_as is None else HostRanks()
        helpers = helpers_of(self._links, device)
        return Elsewhere(keepers, is_all_stored, ranks, self._shared_as or "", helpers)

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
                self._hold.unmark(self)
                self._hold.let_go()
                self._streamer = None  # last: interrupted before, all of it is done once more

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
        with self.pausing():
            yield

    # ---- what is told of pipelines and modules (`pipeline.owners.Owner`)

    @property
    def number(self) -> int:
        """In this order one waits for streamers, if for more than one."""
        return -1 if self._streamer is None else self._streamer.gate.number

    def using(self, what: str) -> contextlib.AbstractContextManager[object]:
        """A call of a pipeline that has some of the components: others wait meanwhile."""
        return contextlib.nullcontext() if self._streamer is None else self._streamer.gate.entered(what)

    @contextlib.contextmanager
    def pausing(self, component: str | None = None) -> Iterator[None]:
        """Components are about to be changed: pause one, and those that share weights with it, or all."""
        streamer = self._streamer
        if streamer is None or streamer.is_paused_here:
            yield
            return
        components = [uncompiled(m) for m in components_of(self._pipe).values()]
        try:
            with streamer.paused(component), merging_on(streamer.device.torch_device, components):
                self._hold.unwatch()
                del components
                yield
        finally:
            self._hold.unmark(self)
            if streamer.is_closed:
                self._streamer = None
                self._hold.let_go()
            else:
                self._hold.mark(self)

    def replacing(self, pipe: object, name: str, value: object) -> contextlib.AbstractContextManager[object]:
        """`value` is about to take the place of a component in `pipe`, or to become one."""
        return self._hold.replacing(self, pipe, name, value)

    @property
    def allows_rivals(self) -> bool:
        """Whether other offloaders may be switched on: streaming is paused."""
        return self._streamer is None or self._streamer.is_paused

    def watch_class(self, cls: type) -> None:
        """A pipeline of this class has taken some of the components."""
        self._hold.watch_class(cls)

    def reading(self, module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`state_dict()` of a module: the weights at home. Who writes to its entries later is found out."""
        streamer = self._streamer
        if streamer is None or (streamer.gate.is_inside and not streamer.is_idle):
            return original(*args, **kwargs)  # in the middle of this thread's own forward; others wait
        with self.paused():
            result = original(*args, **kwargs)
            entries = list(entries_of(result, module))
            streamer.edits.give(entries)
        streamer.edits.track(entries)
        return result

    def __enter__(self) -> LayerStreamer:
        return self.start()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            refused = self.explained(exc)
        finally:
            twice_if_interrupted(self.close)
        raise_instead(refused, exc, traceback)

    def explained(self, exc: BaseException | None) -> BudgetError | None:
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
        return decorated_target(target, functools.partial(decorated_call, self._pipe, self._for))

    def _for(self, pipe: Any) -> LayerStreamer:
        """A streamer with the same options."""
        inner = LayerStreamer(
            pipe,
            vram_budget=self._vram_budget,
            device=self._device,
            call_timeout=self._call_timeout,
            pairing=self._pairing,
            packing=self._packing,
            store=self._store,
            store_budget=self._store_budget,
            shared_as=self._shared_as,
            links=self._links,
        )
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
        return report_of(self._started("report"))

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
        with traced_to(path, self._streamer):
            yield

    def plan_anew(
        self,
        vram_budget: int | str | None,
        device: torch.device | str | int | Device | None,
        assumed: AssumedReserve | None,
    ) -> Plan:
        """The plan under other arguments; those that are None are as they are now."""
        return plan_anew(self._started("plan"), vram_budget, device, assumed)

    def _started(self, what: str) -> Streamer:
        if self._last is None:
            raise StreamerStateError(f"no {what} yet: the streamer was never started.")
        return self._last

    def __str__(self) -> str:
        return repr(self) if self._last is None else f"{self!r}\n{self._last.plan}"

    def __repr__(self) -> str:
        if self._last is None:
            return f"LayerStreamer(not started, vram_budget={brief(self._vram_budget)})"
        return line_of(self._last, is_active=self.is_active)

    def _repr_html_(self) -> str:
        if self._last is None:
            return f"<code>{escape(repr(self))}</code>"
        return html_of(self._last, repr(self))


def _is_closing(streamer: Streamer | None) -> bool:
    return streamer is not None and streamer.gate.is_closing


def _wait_for_closing(streamer: Streamer | None) -> None:
    """Where streaming is to end when a call ends, wait for that.

    Raises:
        StreamerStateError: it is this thread's own call.
    """
    if streamer is not None and streamer.gate.is_closing:
        if streamer.gate.is_inside:
            raise StreamerStateError(
                "streaming cannot begin in the middle of a call of this pipeline, at whose end it is to be closed: "
                "another thread has called close(). Begin when the call has returned."
            )
        with streamer.gate.entered("entering again"):
            pass


def _components_to_stream(pipe: Any) -> dict[str, nn.Module]:
    """The components by name, of which none streams already, by us or by others, and none is compiled by torch.jit."""
    components = {name: uncompiled(module) for name, module in some_components_of(pipe).items()}
    refuse_active(components)
    refuse_rivals(pipe, components)
    refuse_scripted(components)
    return components


def _warn_if_nothing_streams(layouts: Sequence[ComponentLayout], components: Mapping[str, nn.Module]) -> None:
    if not any(stack.blocks for layout in layouts for stack in layout.stacks):
        warn(
            f"no block stacks found in {', '.join(f'`{n}` ({type(m).__name__})' for n, m in components.items())}: each "
            "component is on the device whole. Name its stacks: layerstream.register_adapter(cls, "
            "Adapter(stacks=[...])).",
        )
