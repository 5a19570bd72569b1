"""Points a unit's parameters and buffers at device memory, and puts them back. The only writer of `.data`.

Copies nothing and knows no stream. A bound tensor stays the user's own object throughout; only what it points
at changes: its *home* (host memory, where it was found), a view of a slot, or a placeholder when absent.
"""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from layerstream.torch_private import without_subclasses
from layerstream.weights.absent import AbsentClasses, AbsentRecord, make_absent, make_present, switch
from layerstream.weights.references import is_held

_DATA_PTR, _VERSION = torch.Tensor.data_ptr, operator.attrgetter("_version")


class BoundTensor:
    """One parameter or buffer of a unit, made while it is at home.

    Attributes:
        tensor: the user's object, shared by every place that is tied to it.
        shape, dtype, strides: as it appears on the device (strides in elements; those that `.to(device)` gives).
        is_exact: at exit `home` is handed back itself; else its values, in memory of their own.
        writer: a module whose forward writes it without counting a version, while it is in training mode.
        stand_in: a plain tensor over its bytes at home that somebody has been given instead.
    """

    def __init__(self, name: str, tensor: torch.Tensor, writer: nn.Module | None = None) -> None:
        home = tensor.data
        self.name, self.tensor, self.writer = name, tensor, writer
        self.shape, self.dtype, self.home_device = tuple(home.shape), home.dtype, home.device
        # What `.to(device)` would make of it: a dense tensor keeps its strides, another is packed in the same order.
        self.strides = torch.empty_like(home, device="meta").stride()
        self.num_bytes = home.numel() * home.element_size()
        self.is_exact = True
        self.stand_in: weakref.ref[torch.Tensor] | None = None
        self._home: torch.Tensor | None = home
        self._master: torch.Tensor | None = home
        self._bring: Callable[[], object] | None = None  # brings both, which are in another form

    @property
    def home(self) -> torch.Tensor:
        """A plain tensor over the bytes as they were found, or over the host store's copy of them."""
        while (home := self._home) is None:  # another thread may bring it, or let it go again, at any time
            self._brought()
        return home

    @property
    def master(self) -> torch.Tensor:
        """The host bytes that copies to the device come from; `home` itself unless both are kept."""
        while (master := self._master) is None:
            self._brought()
        return master

    @property
    def has_one_home(self) -> bool:
        """Whether what is copied to the device is what is handed back."""
        return self._home is self._master

    def put_away(self, bring: Callable[[], object]) -> None:
        """Its bytes are let go of here; `bring` makes them anew, and calls `copied_to`, unless another thread has."""
        self._bring = bring  # first: whoever finds no bytes asks it
        self._home = self._master = None

    def hand_back_instead(self, home: torch.Tensor) -> None:
        """Hand back this in place of what was found."""
        self._home, self.is_exact = home, True

    def _brought(self) -> None:
        bring = self._bring
        if bring is not None:
            bring()

    @property
    def requires_grad(self) -> bool:
        """Asked without asking the tensor, which may be absent."""
        with without_subclasses():
            return self.tensor.requires_grad

    @property
    def is_dense(self) -> bool:
        """Whether its bytes are one range of memory, in the strides they have on the device."""
        return self.home.stride() == self.strides

    def is_held_elsewhere(self, num_sharing: int = 1) -> bool:
        """Whether anything but so many of our parameters, this one among them, and our views of their homes, looks at
        its storage; asked before their bytes are moved."""
        return is_held(self.home, num_own=2 * num_sharing)

    def has_form_of(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has the dtype, shape and strides in which it is laid out."""
        return (tensor.dtype, tuple(tensor.shape), tensor.stride()) == (self.dtype, self.shape, self.strides)

    def copied_to(self, master: torch.Tensor, *, keeps_home: bool, is_handed_back: bool) -> None:
        """Its bytes are at `master` from now on; see `UnitBinding.rehome`."""
        self._master = master
        if not keeps_home:
            self._home, self.is_exact = master, is_handed_back
        if self._home is not None:
            self._bring = None


@dataclass(eq=False)
class UnitBinding:
    """All tensors of one unit, bound and made absent together.

    Attributes:
        is_present: their bytes are where they point.
        is_guarded: present, and whoever looks at them is noticed.
        statistics: running statistics, whose writes no version counts.
    """

    tensors: list[BoundTensor]
    is_present: bool = True
    is_guarded: bool = False
    statistics: list[BoundTensor] = field(default_factory=list)
    _objects: list[torch.Tensor] = field(default_factory=list)
    _placeholders: list[torch.Tensor] = field(default_factory=list)
    _plain: list[type[torch.Tensor]] = field(default_factory=list)
    _absent: list[type[torch.Tensor]] = field(default_factory=list)
    _absent_addresses: list[int] = field(default_factory=list)  # of the placeholders
    _classes: AbsentClasses | None = None
    _versions: list[int] = field(default_factory=list)  # when they were bound, and where
    _addresses: list[int] = field(default_factory=list)

    def rehome(self, bound: BoundTensor, master: torch.Tensor, *, keeps_home: bool, is_handed_back: bool) -> None:
        """Its bytes were copied to `master`. The memory they came from is let go unless it `keeps_home`; then `master`
        itself is handed back, or its values in memory of their own."""
        bound.copied_to(master, keeps_home=keeps_home, is_handed_back=is_handed_back)
        if not keeps_home:
            bound.tensor.data = master

    def prepare(self, unit: int, nans: Callable[[torch.dtype], torch.Tensor], classes: AbsentClasses) -> None:
        """Make what `absent` needs, once: it must not allocate later. `nans` gives the scalar of a dtype."""
        self._objects = [bound.tensor for bound in self.tensors]
        self._plain = [type(tensor) for tensor in self._objects]
        self._absent = [classes.of(tensor) for tensor in self._objects]
        self._classes = classes
        self.statistics = [bound for bound in self.tensors if bound.writer is not None]
        for bound in self.tensors:
            self._placeholders.append(nans(bound.dtype).expand(bound.shape))
            self._absent_addresses.append(self._placeholders[-1].data_ptr())
            classes.records[id(bound.tensor)] = AbsentRecord(bound.name, unit, bound.strides)

    def present(self, views: Sequence[torch.Tensor]) -> None:
        """Point every tensor at its view, in the order of `tensors`."""
        make_present(self._objects, views, self._plain)
        self._versions = list(map(_VERSION, self._objects))
        self._addresses = list(map(_DATA_PTR, views))
        self.is_present, self.is_guarded = True, False

    def absent(self) -> None:
        """Let go of the bytes. What the tensors pointed at may be overwritten from now on."""
        if self.is_guarded:
            self.unguard()
        self.is_present = False  # first: interrupted half-way, the unit is bound anew at its next use
        make_absent(self._objects, self._placeholders, self._absent)

    def guard(self) -> None:
        """Notice who looks at them from now on; their bytes stay."""
        self.is_guarded = True
        switch(self._objects, self._absent)

    def unguard(self) -> None:
        """Let everybody look."""
        switch(self._objects, self._plain)
        self.is_guarded = False

    def is_changed(self) -> bool:
        """Whether any was written in place, or pointed elsewhere, since they were bound. They are not guarded."""
        # One call in place of one for each tensor: this is asked whenever a unit leaves its slot.
        objects = self._objects
        return list(map(_VERSION, objects)) != self._versions or list(map(_DATA_PTR, objects)) != self._addresses

    def written(self) -> list[BoundTensor]:
        """Tensors that were written in place, or pointed elsewhere, since they were bound. They are not guarded."""
        if not self.is_changed():
            return []
        return [
            bound
            for bound, version, address in zip(self.tensors, self._versions, self._addresses, strict=True)
            if bound.tensor._version != version or bound.tensor.data_ptr() != address
        ]

    def is_changed_while_absent(self) -> bool:
        """Whether a tensor was given other memory behind its absent class' back: `set_` asks no class. Call under
        `DisableTorchFunctionSubclass`."""
        return list(map(_DATA_PTR, self._objects)) != self._absent_addresses

    def is_moved_while_guarded(self) -> bool:
        """Whether a tensor that is present and guarded was given other memory: see `is_changed_while_absent`."""
        return self.is_present and self.is_guarded and list(map(_DATA_PTR, self._objects)) != self._addresses

    def changed_while_absent(self) -> list[BoundTensor]:
        """Those of which `is_changed_while_absent` tells."""
        if len(self._placeholders) != len(self.tensors):  # it is not streamed yet, or no longer
            return []
        with without_subclasses():
            addresses = list(map(_DATA_PTR, self._objects))
        there = zip(self.tensors, addresses, self._absent_addresses, strict=True)
        return [bound for bound, address, absent in there if address != absent]

    def absent_again(self, bounds: Collection[BoundTensor]) -> None:
        """Let go of what these were given, be they absent, present, or neither after an interrupt."""
        for bound, cls, placeholder in zip(self.tensors, self._absent, self._placeholders, strict=True):
            if bound in bounds:
                with without_subclasses():
                    make_absent([bound.tensor], [placeholder], [cls])

    def uncounted(self) -> list[BoundTensor]:
        """Running statistics of modules in training mode: whether they were written, only their bytes tell."""
        return [bound for bound in self.statistics if bound.writer is not None and bound.writer.training]

    def replaced(self) -> list[BoundTensor]:
        """Tensors that were pointed at other memory (`weight.data = other`) since they were bound. They are not
        guarded."""
        return [
            bound
            for bound, address in zip(self.tensors, self._addresses, strict=True)
            if bound.tensor.data_ptr() != address
        ]

    def forbid_backward(self) -> None:
        """Make autograd refuse what it saved of these weights: their bytes are about to change."""
        for bound in self.tensors:
            # Buffers too: indexing saves its indices.
            torch.autograd.graph.increment_version(bound.tensor)

    def restore(self, value: Callable[[BoundTensor], torch.Tensor]) -> None:
        """Hand every tensor what `value` gives for it."""
        for position, bound in enumerate(self.tensors):
            home = value(bound)
            if self._plain:
                bound.tensor.__class__ = self._plain[position]
            bound.tensor.data = home
            if self._classes is not None:
                self._classes.records.pop(id(bound.tensor), None)
        self.is_present, self.is_guarded = True, False
        self._objects, self._placeholders, self._plain, self._absent, self._classes = [], [], [], [], None
        self._absent_addresses = []


@contextlib.contextmanager
def lent_to(device: torch.device, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Inside, the bytes of these tensors are on `device`; afterwards they are back, changed or not, where they were."""
    homes = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, home in homes:
            tensor.data = home.to(device)
        yield
    finally:
        for tensor, home in homes:
            now = tensor.data
            if now.device == device and now.shape == home.shape and now.dtype == home.dtype:
                home.copy_(now)
                now = home
            tensor.data = now.to(home.device)
