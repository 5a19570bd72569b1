"""The engine between start and close: the one owner of what state each unit is in.

    unit                   bytes on the host       bytes on the device         its parameters are
    ---------------------  ----------------------  --------------------------  ---------------------------
    resident               home (not read)         a buffer of its own         bound to that buffer
    streamed, absent       home                    none                        absent: one NaN, loads if touched
    streamed, loading      home                    a copy into a slot queued   absent
    streamed, present      home                    a slot                      bound to the slot

`_use` is the way up (load, wait, bind), `_evict` the way down (write back, absent, vacate). A unit that is
present stays so until its slot is needed, so that hooks that users put on a block still see its weights after
ours have run; it is *held*, and never evicted, while its block runs.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from layerstream import compiled
from layerstream.absent import keep_out_of_graphs, nan_scalar
from layerstream.binding import BoundTensor
from layerstream.calls import RunningCalls
from layerstream.device import Device, engine_tensors
from layerstream.errors import BackwardError, LayerstreamWarning, StreamerStateError
from layerstream.host_store import HostStore, StoredUnit
from layerstream.intercept import Interception
from layerstream.order import OrderLearner
from layerstream.plan import Plan
from layerstream.stats import Stats
from layerstream.transfer import Slot, TransferEngine
from layerstream.units import ComponentLayout, Division, TensorPlace


class Streamer:
    """Streams the units of one pipeline as its plan says, from `open` to `close`.

    Args:
        layouts: the components, as adapters describe them.
        division: their units; the plan's placements are by its order.
    """

    def __init__(self, layouts: Sequence[ComponentLayout], division: Division, plan: Plan, device: Device) -> None:
        self.plan = plan
        self.stats = Stats()
        self.owner: object = None
        self.is_closed = False
        self._layouts = layouts
        self._units = division.units
        self._places = division.places
        self._stand_ins = division.stand_ins
        self._others = division.others
        self._device = device
        self._store = HostStore(device)
        self._stored: list[StoredUnit] = []
        self._transfer = TransferEngine(device, self._stored, [u.binding for u in self._units], self.stats)
        self._interception = Interception()
        self._calls = RunningCalls()
        self._moved_others: list[tuple[TensorPlace, torch.Tensor]] = []
        self._placed: list[int] = []
        # Units whose weights autograd may have saved; it must find out that they are gone.
        self._seen_grad: set[int] = set()
        # Touches may come from any thread, hooks from one; both end here.
        self._mutex = threading.RLock()
        streamed = [u.spec for u in self._units if not plan.is_resident(u.spec.index)]
        self._unit_of = {id(self._units[s.index].module): s.index for s in streamed}
        self._names = {id(layout.root): layout.name for layout in layouts}
        self._order = OrderLearner(
            [
                ([s.index for s in streamed if s.component == layout.name], layout.is_repeated)
                for layout in layouts
                if any(s.component == layout.name for s in streamed)
            ]
        )
        blocks = [u for u in self._units if u.spec.is_block]
        self.stats.num_streamed_blocks = sum(not plan.is_resident(u.spec.index) for u in blocks)
        self.stats.num_resident_blocks = len(blocks) - self.stats.num_streamed_blocks

    # ---- entering and leaving

    def open(self) -> None:
        """Start streaming. Whatever fails, the pipeline is as it was before the error leaves."""
        started = time.perf_counter()
        self._refuse_compiled_wholes()
        keep_out_of_graphs(compiled.compile_safe)
        try:
            with engine_tensors():
                for place, stand_in in self._stand_ins:
                    getattr(place.module, place.kind)[place.name] = stand_in
                nans = functools.cache(functools.partial(nan_scalar, device=self._device.torch_device))
                for unit in self._units:
                    self._stored.append(self._store.add(unit.binding))
                    unit.binding.prepare(unit.spec.index, nans, self.load_absent)
                self._store.pin()
                self._transfer.make_slots(self.plan.num_slots, self.plan.slot_bytes)
                for unit in self._units:
                    if self.plan.is_resident(unit.spec.index):
                        views = self._transfer.place(unit.spec.index)
                        self._placed.append(unit.spec.index)
                        unit.binding.present(views)
                    else:
                        unit.binding.absent()
                self._move_others()
                self._transfer.finish_placing()
            self._install_hooks()
            self._prefetch(held=[])
        except BaseException:
            self.close()
            raise
        self.stats.pinned_bytes = self._store.pinned_bytes
        self.stats.enter_s = time.perf_counter() - started

    def close(self) -> None:
        """Give everything back, from any state; what the device can no longer do is said, not raised.

        An interrupt while it waits for the device is raised once all is given back.
        """
        started = time.perf_counter()
        self._calls.check_thread()
        with self._mutex, engine_tensors(), contextlib.ExitStack() as afterwards:
            attempt = functools.partial(self._attempt, afterwards)
            self._interception.remove()
            attempt(self._write_back_everything, "copy back weights that were written while streaming")
            attempt(self._device.synchronize, "wait for the device")
            for place, original in self._moved_others:
                getattr(place.module, place.kind)[place.name] = original
            self._moved_others = []
            for unit in self._units:
                unit.binding.restore()
            for place, stand_in in self._stand_ins:
                if getattr(place.module, place.kind).get(place.name) is stand_in:
                    getattr(place.module, place.kind)[place.name] = place.tensor
            self._bring_home_replaced()
            attempt(self._transfer.close, "free device memory")
            attempt(self._store.close, "release page locks")
            attempt(self._device.empty_cache, "free cached device memory")
            self.stats.exit_s = time.perf_counter() - started
            self.is_closed = True

    def _refuse_compiled_wholes(self) -> None:
        for layout in self._streamed_layouts():
            compiled.refuse_fullgraph(layout.outermost, layout.name)

    def _streamed_layouts(self) -> list[ComponentLayout]:
        streamed = {u.spec.component for u in self._units if not self.plan.is_resident(u.spec.index)}
        return [layout for layout in self._layouts if layout.name in streamed]

    def _install_hooks(self) -> None:
        streamed = self._streamed_layouts()
        roots = {layout.name: layout.root for layout in streamed}
        for layout in streamed:
            if compiled.describe_compiled(layout.outermost) is not None:
                warnings.warn(
                    f"`{layout.name}` is compiled as a whole; while it streams, its blocks are compiled one by one "
                    "instead (the same code for all that are alike).",
                    LayerstreamWarning,
                    stacklevel=5,
                )
        outermost = {layout.name: layout.outermost for layout in streamed}
        blocks = {
            unit.module: outermost[unit.spec.component]
            for unit in self._units
            if unit.module is not None and not self.plan.is_resident(unit.spec.index)
        }
        self._interception.install(self, roots.values(), blocks)
        target = self._device.torch_device
        for layout in self._layouts:
            self._interception.guard_moves(layout.root, layout.name, target, is_streamed=layout.name in roots)
        for block in blocks:
            self._interception.guard_moves(
                block, self._units[self._unit_of[id(block)]].spec.name, target, is_streamed=True
            )

    def _move_others(self) -> None:
        """Bring tensors that are no plain bytes (subclasses, quantised) to the device whole, as new objects."""
        target = self._device.torch_device
        for place in self._others:
            if place.tensor.device != target:
                moved = place.tensor.to(target)
                if isinstance(place.tensor, nn.Parameter) and not isinstance(moved, nn.Parameter):
                    moved = nn.Parameter(moved, requires_grad=place.tensor.requires_grad)
                self._moved_others.append((place, place.tensor))
                getattr(place.module, place.kind)[place.name] = moved
        if self._others:
            names = sorted({type(place.tensor).__name__ for place in self._others})
            warnings.warn(
                f"{len(self._others)} weights of type {', '.join(names)} are no plain tensors; they stay on the device "
                "whole and outside the budget.",
                LayerstreamWarning,
                stacklevel=4,
            )

    def _write_back_everything(self) -> None:
        for unit in self._units:
            index = unit.spec.index
            slot = self._transfer.slot_of(index)
            if unit.binding.is_present and (index in self._placed or slot is not None):
                self._write_back(index, may_replace=True)
            if index in self._seen_grad:
                unit.binding.forbid_backward()
        self._seen_grad.clear()

    def _bring_home_replaced(self) -> None:
        """A tensor that code put in place of one of ours was made on the device; it belongs where that one was."""
        homes = {id(b.tensor): b.home_device for unit in self._units for b in unit.binding.tensors}
        for place in self._places:
            now = getattr(place.module, place.kind).get(place.name)
            if now is not None and now is not place.tensor and now.device == self._device.torch_device:
                home = homes.get(id(place.tensor), place.tensor.device)
                if now.device != home:
                    brought = now.detach().to(home)
                    is_parameter = isinstance(now, nn.Parameter)
                    getattr(place.module, place.kind)[place.name] = (
                        nn.Parameter(brought, requires_grad=now.requires_grad) if is_parameter else brought
                    )

    @staticmethod
    def _attempt(afterwards: contextlib.ExitStack, step: Callable[[], object], what: str) -> None:
        """Leaving must go on when the device has failed: the weights are on the host, and come back without it."""
        try:
            step()
        except Exception as exc:
            # Said at the end too: where warnings are errors, saying it raises.
            message = f"leaving the offload context could not {what}: {exc!r}"
            afterwards.callback(warnings.warn, message, LayerstreamWarning, stacklevel=6)
        except BaseException as exc:
            afterwards.callback(_raise, exc)

    # ---- what the hooks say

    def enter_root(self, root: nn.Module) -> None:
        """A component's forward begins."""
        name = self._names.get(id(root))
        if name is None:
            return  # a copy of a component, which carries the hook along
        compiled.refuse_fullgraph(root, name)
        with self._mutex:
            self._calls.enter(root, is_root=True)
            self._order.begin_pass()

    def leave_root(self, root: nn.Module) -> None:
        """A component's forward ended; the slots of its last blocks are free for what comes next."""
        with self._mutex:
            if self._calls.leave(root) and self._calls.is_idle:
                self._prefetch(held=[])

    def enter_block(self, block: nn.Module) -> None:
        """A streamed block is about to run: make its weights present, and start loading what follows."""
        unit = self._unit_of.get(id(block))
        if unit is None:
            return  # a copy of a block, which carries the hook along
        is_grad = _is_grad_enabled()  # of the caller: it is off in what follows
        with self._mutex, engine_tensors():
            self._calls.enter(block, is_root=False)
            self._use([unit], is_touch=False, is_grad=is_grad)

    def leave_block(self, block: nn.Module, output: Any) -> Any:
        """A streamed block ended. Returns an output to use instead, or None to keep it."""
        unit = self._unit_of.get(id(block))
        if unit is None:
            return None
        with self._mutex:
            if not self._calls.leave(block):
                return None
            slot = self._transfer.slot_of(unit)
            replaced = output if slot is None else _without_aliases(output, slot.buffer)
            if unit in self._seen_grad:
                _refuse_backward(replaced, self._units[unit].spec.name)
            return None if replaced is output else replaced

    def load_absent(self, units: Sequence[int]) -> None:
        """Something looks at weights that are not there: load these units, all present at once afterwards."""
        is_grad = _is_grad_enabled()
        with self._mutex, engine_tensors():
            self._calls.check_thread()
            self._use(units, is_touch=True, is_grad=is_grad)

    # ---- up and down

    def _use(self, units: Sequence[int], *, is_touch: bool, is_grad: bool) -> None:
        """Load what is missing, start loading what is expected next, wait, and bind."""
        held = [*units, *self._held()]
        self._drop_extra_slots(held)
        for unit in units:
            self._order.observe(unit)
            if self._transfer.slot_of(unit) is None:
                self.stats.num_demand_loads += 1
                self.stats.num_touch_loads += is_touch
                self._transfer.load(unit, self._make_room(held))
        # Before compute is told to wait: what is recorded on its stream after the wait, such as the last block's
        # release, happens after the wait, and the next load would start a round trip after this one ends.
        self._prefetch(held)
        for unit in units:
            views = self._transfer.wait(unit)
            if not self._units[unit].binding.is_present:
                # Code outside a call may keep, save or pickle what it sees (`state_dict`), which wants weights in
                # storages of their own, as a resident model has them. Inside a call the slot is what is there for it.
                is_outside = is_touch and self._calls.is_idle
                self._units[unit].binding.present([v.clone() for v in views] if is_outside else views)
            if is_grad and not is_touch:
                self._seen_grad.add(unit)

    def _held(self) -> list[int]:
        """Units that compute is reading, or may read without asking again."""
        loaded = [s.unit for s in self._transfer.slots if s.unit is not None]
        return [u for u in loaded if (m := self._units[u].module) is not None and self._calls.is_running(m)]

    def _prefetch(self, held: Sequence[int]) -> None:
        """Start loading the units expected next, as many as there are slots that nobody holds."""
        wanted = list(dict.fromkeys(held))
        num_slots = self.plan.num_slots
        for unit in self._order.predict(2 * num_slots):
            if len(wanted) >= num_slots:  # extra slots are not filled ahead
                break
            if unit not in wanted:
                wanted.append(unit)
        with engine_tensors():
            for unit in wanted:
                if self._transfer.slot_of(unit) is None:
                    slot = self._transfer.free_slot() or self._evict_one(keep=wanted)
                    if slot is None:
                        return
                    self._transfer.load(unit, slot)

    def _make_room(self, held: Sequence[int]) -> Slot:
        """A slot for a unit needed now. What is expected next is evicted only where nothing else can be, and what
        is held never: then there are more units in use at once than the plan has slots, and one is added."""
        slot = self._transfer.free_slot()
        if slot is None:
            ahead = self._order.predict(self.plan.num_slots)
            slot = self._evict_one(keep=[*held, *ahead[:1]]) or self._evict_one(keep=held)
        return slot or self._transfer.add_extra_slot()

    def _evict_one(self, keep: Sequence[int]) -> Slot | None:
        """Free the slot whose unit is needed last; None if all are to be kept."""
        candidates = [s for s in self._transfer.slots if s.unit is not None and s.unit not in keep and not s.is_extra]
        if not candidates:
            return None
        ahead = self._order.predict(4 * self.plan.num_slots)
        soon = {unit: position for position, unit in reversed(list(enumerate(ahead)))}
        slot = max(candidates, key=lambda s: soon.get(s.unit if s.unit is not None else -1, len(ahead)))
        return self._evict(slot)

    def _evict(self, slot: Slot) -> Slot:
        """Take a slot from its unit. Order matters: see the note in `device.py`."""
        unit = slot.unit
        assert unit is not None
        binding = self._units[unit].binding
        was_grad = unit in self._seen_grad
        if binding.is_present:
            self._write_back(unit, may_replace=False)
            if was_grad:
                binding.forbid_backward()
            self._forget_autocast()
            binding.absent()
        if was_grad:
            # Graphs hold the weights they saved; their backward is refused. (What else a forward keeps of its weights
            # under grad cannot be told from that.)
            slot.accept_references()
            self._seen_grad.discard(unit)
        elif slot.is_aliased():
            # Somebody else looks at the slot (`weight.detach()` kept by user code) and keeps the bytes.
            self._transfer.abandon(unit)
            slot = self._transfer.slot_of(unit) or slot
        self._transfer.vacate(unit)
        return slot

    def _drop_extra_slots(self, held: Sequence[int]) -> None:
        """Extra slots go as soon as nobody holds their unit; they are memory beyond the plan."""
        for slot in [s for s in self._transfer.slots if s.is_extra and s.unit not in held]:
            self._evict(slot)

    def _forget_autocast(self) -> None:
        """Autocast keeps a cast copy of every parameter until the region ends: the model would pile up."""
        if torch.is_autocast_cache_enabled() and torch.is_autocast_enabled(self._device.torch_device.type):
            torch.clear_autocast_cache()

    def _write_back(self, unit: int, *, may_replace: bool) -> None:
        """Keep what a forward wrote into the unit's tensors: the host bytes are what the next load reads."""
        for bound in self._units[unit].binding.written():
            now = bound.tensor.data
            if now.dtype == bound.dtype and tuple(now.shape) == bound.shape:
                self._device.copy_back(bound.master, now)
                if bound.home is not bound.master:
                    bound.home.copy_(bound.master)
                self.stats.num_written_back += 1
            elif may_replace:
                # A cast of a whole component: what the user made of it is what the user gets.
                bound.home, bound.is_exact = now.to(bound.home_device), True
            else:
                raise StreamerStateError(_changed(bound, now))


def _raise(error: BaseException) -> None:
    raise error


def _changed(bound: BoundTensor, now: torch.Tensor) -> str:
    return (
        f"`{bound.name}` was changed from {bound.dtype} {list(bound.shape)} to {now.dtype} {list(now.shape)} while it "
        "streams. Leave the offload context, change it, and enter again."
    )


def _is_grad_enabled() -> bool:
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def _without_aliases(output: Any, buffer: torch.Tensor) -> Any:
    """`output` with tensors that lie inside a slot replaced by copies; itself if there are none."""
    if isinstance(output, torch.Tensor):
        if output.layout is not torch.strided or not output.numel():
            return output
        start = buffer.data_ptr()
        with contextlib.suppress(RuntimeError):  # a tensor without storage (a subclass) cannot lie in a slot
            if start <= output.data_ptr() < start + buffer.numel():
                return output.clone()
        return output
    if type(output) in (tuple, list):
        items = [_without_aliases(item, buffer) for item in output]
        return output if all(a is b for a, b in zip(items, output, strict=True)) else type(output)(items)
    if type(output) is dict:
        values = {key: _without_aliases(item, buffer) for key, item in output.items()}
        return output if all(values[key] is output[key] for key in output) else values
    return output


def _tensors(output: Any) -> Iterable[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, dict):
        for item in output.values():
            yield from _tensors(item)


def _refuse_backward(output: Any, name: str) -> None:
    """Let a backward pass that reaches the block's output say what is wrong, before autograd says it in its words."""

    def refuse(gradient: torch.Tensor) -> None:
        raise BackwardError(
            f"a backward pass reached `{name}`, whose weights were streamed: their bytes have been replaced since the "
            "forward pass. Run under torch.no_grad() or torch.inference_mode(), or train without offloading."
        )

    for tensor in _tensors(output):
        if tensor.requires_grad and not tensor.is_leaf:
            tensor.register_hook(refuse)
