"""Where a unit's bytes lie in host memory: in place by the safe rule, else gathered; locked and counted (15)."""

from __future__ import annotations

import contextlib
import gc
import re
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from layerstream.blocks import ALIGNMENT_BYTES
from layerstream.device.simulated import SimulatedDevice
from layerstream.errors import HostMemoryError, LayerstreamWarning
from layerstream.host import home, page_locks
from layerstream.host import memory as host_memory
from layerstream.host import store as host_store
from layerstream.host.home import RawHome, Segment, handed_back
from layerstream.host.memory import PAGE_BYTES, MemoryMaps, PageMapping
from layerstream.host.store import IN_PLACE_LEAST_BYTES, HostStore, Stretches
from layerstream.weights.binding import BoundTensor, UnitBinding

MIB = 2**20
LARGE = 3 * MIB // 4  # floats: 3 MiB


class Stored:
    """Tensors as one unit of a pinned store."""

    def __init__(self, *tensors: torch.Tensor, device: SimulatedDevice | None = None, is_pinned: bool = True) -> None:
        self.device = device or SimulatedDevice(copies="late", is_poisoned=True)
        self.values = [t.detach().clone() for t in tensors]
        self.came_with = [span_of(t) for t in tensors]
        self.binding = UnitBinding([BoundTensor(f"t{i}", t) for i, t in enumerate(tensors)])
        self.store = HostStore(self.device, Stretches(self.device, self.binding.tensors))
        self.unit: RawHome = self.store.add(self.binding)
        if is_pinned:
            self.store.pin()

    def is_in_place(self, number: int = 0) -> bool:
        """Whether all copies of a tensor come from the memory it came with."""
        start, end = self.came_with[number]
        sources = [span_of(s.source) for s in self.unit.segments]
        return sum(min(e, end) - max(s, start) for s, e in sources if s < end and start < e) == end - start

    def is_registered(self, number: int = 0) -> bool:
        """Whether the memory a tensor came with is page-locked."""
        return covered(self.device, *self.came_with[number])

    def check(self) -> None:
        """Copy the unit into a slot: right values, the strides of the device, each tensor aligned."""
        slot = self.device.allocate(self.unit.device_bytes)
        pieces = [(slot[s.offset : s.offset + s.source.numel()], s.source) for s in self.unit.segments]
        self.device.wait(self.device.compute_stream(), self.device.copy(pieces, []))
        views = self.unit.views(self.binding, slot)
        for view, bound, value in zip(views, self.binding.tensors, self.values, strict=True):
            assert view.dtype is bound.dtype
            assert (tuple(view.shape), view.stride()) == (bound.shape, bound.strides)
            assert same_bytes(view, value)
            assert not view.numel() or view.data_ptr() % ALIGNMENT_BYTES == 0
        self.device.free(slot)

    def close(self) -> None:
        self.device.synchronize()
        self.store.close()
        self.binding.restore(handed_back)


def apart(num_floats: int) -> torch.Tensor:
    """Random floats that have their pages to themselves, as a large tensor has that malloc mapped by itself."""
    return PageMapping(num_floats * 4).cut(0, num_floats * 4).view(torch.float32).normal_()


def on_a_heap(num_floats: int) -> torch.Tensor:
    """Random floats among strangers: glibc keeps what is smaller than the largest block it ever freed on its heap."""
    torch.empty(31 * MIB, dtype=torch.uint8).add_(1)
    tensor = torch.randn(num_floats)
    assert tensor.nbytes > 31 * MIB or host_memory._chunk(tensor.untyped_storage()) is None
    return tensor


def mapped_by_malloc(num_bytes: int) -> torch.Tensor:
    """Memory that glibc mapped for one request alone: with more than 32 MiB that is so once its heap has no room."""
    tries = []
    while not tries or host_memory._chunk(tries[-1].untyped_storage()) is None:
        tries.append(torch.empty(num_bytes, dtype=torch.uint8))
    return tries[-1]


def span_of(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


def covered(device: SimulatedDevice, start: int, end: int) -> bool:
    """Whether registrations cover [start, end) without a gap."""
    for first, num_bytes in sorted(device.registered.items()):
        if first <= start < first + num_bytes:
            start = first + num_bytes
    return start >= end


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


@pytest.fixture(autouse=True)
def no_locks_left() -> Iterator[None]:
    """Every store of a test that closed what it opened has left its device without registrations."""
    yield
    gc.collect()
    assert [len(locks) for locks in page_locks._BY_SIMULATED_DEVICE.values() if len(locks)] == []


# ---- the safe rule


def test_large_private_memory_stays_and_is_registered() -> None:
    parameter = nn.Parameter(apart(LARGE))
    address = parameter.data_ptr()
    stored = Stored(parameter)
    assert parameter.data_ptr() == address
    assert stored.is_in_place()
    assert stored.is_registered()
    assert stored.store.pinned_bytes == stored.unit.wire_bytes == parameter.nbytes
    assert stored.store.unpinned_bytes == 0
    stored.check()
    stored.close()
    assert parameter.data_ptr() == address
    assert stored.device.registered == {}


@pytest.mark.parametrize(("num_bytes", "stays"), [(IN_PLACE_LEAST_BYTES, True), (IN_PLACE_LEAST_BYTES - 4, False)])
def test_the_least_that_stays(num_bytes: int, stays: bool) -> None:
    parameter = nn.Parameter(apart(num_bytes // 4))
    stored = Stored(parameter)
    assert stored.is_in_place() is stays
    stored.check()
    stored.close()


def test_small_tensors_travel_together() -> None:
    tensors = [
        torch.randn(5),
        torch.arange(7),
        torch.tensor(1.5),
        torch.randn(2, 3).to(torch.bfloat16),
        torch.tensor([True]),
    ]
    stored = Stored(*tensors)
    assert len(stored.unit.segments) == 1
    (segment,) = stored.unit.segments
    assert segment.is_pinned
    assert segment.source.data_ptr() % PAGE_BYTES == 0
    assert covered(stored.device, *span_of(segment.source))
    assert segment.source.numel() <= stored.unit.device_bytes == len(tensors) * ALIGNMENT_BYTES
    stored.check()
    stored.close()


def test_small_and_large_in_one_unit() -> None:
    large, other = nn.Parameter(apart(LARGE)), nn.Parameter(apart(LARGE))
    small = [nn.Parameter(torch.randn(n)) for n in (3, 1000)]
    stored = Stored(small[0], large, small[1], other)
    assert [stored.is_in_place(n) for n in range(4)] == [False, True, False, True]
    assert len(stored.unit.segments) == 3
    stored.check()
    stored.close()


def test_nothing_to_store() -> None:
    for tensors in ((), (torch.empty(0, 3), nn.Parameter(torch.empty(0)))):
        stored = Stored(*tensors)
        assert (stored.unit.device_bytes, stored.unit.segments, stored.store.pinned_bytes) == (0, [], 0)
        stored.check()
        stored.close()


# ---- memory that must not be written, or not locked where it lies


@pytest.fixture
def floats_file(tmp_path: Path) -> Path:
    path = tmp_path / "floats.bin"
    torch.arange(LARGE, dtype=torch.float32).numpy().tofile(path)
    return path


def file_of(folder: Path, *num_floats: int) -> list[torch.Tensor]:
    """Tensors of so many floats each that lie behind each other in a private mapping of a file, as safetensors'."""
    path = folder / "several.bin"
    torch.randn(sum(num_floats)).numpy().tofile(path)
    return list(mapped(path, "c").split(num_floats))


def mapped(path: Path, mode: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the array is not writable
        return torch.from_numpy(np.memmap(path, dtype=np.float32, mode=mode))  # type: ignore[call-overload]


@pytest.mark.parametrize(("mode", "stays"), [("r", False), ("r+", False), ("c", True)])
def test_mapped_files(floats_file: Path, mode: str, stays: bool) -> None:
    """Read-only (`r--s`) and shared (`rw-s`) mappings are gathered; a private one (`rw-p`) stays and is touched."""
    before = (floats_file.read_bytes(), floats_file.stat().st_mtime_ns)
    tensor = mapped(floats_file, mode)
    stored = Stored(tensor)
    assert stored.is_in_place() is stays
    assert stored.is_registered() is stays
    assert all(s.is_pinned for s in stored.unit.segments)
    stored.check()
    stored.close()
    assert torch.equal(tensor, torch.arange(LARGE, dtype=torch.float32))
    assert (floats_file.read_bytes(), floats_file.stat().st_mtime_ns) == before


def load_all(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def open_each(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping


def anonymous_bytes(start: int, end: int) -> int:
    """How many bytes of the mappings that touch [start, end) are no longer pages of a file."""
    total, is_inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(g, 16) for g in match.groups())
            is_inside = first < end and start < last
        elif is_inside and line.startswith("Anonymous:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.parametrize("load", [load_all, open_each])
def test_safetensors_stay_where_they_are_mapped(
    tmp_path: Path, load: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    # An odd small tensor first, so that the large ones start in the middle of a page.
    save_file({"a": torch.randn(7), "b": torch.randn(LARGE), "c": torch.randn(3), "d": torch.randn(LARGE)}, path)
    on_disk = path.read_bytes()
    tensors = {name: nn.Parameter(t) for name, t in load(path).items()}
    assert tensors["b"].data_ptr() % PAGE_BYTES != 0
    addresses = {name: t.data_ptr() for name, t in tensors.items()}
    stored = Stored(*tensors.values())
    assert [stored.is_in_place(n) for n in range(4)] == [False, True, False, True]
    assert stored.is_registered(1)
    assert stored.is_registered(3)
    start, end = span_of(tensors["b"])
    assert anonymous_bytes(start, end) >= end - start, "touched, so that registering is fast"
    stored.check()
    stored.close()
    assert {tensors[n].data_ptr() == addresses[n] for n in "bd"} == {True}
    assert path.read_bytes() == on_disk
    for name, tensor in load(path).items():
        assert torch.equal(tensor, tensors[name])


# ---- layouts


def large_layouts() -> dict[str, torch.Tensor]:
    base = apart(LARGE + LARGE // 8).copy_(torch.arange(LARGE + LARGE // 8))
    return {
        "transposed": base[:LARGE].view(1024, -1).t(),
        "channels_last": base[:LARGE].view(4, 64, 64, -1).permute(0, 3, 1, 2),
        "view of a bigger storage": base[1001 : 1001 + LARGE],
        "rows of a bigger storage": base.view(9, -1)[1:8],
        "part of a much bigger storage": apart(4 * LARGE)[1001 : 1001 + LARGE],
        "columns": base[:LARGE].view(1024, -1)[:, 10:760],
        "every other row": base[:LARGE].view(1024, -1)[::2],
        "expanded": base[:1024].view(1024, 1).expand(1024, 768),
        "expanded rows": base[:768].expand(1024, 768),
        "overlapping": base[: LARGE + 1].as_strided((LARGE, 2), (1, 1)),
        "bf16": apart(LARGE // 2).view(torch.bfloat16),
        "odd length": PageMapping(2 * MIB + 3).cut(0, 2 * MIB + 3),
    }


@pytest.mark.parametrize("name", large_layouts())
def test_large_tensors_of_every_layout(name: str) -> None:
    tensor = large_layouts()[name]
    before = (tensor.data_ptr(), tensor.stride(), tensor.storage_offset(), tensor.untyped_storage()._cdata)
    stored = Stored(tensor)
    is_dense = name not in ("columns", "every other row", "expanded", "expanded rows", "overlapping")
    assert stored.is_in_place() is (is_dense and name != "part of a much bigger storage")
    stored.check()
    stored.close()
    assert (tensor.data_ptr(), tensor.stride(), tensor.storage_offset(), tensor.untyped_storage()._cdata) == before
    assert same_bytes(tensor, stored.values[0])


def test_small_tensors_of_every_layout() -> None:
    base = torch.arange(600, dtype=torch.float32)
    tensors = [
        base[:12].view(3, 4).t(),
        base[:96].view(2, 4, 4, 3).permute(0, 3, 1, 2),
        base.view(20, 30)[:, 3:9],
        base[:4].view(4, 1).expand(4, 5),
        base[7],
        torch.empty(0, 3),
        torch.arange(9, dtype=torch.uint8).view(3, 3).t(),
    ]
    stored = Stored(*tensors)
    stored.check()
    assert len(stored.unit.segments) == 1
    stored.close()
    for tensor, value in zip(tensors, stored.values, strict=True):
        assert torch.equal(tensor, value)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_dtypes(dtype: torch.dtype) -> None:
    small = (torch.arange(40, dtype=torch.uint8) % 2).view(dtype)
    large = (torch.arange(2 * MIB, dtype=torch.int64) % 2).to(torch.uint8).view(dtype)
    stored = Stored(torch.tensor(True), small, large)
    stored.check()
    stored.close()


# ---- tied


@pytest.mark.parametrize("size", [8, LARGE])
def test_two_parameters_over_one_storage_are_stored_once(size: int) -> None:
    first = nn.Parameter(apart(size))
    second = nn.Parameter(first.data)
    stored = Stored(first, second)
    assert stored.unit.offsets[0] == stored.unit.offsets[1]
    assert stored.unit.wire_bytes == first.nbytes
    stored.check()
    stored.close()
    assert first.data_ptr() == second.data_ptr()


def test_views_of_one_storage_that_differ_are_stored_apart() -> None:
    flat = torch.arange(2 * LARGE, dtype=torch.float32)
    stored = Stored(flat[:LARGE], flat[LARGE // 2 : LARGE // 2 + LARGE], flat[:LARGE].view(-1, 2))
    assert len(set(stored.unit.offsets)) == 3
    stored.check()
    stored.close()


# ---- letting the original go


def gathered_from(parameter: nn.Parameter) -> tuple[Stored, StorageWeakRef]:
    watch = StorageWeakRef(parameter.untyped_storage())
    return Stored(parameter), watch


def test_the_original_of_a_gathered_tensor_is_freed() -> None:
    parameter = nn.Parameter(torch.randn(1000))
    stored, original = gathered_from(parameter)
    assert original.expired()
    stored.check()
    stored.close()
    assert torch.equal(parameter, stored.values[0])
    assert parameter.untyped_storage().nbytes() == parameter.nbytes, "memory of its own, not a page of the buffer"


@pytest.mark.parametrize(
    "hold",
    [lambda p: p.data, lambda p: p.detach()[3:5], lambda p: p.untyped_storage(), lambda p: nn.Parameter(p.data)],
    ids=["data", "view", "storage", "parameter"],
)
def test_an_original_that_is_held_elsewhere_is_handed_back(hold: Callable[[nn.Parameter], object]) -> None:
    parameter = nn.Parameter(torch.randn(1000))
    address = parameter.data_ptr()
    held = hold(parameter)
    stored, original = gathered_from(parameter)
    assert not original.expired()
    stored.check()
    stored.close()
    assert parameter.data_ptr() == address, "still tied to what holds it"
    del held


def test_a_write_while_streaming_is_kept_in_the_gathered_bytes() -> None:
    parameter = nn.Parameter(torch.randn(1000))
    stored, _ = gathered_from(parameter)
    with torch.no_grad():
        stored.binding.tensors[0].master.fill_(4)
    stored.close()
    assert torch.equal(parameter, torch.full((1000,), 4.0))


def test_the_storage_of_a_tensor_in_place_is_held_while_it_is_registered() -> None:
    parameter = nn.Parameter(apart(LARGE))
    watch = StorageWeakRef(parameter.untyped_storage())
    stored = Stored(parameter)
    parameter.data = torch.empty(0)
    stored.binding.tensors.clear()
    del parameter
    gc.collect()
    assert not watch.expired(), "its pages are locked"
    stored.store.close()
    stored.unit.segments.clear()
    stored.unit.ranges.clear()
    gc.collect()
    assert watch.expired()


# ---- registrations


def test_registrations_are_whole_pages() -> None:
    stored = Stored(apart(LARGE + 5)[5:], torch.randn(3), on_a_heap(LARGE))
    for start, num_bytes in stored.device.registered.items():
        assert start % PAGE_BYTES == num_bytes % PAGE_BYTES == 0
    assert sum(stored.device.registered.values()) <= 2 * LARGE * 4 + 3 * PAGE_BYTES
    stored.check()
    stored.close()


def test_tensors_of_one_storage_are_one_registration() -> None:
    flat = apart(2 * LARGE)
    stored = Stored(flat[:LARGE], flat[LARGE:])
    assert [stored.is_in_place(n) for n in range(2)] == [True, True]
    assert len(stored.device.registered) == 1
    stored.check()
    stored.close()
    assert stored.device.registered == {}


def test_neighbours_of_one_unit_are_one_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its pages to itself, and the pages lie one behind the other."""
    pages = PageMapping(2 * LARGE * 4)
    halves = [pages.cut(at, LARGE * 4).view(torch.float32) for at in (0, LARGE * 4)]
    start, middle, end = pages.range[0], pages.range[0] + LARGE * 4, pages.range[1]
    stretches = {span_of(half): span for half, span in zip(halves, ((start, middle), (middle, end)), strict=True)}
    monkeypatch.setattr(MemoryMaps, "stretch", lambda maps, tensor: stretches[span_of(tensor)])
    stored = Stored(*halves)
    assert stored.device.registered == {start: end - start}
    stored.check()
    stored.close()


@pytest.mark.parametrize("first_to_close", [0, 1])
def test_pages_shared_by_two_stores_are_counted(first_to_close: int, tmp_path: Path) -> None:
    tensors = file_of(tmp_path, LARGE + 5, LARGE)  # they meet in the middle of a page
    device = SimulatedDevice(copies="late", is_poisoned=True)
    bindings = [BoundTensor("t", t) for t in tensors]
    stretches = Stretches(device, bindings)
    stores = [HostStore(device, stretches) for _ in tensors]
    units = [store.add(UnitBinding([bound])) for store, bound in zip(stores, bindings, strict=True)]
    for store in stores:
        store.pin()
    assert len(device.registered) == 1
    assert all(segment.is_pinned for unit in units for segment in unit.segments)
    stores[first_to_close].close()
    assert len(device.registered) == 1, "the other still needs it"
    stores[1 - first_to_close].close()
    assert device.registered == {}


def test_two_stores_over_the_same_tensor() -> None:
    parameter = nn.Parameter(apart(LARGE))
    device = SimulatedDevice(copies="late", is_poisoned=True)
    first, second = Stored(parameter, device=device), Stored(parameter, device=device)
    assert len(device.registered) == 1
    first.close()
    second.check()
    second.close()
    assert device.registered == {}


def test_what_a_lock_has_only_a_part_of_is_gathered(tmp_path: Path) -> None:
    first, second = file_of(tmp_path, LARGE + 5, LARGE)
    device = SimulatedDevice(copies="late", is_poisoned=True)
    behind = Stored(second, device=device)
    both = Stored(first, second, device=device)
    assert behind.is_in_place()
    assert [both.is_in_place(n) for n in range(2)] == [False, False], "a lock on both would overlap the one there is"
    both.check()
    both.close()
    behind.close()
    assert device.registered == {}


# ---- strangers

KIB = 1024


@pytest.mark.parametrize("num_bytes", [4 * KIB, 300 * KIB, MIB, 3 * MIB, 20 * MIB, 40 * MIB])
@pytest.mark.parametrize("where", ["heap", "file", "apart"])
def test_any_copy_by_user_code_works(num_bytes: int, where: str, tmp_path: Path) -> None:
    """Strangers before and behind a weight, weights at home, and parts of them: none is `invalid argument`."""
    sizes = [num_bytes // 4 + 5, 1000, num_bytes // 4, 77, num_bytes // 4, 400]
    if where == "heap":
        tensors = [on_a_heap(sizes[0]), *(torch.randn(n) for n in sizes[1:])]
    else:
        tensors = file_of(tmp_path, *sizes) if where == "file" else [apart(n) for n in sizes]
    weights, strangers = [nn.Parameter(t) for t in tensors[::2]], tensors[1::2]
    stored = Stored(*weights)
    homes = [b.home for b in stored.binding.tensors]
    for tensor in (*strangers, *homes, *(b.master for b in stored.binding.tensors)):
        size = tensor.numel()
        for part in (tensor, tensor[1:], tensor[: size // 2], tensor[size // 2 :], tensor[-1:], tensor[-1000:-3]):
            stored.device.check_host_copy(part)
    assert [torch.equal(h, v) for h, v in zip(homes, stored.values, strict=True)] == [True] * 3
    ours = [h.untyped_storage() for h in homes]
    for tensor in strangers if where == "heap" else ():
        assert not stored.device.check_host_copy(tensor), "its pages are not locked"
        assert tensor.untyped_storage() not in ours
    stored.check()
    stored.close()


def test_what_lies_on_a_heap_is_moved_and_handed_back_where_it_went() -> None:
    parameter = nn.Parameter(on_a_heap(LARGE))
    original = StorageWeakRef(parameter.untyped_storage())
    stored = Stored(parameter)
    assert original.expired(), "let go"
    home = parameter.data_ptr()
    stored.check()
    stored.close()
    assert parameter.data_ptr() == home, "nothing large is copied on leaving"
    assert parameter.untyped_storage().nbytes() == parameter.nbytes
    again = Stored(parameter)
    assert again.is_in_place(), "it has its pages to itself from now on"
    again.check()
    again.close()


def test_a_unit_in_place_has_a_copy_for_each_tensor_and_one_for_the_rest() -> None:
    weights = [apart(LARGE), torch.randn(9), on_a_heap(LARGE), apart(LARGE), torch.randn(5)]
    stored = Stored(*weights)
    assert len(stored.unit.segments) == 3
    stored.check()
    stored.close()


def test_a_file_of_which_little_is_ours_is_gathered(tmp_path: Path) -> None:
    tensors = file_of(tmp_path, LARGE, 9 * LARGE)
    stored = Stored(tensors[0])
    assert not stored.is_in_place(), "locking the file would make all of it memory of the process"
    assert sum(stored.device.registered.values()) <= LARGE * 4 + PAGE_BYTES
    stored.check()
    stored.close()
    last = Stored(tensors[1])
    assert last.is_in_place()
    assert sum(last.device.registered.values()) <= 9 * LARGE * 4 + 2 * PAGE_BYTES, "from the first of ours on"
    last.close()


def test_close_twice_and_without_pinning() -> None:
    stored = Stored(apart(LARGE), is_pinned=False)
    stored.store.close()
    stored.store.close()
    stored = Stored(apart(LARGE))
    stored.close()
    stored.close()
    assert stored.device.registered == {}


def test_a_dropped_store_takes_its_locks_along() -> None:
    stored = Stored(apart(LARGE), torch.randn(4))
    device = stored.device
    assert device.registered
    del stored
    gc.collect()
    assert device.registered == {}


def test_a_failure_in_the_middle_of_registering_takes_the_others_back() -> None:
    device = SimulatedDevice()
    bindings = [UnitBinding([BoundTensor("t", apart(LARGE))]) for _ in range(4)]
    for operation in range(5):
        store = HostStore(device, Stretches(device, [b.tensors[0] for b in bindings]))
        for binding in bindings:  # a unit each, so neighbours stay apart
            store.add(binding)
        device.fail_at(operation, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt) if operation < 4 else contextlib.nullcontext():
            store.pin()
        assert len(device.registered) == (0 if operation < 4 else 4)
        device.fail_at(10**9, KeyboardInterrupt())
        store.close()
        assert device.registered == {}


def test_pin_works_after_a_failure() -> None:
    stored = Stored(apart(LARGE), is_pinned=False)
    stored.device.fail_at(0, RuntimeError("of the device"))
    with pytest.raises(RuntimeError, match="of the device"):
        stored.store.pin()
    stored.store.pin()
    stored.check()
    assert stored.store.pinned_bytes == LARGE * 4
    stored.close()


# ---- refused


REFUSED = re.escape("of host memory was refused; those weights are copied through a small staging buffer")


def test_refused_pinning_is_said_once_and_copies_still_work() -> None:
    with pytest.warns(LayerstreamWarning, match=r"page-locking 3\.0 MiB " + REFUSED) as said:
        stored = Stored(apart(LARGE), torch.randn(8), device=SimulatedDevice(refuses_pinning=True))
    assert len(said) == 1
    assert [s.is_pinned for s in stored.unit.segments] == [False] * 2
    assert (stored.store.pinned_bytes, stored.store.unpinned_bytes) == (0, stored.unit.wire_bytes)
    stored.check()
    assert stored.device.num_pageable_pieces == 2
    stored.close()


class Limited(SimulatedDevice):
    """Page-locks so much and no more, as under `ulimit -l`."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(copies="late", is_poisoned=True)
        self.limit_bytes = limit_bytes

    def register(self, address: int, num_bytes: int) -> bool:
        if sum(self.registered.values()) + num_bytes > self.limit_bytes:
            return False
        return super().register(address, num_bytes)


def test_pinning_refused_half_way() -> None:
    device = Limited(LARGE * 4 + MIB)
    bindings = [UnitBinding([BoundTensor("t", apart(LARGE))]) for _ in range(3)]
    store = HostStore(device, Stretches(device, [b.tensors[0] for b in bindings]))
    units = [store.add(binding) for binding in bindings]
    with pytest.warns(LayerstreamWarning, match=r"page-locking 6\.0 MiB " + REFUSED) as said:
        store.pin()
    assert len(said) == 1
    assert [unit.is_pinned for unit in units] == [True, False, False]
    assert (store.pinned_bytes, store.unpinned_bytes) == (LARGE * 4, 2 * LARGE * 4)
    store.close()
    assert device.registered == {}


# ---- how much host memory there is


def leave(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(host_store, "available_bytes", lambda: (num_bytes, "MemAvailable of the machine"))


def test_file_pages_that_cannot_be_held_in_memory_are_refused(
    floats_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(monkeypatch, LARGE * 4)
    tensor = mapped(floats_file, "c")
    before = anonymous_bytes(*span_of(tensor))
    text = r"do not fit in host memory: 3\.0 MiB of them are mapped.*; 3\.0 MiB are left \(MemAvailable of the mach"
    with pytest.raises(HostMemoryError, match=text) as caught:
        Stored(tensor, torch.randn(3))
    assert (caught.value.needed_bytes, caught.value.available_bytes) == (LARGE * 4, LARGE * 4)
    assert anonymous_bytes(*span_of(tensor)) == before, "not one page was written"
    leave(monkeypatch, LARGE * 4 + MIB)
    Stored(tensor, torch.randn(3)).close()


def test_file_pages_that_are_in_memory_already_need_no_room(floats_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = mapped(floats_file, "c")
    Stored(tensor).close()  # writes to all of its pages
    leave(monkeypatch, MIB)
    stored = Stored(tensor)
    assert stored.is_in_place()
    stored.close()


def test_memory_that_is_no_file_needs_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    leave(monkeypatch, 0)
    Stored(apart(LARGE), torch.randn(3)).close()


V1, V2 = "sys/fs/cgroup/memory/memory.", "sys/fs/cgroup/memory."
MACHINE = {"proc/meminfo": "MemTotal: 64 kB\nMemAvailable:     8 kB\n"}
CACHED = "file 900\nactive_file 100\ninactive_file 50\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MACHINE, (8192, "MemAvailable of the machine")),
        ({f"{V2}max": "max", f"{V2}current": "5000"}, None),
        ({f"{V2}max": "10000\n", f"{V2}current": "8600\n"}, (1400, "the control group's memory.max")),
        ({f"{V2}max": "10000", f"{V2}current": "8600", f"{V2}stat": CACHED}, (1550, "the control group's memory.max")),
        (MACHINE | {f"{V2}max": "10000", f"{V2}current": "0"}, (8192, "MemAvailable of the machine")),
        (MACHINE | {f"{V2}max": "9000", f"{V2}current": "999"}, (8001, "the control group's memory.max")),
        ({f"{V2}max": "10000", f"{V2}current": "20000"}, (0, "the control group's memory.max")),
        (
            {f"{V1}limit_in_bytes": "10000", f"{V1}usage_in_bytes": "8600"},
            (1400, "the control group's memory.limit_in_bytes"),
        ),
        ({f"{V2}max": "10000", f"{V2}current": "nonsense"}, None),
        ({f"{V2}max": "10000"}, None),
    ],
)
def test_what_is_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: tuple[int, str] | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(host_memory, "Path", lambda name: tmp_path / name.lstrip("/"))
    assert host_memory.available_bytes() == expected


# ---- ranges

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)).map(lambda s: (s[0], s[0] + s[1])), max_size=8)


@given(SPANS)
def test_merged_spans_are_sorted_apart_and_cover_the_same(spans: list[tuple[int, int]]) -> None:
    merged = host_memory.merged(spans)
    assert all(a[1] < b[0] for a, b in pairwise(merged))
    assert {x for s, e in merged for x in range(s, e)} == {x for s, e in spans for x in range(s, e)}


class Refusing(SimulatedDevice):
    """Refuses to register what begins at some pages."""

    refused: frozenset[int] = frozenset()

    def register(self, address: int, num_bytes: int) -> bool:
        return address // PAGE_BYTES not in self.refused and super().register(address, num_bytes)


@given(SPANS, SPANS, st.frozensets(st.integers(0, 60), max_size=5))
def test_locks_are_disjoint_counted_and_hold_what_they_say(
    first: list[tuple[int, int]], second: list[tuple[int, int]], refused: frozenset[int]
) -> None:
    device, locks = Refusing(), page_locks.PageLocks()
    device.refused = refused
    held: list[tuple[int, int]] = []
    for spans in (first, second):
        wanted = [(s * PAGE_BYTES, e * PAGE_BYTES) for s, e in host_memory.merged(spans)]
        for span, lock in zip(wanted, locks.acquire(device, wanted), strict=True):
            if lock is not None:
                assert lock[0] <= span[0]
                assert span[1] <= lock[1]
                held.append(lock)
            else:
                assert refused or locks.overlapping(span) is not None
    assert device.registered == {start: end - start for start, end in held}
    while held:
        locks.release(device, [held.pop()])
        assert device.registered == {start: end - start for start, end in held}
    assert not len(locks)


def test_a_page_mapping_is_exact_and_lives_as_long_as_its_tensors() -> None:
    for num_bytes in (1, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1):
        pages = PageMapping(num_bytes)
        start, end = pages.range
        buffer = pages.cut(0, num_bytes)
        assert (buffer.data_ptr(), end - start) == (start, -(-num_bytes // PAGE_BYTES) * PAGE_BYTES)
        assert buffer.untyped_storage().nbytes() == num_bytes
        assert not buffer.any()
        del pages
        assert MemoryMaps.read().stretch(buffer) == (start, end)
        del buffer
        gc.collect()
        assert start not in host_memory._OWN


def test_stretches(floats_file: Path) -> None:
    """What can be locked as one: all of a private file mapping, a block that malloc mapped for one storage, pages of
    our own; nothing that is shared, read-only, on a heap or unknown."""
    private, shared, read_only = (mapped(floats_file, mode) for mode in ("c", "r+", "r"))
    large = mapped_by_malloc(40 * MIB)
    maps = MemoryMaps.read()
    start, end = maps.stretch(private) or (0, 0)
    assert start <= span_of(private)[0] < span_of(private)[1] <= end <= start + LARGE * 4 + PAGE_BYTES
    start, end = maps.stretch(large[1000:-1000]) or (0, 0)
    assert start % PAGE_BYTES == end % PAGE_BYTES == 0
    assert span_of(large)[0] - PAGE_BYTES < start < span_of(large)[0] < span_of(large)[1] <= end
    assert end < span_of(large)[1] + 2 * PAGE_BYTES
    own = apart(LARGE)
    assert MemoryMaps.read().stretch(own) == (own.data_ptr(), own.data_ptr() + LARGE * 4)
    numpys = torch.from_numpy(np.ones(10 * MIB))
    for tensor in (shared, read_only, on_a_heap(LARGE), numpys, torch.randn(3), torch.empty(0)):
        assert MemoryMaps.read().stretch(tensor) is None
    assert MemoryMaps([]).stretch(large) is None
    assert [maps.is_file(span_of(t)) for t in (private, shared, read_only, large)] == [True, False, False, False]


def test_a_mapping_that_the_kernel_has_cut_is_one(floats_file: Path) -> None:
    tensor = mapped(floats_file, "c")
    start, end = span_of(tensor)
    middle = start + 100 * PAGE_BYTES

    def maps(*entries: tuple[int, int, str, str | None]) -> MemoryMaps:
        return MemoryMaps(entries)

    end = -(-end // PAGE_BYTES) * PAGE_BYTES
    assert maps((start, middle, "rw-p", "f"), (middle, end, "rw-p", "f")).stretch(tensor) == (start, end)
    assert maps((start, end, "rw-p", "f"), (end, end + 10, "rw-p", "f")).stretch(tensor) == (start, end + 10)
    assert maps((start, end, "rw-p", "f"), (end, end + 10, "rw-p", "g")).stretch(tensor) == (start, end)
    assert maps((start, middle, "rw-p", "f"), (middle, end, "r--p", "f")).stretch(tensor) is None
    assert maps((start, middle, "rw-p", "f"), (middle + 1, end, "rw-p", "f")).stretch(tensor) is None
    assert maps((start, middle, "rw-p", "f")).stretch(tensor) is None


@pytest.mark.parametrize(
    ("before", "size"), [(0, 2), (48, 3), (48, 4), (47, 2), (48 + PAGE_BYTES, 2), (2**63, 2)], ids=str
)
def test_what_does_not_look_like_a_mapped_block_is_none(before: int, size: int) -> None:
    """Of another allocator, the words before the memory say something else."""
    pages = PageMapping(4 * PAGE_BYTES)
    start = pages.range[0]
    words = pages.cut(48, 16).view(torch.int64)

    class Storage:
        resizable = staticmethod(lambda: True)
        data_ptr = staticmethod(lambda: start + 64)
        nbytes = staticmethod(lambda: 3 * PAGE_BYTES)

    words.copy_(torch.tensor([48, 4 * PAGE_BYTES - 48 | 2]))
    assert host_memory._chunk(Storage()) == pages.range  # type: ignore[arg-type]  # as glibc writes it
    words.copy_(torch.tensor([before - 2**64 if before >= 2**63 else before, 4 * PAGE_BYTES - 48 | size]))
    assert host_memory._chunk(Storage()) is None  # type: ignore[arg-type]


def test_a_large_tensor_is_copied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "COPY_BYTES", 1000)
    source = torch.arange(2500 % 256 + 2500, dtype=torch.int64).to(torch.uint8)
    segment = Segment(source, 256, is_pinned=True)
    parts = list(segment.parts())
    assert [at for at, _ in parts] == list(range(0, source.numel(), 1000))
    assert torch.equal(torch.cat([part for _, part in parts]), source)
    unit = RawHome(SimulatedDevice(), [0], 256 + source.numel(), segments=[segment])
    buffer = torch.zeros(unit.device_bytes, dtype=torch.uint8)
    for target, part, _ in unit.pairs(buffer):
        target.copy_(part)
    assert torch.equal(buffer[256:], source)
    assert not buffer[:256].any()
