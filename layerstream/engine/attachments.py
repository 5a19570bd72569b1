"""Takes hold of components and lets go of them: host memory, page locks, absent tensors, hooks.

What is attached here has its bytes at home and streams nothing by itself; `streamer.py` moves it. Letting go gives back
every tensor, hook and page lock as it was found, and works from any state that attaching may have been left in.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from layerstream.blocks import UnitSpec, WholeSpec
from layerstream.budget import format_bytes
from layerstream.device.base import Device
from layerstream.errors import WeightsLostError
from layerstream.hooks import compiled
from layerstream.hooks.entrances import Entrance, EntranceFinder
from layerstream.hooks.intercept import Interception, Listener
from layerstream.host.home import RawHome, SharedHome
from layerstream.host.store import HostStore, Stretches
from layerstream.model.units import ComponentLayout, Division, TensorPlace, Unit, connected, part_of
from layerstream.progress import Progress
from layerstream.saying import warn
from layerstream.transfer.unit import StreamedUnit
from layerstream.weights.absent import AbsentClasses, Reading, nan_scalar
from layerstream.weights.binding import BoundTensor

Share = Callable[[Sequence[ComponentLayout], Sequence[Unit], Container[Unit]], Mapping[Unit, SharedHome]]


@dataclass(eq=False)
class Attachment:
    """Components that were attached together, because they share weights or stand alone, and what holds them.

    Attributes:
        units: indices of their units.
        whole_bytes: of weights that are no plain tensors, and are on the device as they are.
    """

    layouts: tuple[ComponentLayout, ...]
    division: Division
    store: HostStore
    interception: Interception = field(default_factory=Interception)
    units: list[StreamedUnit] = field(default_factory=list)
    moved_others: list[tuple[TensorPlace, torch.Tensor]] = field(default_factory=list)
    whole_bytes: int = 0

    @property
    def names(self) -> set[str]:
        return {layout.name for layout in self.layouts}


class Attachments:
    """Everything of one streamer's pipeline that is attached, and how to find it.

    Attributes:
        all: in the order of attaching.
        units: by index.
        units_of: by the id of their block.
        root_of: component by the id of its root, and of its compiled form.
        of_component: by the component's name.
        entrances: finds methods by which components are entered, and are not watched yet.
        records: of absent tensors, by their id.
        share: gives units of components homes that processes share: see `HostCopy.share`.
        make_raw: gives a unit a `RawHome`, at once.

    Args:
        reading: makes units present that something looks at, and keeps them so meanwhile.
        bring_home: copies home what was written to a unit on the device.
        mutex: of the streamer.
        number: of its gate.
        others: other GPUs that take part.
    """

    def __init__(
        self,
        device: Device,
        reading: Reading,
        bring_home: Callable[[StreamedUnit], object],
        mutex: threading.RLock,
        number: int,
        others: Sequence[Device] = (),
    ) -> None:
        self.all: list[Attachment] = []
        self.units: dict[int, StreamedUnit] = {}
        self.units_of: dict[int, tuple[StreamedUnit, ...]] = {}
        self.root_of: dict[int, str] = {}
        self.of_component: dict[str, Attachment] = {}
        self.entrances = EntranceFinder()
        self.share: Share = _share_nothing
        self.make_raw: Callable[[StreamedUnit], object] = lambda unit: None
        self._device = device
        self._others = others
        self._bring_home = bring_home
        self._mutex = mutex
        self._classes = AbsentClasses(reading, number, self._stand_in)
        self.records = self._classes.records
        self._uses: dict[str, list[StreamedUnit]] = {}  # units by component, and by the name of a part of one
        self._told: set[tuple[tuple[str, ...], int]] = set()
        self._told_eager: set[str] = set()
        self._indices: dict[str, int] = {}  # by name; a unit keeps its index when it is laid out anew

    def specs(self) -> list[UnitSpec]:
        """Of all units, component by component."""
        return [unit.spec for a in self.all for unit in a.units]

    def attach(
        self,
        layouts: Sequence[ComponentLayout],
        division: Division,
        listener: Listener,
        progress: Progress,
    ) -> list[tuple[StreamedUnit, list[BoundTensor]]]:
        """Take hold of components. Call under `engine_tensors`; what failed half-way can be detached.

        Args:
            division: of these components.
            listener: what the hooks call.

        Returns: of each unit the weights whose memory, as it was found, somebody else looks at.
        """
        self._uses.clear()
        stretches = Stretches(self._device, (b for unit in division.units for b in unit.binding.tensors))
        held: list[tuple[StreamedUnit, list[BoundTensor]]] = []
        looked_at = _looked_at(division)
        nans = functools.cache(functools.partial(nan_scalar, device=self._device.torch_device))
        for group in connected(layouts, division):
            part = division if len(group) == len(layouts) else part_of(division, group)
            attachment = Attachment(tuple(group), part, HostStore(self._device, stretches, self._others))
            self.all.append(attachment)
            for layout in attachment.layouts:
                self.of_component[layout.name] = attachment
            for place, stand_in in part.stand_ins:
                getattr(place.module, place.kind)[place.name] = stand_in
            shared = self.share(group, part.units, looked_at)
            for unit in part.units:
                unit.spec = replace(unit.spec, index=self._indices.setdefault(unit.spec.name, len(self._indices)))
                as_found = RawHome(self._device, [], 0)
                streamed = StreamedUnit(unit.spec, unit.binding, unit.called, as_found)
                attachment.units.append(streamed)  # first: what fails half-way is handed back
                self.units[streamed.index] = streamed
                if unit in looked_at:
                    held.append((streamed, looked_at[unit]))
                if unit in shared:
                    attachment.store.share(shared[unit])
                    streamed.home = shared[unit]
                    attachment.store.adopt(streamed.home, unit.binding, functools.partial(self.make_raw, streamed))
                    progress.add(unit.spec.num_bytes)  # it is page-locked, too
                else:
                    streamed.home = attachment.store.add(unit.binding)
                progress.add(unit.spec.num_bytes)
                unit.binding.prepare(streamed.index, nans, self._classes)
                for module in unit.called:
                    self.units_of[id(module)] = (*self.units_of.get(id(module), ()), streamed)
            attachment.store.pin(progress.add)
            for unit in part.units:
                unit.binding.absent()
            self._install_hooks(attachment, listener)
        return held

    def detach(
        self,
        attachments: Sequence[Attachment],
        forget_slots: Callable[[StreamedUnit], None],
        attempt: Callable[[Callable[[], object], str], None],
    ) -> None:
        """Let go of components whose written tensors are home. The device must be idle.

        Hooks come off last: a call that begins meanwhile waits at them, where without it would find weights absent, and
        others would go on to change under it.

        Args:
            forget_slots: takes a unit, whose tensors are at home again, out of its slot.
            attempt: runs a step that may fail without keeping the others from being taken.
        Raises:
            WeightsLostError: some could not be brought back from another GPU; after all the others were handed back.
        """
        lost: WeightsLostError | None = None
        for attachment in attachments:
            for place, original in attachment.moved_others:
                getattr(place.module, place.kind)[place.name] = original
            attachment.moved_others = []
            self._device.count_whole(-attachment.whole_bytes)
            attachment.whole_bytes = 0
            for unit in attachment.units:
                with self._device.homes():
                    lost = self._hand_back(unit) or lost
                attempt(functools.partial(forget_slots, unit), "free device memory")
            for place, stand_in in attachment.division.stand_ins:
                if getattr(place.module, place.kind).get(place.name) is stand_in:
                    getattr(place.module, place.kind)[place.name] = place.tensor
            self._bring_home_replaced(attachment)
            attachment.interception.remove()
            self.all.remove(attachment)
            for layout in attachment.layouts:
                self.of_component.pop(layout.name, None)
                self.root_of.pop(id(layout.root), None)
                self.root_of.pop(id(layout.outermost), None)
                self.entrances.forget(layout.name)
            attempt(attachment.store.close, "release page locks")
        self._uses.clear()
        gone = {unit for attachment in attachments for unit in attachment.units}
        self.units_of = {block: units for block, units in self.units_of.items() if not gone.intersection(units)}
        for unit in gone:
            self.units.pop(unit.index, None)
        if lost is not None:
            raise lost

    def _hand_back(self, unit: StreamedUnit) -> WeightsLostError | None:
        """Give a unit's tensors back; tried twice. Returns why they are lost, if so: the others are handed back all the
        same."""
        with contextlib.suppress(Exception):
            unit.hand_back()
            return None
        try:
            unit.hand_back()
            return None
        except Exception as error:  # of another GPU, or there is no memory
            unit.hand_back_lost()
            return error if isinstance(error, WeightsLostError) else _lost(unit, error)

    def stop_listening(self, block: nn.Module) -> None:
        """Take the hooks off a block that stays as it is for now."""
        self._interception_of(block).stop_listening(block)

    def listen_again(self, unit: StreamedUnit) -> None:
        """Put the hooks of a unit's block back."""
        for block in unit.called:
            self._interception_of(block).listen_again(block)

    def _interception_of(self, block: nn.Module) -> Interception:
        return self.of_component[self.units_of[id(block)][0].spec.component].interception

    def watch_entrance(self, entrance: Entrance, component: str, listener: Listener) -> None:
        """Tell the listener when this method is called from now on."""
        self.of_component[component].interception.watch_method(listener, entrance.owner, entrance.name)

    def units_of_component(self, component: str) -> Sequence[StreamedUnit]:
        """Units that a component uses, its own and those of others."""
        found = self._uses.get(component)
        if found is None:
            found = [u for u in self.units.values() if component in (u.spec.component, *u.spec.also)]
            self._uses[component] = found
        return found

    def units_below(self, owner: nn.Module) -> Sequence[StreamedUnit]:
        """Units of the modules in and below one, and of what its component has outside blocks."""
        component, path = self.entrances.modules[id(owner)]
        found = self._uses.get(f"{component}.{path}")
        if found is None:
            below = {unit for module in owner.modules() for unit in self.units_of.get(id(module), ())}
            found = [u for u in self.units_of_component(component) if u in below or not u.spec.is_block]
            self._uses[f"{component}.{path}"] = found
        return found

    # ---- inside

    def _install_hooks(self, attachment: Attachment, listener: Listener) -> None:
        blocks: dict[nn.Module, nn.Module] = {}
        roots = []
        for layout in attachment.layouts:
            own = [unit for unit in attachment.units if unit.spec.component == layout.name]
            streamed = [module for unit in own for module in unit.called]
            if compiled.describe_compiled(layout.outermost) is not None and streamed:
                warn(
                    f"`{layout.name}` is compiled as a whole; while it streams, its blocks are compiled one by one "
                    "instead (the same code for all that are alike).",
                )
            if streamed:
                roots.append(layout.root)
                blocks |= dict.fromkeys(streamed, layout.outermost)
                self.root_of[id(layout.root)] = layout.name
            elif is_hookable(layout):
                roots.append(layout.outermost)
                self.root_of[id(layout.outermost)] = layout.name
            self.root_of.setdefault(id(layout.root), layout.name)
        attachment.interception.install(listener, roots, blocks)
        for layout in attachment.layouts if listener.is_pairing else ():
            if layout.root in roots and layout.outermost is layout.root:
                around = functools.partial(listener.run_forward, layout.root)
                attachment.interception.watch_call(layout.root, "forward", around)
        names = ", ".join(f"`{name}`" for name in attachment.interception.eager)
        if names and names not in self._told_eager:
            self._told_eager.add(names)  # pausing attaches them again
            warn(
                f"{names} of `{attachment.layouts[0].name}` were given to torch.compile as functions around "
                "blocks that stream; while they do, these run uncompiled, as they were written. To compile the blocks, "
                "use `block.compile()` on each."
            )
        for layout in attachment.layouts:
            self.entrances.watch(layout.name, layout.modules())
            for entry_point in layout.entry_points:
                path, _, method = entry_point.rpartition(".")
                attachment.interception.watch_method(listener, layout.root.get_submodule(path), method)
            attachment.interception.guard_moves(
                listener,
                layout.modules(),
                layout.name,
                self._device.torch_device,
                is_named_apart=self._device.is_named_apart,
                at_home=self._stand_in,
            )

    def _stand_in(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A weight for code that only reads, such as a pickle: plain, over its bytes at home. The same one as long as
        anybody has it, so that ties stay; None: it is none of ours."""
        with self._mutex:  # what it is over must not be put elsewhere before somebody is known to have it
            return self._made_stand_in(tensor)

    def _made_stand_in(self, tensor: torch.Tensor) -> torch.Tensor | None:
        record = self.records.get(id(tensor))
        if record is None:
            return None
        unit = self.units.get(record.unit)
        bound = None if unit is None else next((b for b in unit.binding.tensors if b.tensor is tensor), None)
        if unit is None or bound is None:
            return None
        stand_in = bound.stand_in() if bound.stand_in is not None else None
        if stand_in is None:
            self._bring_home(unit)
            # What is gathered lies in one storage with tensors of other types, which cannot be pickled.
            home = bound.home if bound.is_exact else bound.home.clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            stand_in = nn.Parameter(home, requires_grad=bound.requires_grad) if is_parameter else home.detach()
            bound.stand_in = weakref.ref(stand_in)
        return stand_in

    def move_others(self, device_memory: Callable[[Callable[[], object]], object]) -> None:
        """Bring tensors that are no plain bytes (subclasses, quantised) to the device whole, as new objects.

        Args:
            device_memory: runs what takes device memory, and says what it means if that is refused.
        """
        target = self._device.torch_device
        for attachment in self.all:
            for place in [p for places in attachment.division.others.values() for p in places]:
                now = getattr(place.module, place.kind).get(place.name)
                if now is place.tensor and now.device != target:
                    device_memory(functools.partial(self._move_other, attachment, place))
            whole = attachment.division.whole()
            num_bytes = sum(spec.num_bytes for spec in whole)
            if num_bytes != attachment.whole_bytes:
                device_memory(functools.partial(self._device.count_whole, num_bytes - attachment.whole_bytes))
                attachment.whole_bytes = num_bytes
                self._tell(whole, num_bytes)

    def _tell(self, whole: Sequence[WholeSpec], num_bytes: int) -> None:
        kinds = tuple(sorted({kind for spec in whole for kind in spec.kinds}))
        if (kinds, num_bytes) not in self._told:  # pausing attaches them again
            self._told.add((kinds, num_bytes))
            warn(
                f"{sum(spec.num_tensors for spec in whole)} weights of type {', '.join(kinds)} "
                f"({format_bytes(num_bytes)}) are no plain tensors: they do not stream, and stay on the device whole, "
                "within the budget. Load the model without quantisation to have all of it streamed.",
            )

    def _move_other(self, attachment: Attachment, place: TensorPlace) -> None:
        moved = place.tensor.to(self._device.torch_device)
        if isinstance(place.tensor, nn.Parameter) and not isinstance(moved, nn.Parameter):
            moved = nn.Parameter(moved, requires_grad=place.tensor.requires_grad)
        attachment.moved_others.append((place, place.tensor))
        getattr(place.module, place.kind)[place.name] = moved

    @property
    def whole_bytes(self) -> int:
        """Of what was brought to the device whole."""
        return sum(attachment.whole_bytes for attachment in self.all)

    @property
    def locked_bytes(self) -> int:
        """Of host memory that is page-locked for units."""
        return sum(unit.home.locked_bytes for attachment in self.all for unit in attachment.units)

    def _bring_home_replaced(self, attachment: Attachment) -> None:
        """A tensor that code put in place of one of ours was made on the device; it belongs where that one was."""
        homes = {id(b.tensor): b.home_device for unit in attachment.division.units for b in unit.binding.tensors}
        for place in attachment.division.places:
            now = getattr(place.module, place.kind).get(place.name)
            if now is not None and now is not place.tensor and now.device == self._device.torch_device:
                home = homes.get(id(place.tensor), place.tensor.device)
                if now.device != home:
                    brought = now.detach().to(home)
                    is_parameter = isinstance(now, nn.Parameter)
                    getattr(place.module, place.kind)[place.name] = (
                        nn.Parameter(brought, requires_grad=now.requires_grad) if is_parameter else brought
                    )


def is_hookable(layout: ComponentLayout) -> bool:
    """Whether hooks around the component run. They do not inside code that was compiled for the whole of it; where
    there are blocks, these are compiled instead, and a separate compiled module has hooks of its own."""
    has_blocks = any(stack.blocks for stack in layout.stacks)
    return has_blocks or layout.outermost is not layout.root or compiled.describe_compiled(layout.root) is None


def _looked_at(division: Division) -> dict[Unit, list[BoundTensor]]:
    """Of each unit the weights whose memory somebody else looks at. Asked for all units before the first of them moves:
    those that lie in one storage, as in a file or tied by their `.data`, do not count as somebody else."""
    bounds = [bound for unit in division.units for bound in unit.binding.tensors if bound.num_bytes]
    sharing = Counter(map(_storage_of, bounds))
    held = {bound for bound in bounds if bound.is_held_elsewhere(sharing[_storage_of(bound)])}
    found = {unit: [bound for bound in unit.binding.tensors if bound in held] for unit in division.units}
    return {unit: some for unit, some in found.items() if some}


def _storage_of(bound: BoundTensor) -> tuple[torch.device, int]:
    return bound.home_device, bound.home.untyped_storage().data_ptr()


def _share_nothing(
    layouts: Sequence[ComponentLayout], units: Sequence[Unit], looked_at: Container[Unit]
) -> Mapping[Unit, SharedHome]:
    return {}


def _lost(unit: StreamedUnit, error: Exception) -> WeightsLostError:
    lost = WeightsLostError(
        f"weights of `{unit.spec.name}` could not be brought back: {error!r}. Load the pipeline anew."
    )
    lost.__cause__ = error
    return lost
