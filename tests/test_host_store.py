"""Where a unit's bytes lie in host memory: in place by the safe rule, else gathered; locked and counted (15)."""

from __future__ import annotations

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

from layerstream import host_store
from layerstream.binding import BoundTensor, UnitBinding
from layerstream.blocks import ALIGNMENT_BYTES
from layerstream.errors import LayerstreamWarning
from layerstream.host_store import IN_PLACE_LEAST_BYTES, PAGE_BYTES, HostStore, StoredUnit
from layerstream.simulated import SimulatedDevice

MIB = 2**20
LARGE = 3 * MIB // 4  # floats: 3 MiB


class Stored:
    """Tensors as one unit of a pinned store."""

    def __init__(self, *tensors: torch.Tensor, device: SimulatedDevice | None = None, is_pinned: bool = True) -> None:
        self.device = device or SimulatedDevice(copies="late", is_poisoned=True)
        self.values = [t.detach().clone() for t in tensors]
        self.came_with = [span_of(t) for t in tensors]
        self.binding = UnitBinding([BoundTensor.of(f"t{i}", t) for i, t in enumerate(tensors)])
        self.store = HostStore(self.device)
        self.unit: StoredUnit = self.store.add(self.binding)
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
        slot = self.device.allocate(self.unit.num_bytes)
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
        self.binding.restore()


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
    assert [len(locks) for locks in host_store._LOCKS_BY_DEVICE.values() if len(locks)] == []


# ---- the safe rule


def test_large_private_memory_stays_and_is_registered() -> None:
    parameter = nn.Parameter(torch.randn(LARGE))
    address = parameter.data_ptr()
    stored = Stored(parameter)
    assert parameter.data_ptr() == address
    assert stored.is_in_place()
    assert stored.is_registered()
    assert stored.store.pinned_bytes == stored.unit.copied_bytes == parameter.nbytes
    assert stored.store.unpinned_bytes == 0
    stored.check()
    stored.close()
    assert parameter.data_ptr() == address
    assert stored.device.registered == {}


@pytest.mark.parametrize(("num_bytes", "stays"), [(IN_PLACE_LEAST_BYTES, True), (IN_PLACE_LEAST_BYTES - 4, False)])
def test_the_least_that_stays(num_bytes: int, stays: bool) -> None:
    parameter = nn.Parameter(torch.randn(num_bytes // 4))
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
    assert segment.source.numel() <= stored.unit.num_bytes == len(tensors) * ALIGNMENT_BYTES
    stored.check()
    stored.close()


def test_small_and_large_in_one_unit() -> None:
    large, other = nn.Parameter(torch.randn(LARGE)), nn.Parameter(torch.randn(LARGE))
    small = [nn.Parameter(torch.randn(n)) for n in (3, 1000)]
    stored = Stored(small[0], large, small[1], other)
    assert [stored.is_in_place(n) for n in range(4)] == [False, True, False, True]
    assert len(stored.unit.segments) == 3
    stored.check()
    stored.close()


def test_nothing_to_store() -> None:
    for tensors in ((), (torch.empty(0, 3), nn.Parameter(torch.empty(0)))):
        stored = Stored(*tensors)
        assert (stored.unit.num_bytes, stored.unit.segments, stored.store.pinned_bytes) == (0, [], 0)
        stored.check()
        stored.close()


# ---- memory that must not be written, or not locked where it lies


@pytest.fixture
def floats_file(tmp_path: Path) -> Path:
    path = tmp_path / "floats.bin"
    torch.arange(LARGE, dtype=torch.float32).numpy().tofile(path)
    return path


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
    base = torch.arange(4 * LARGE, dtype=torch.float32)
    return {
        "transposed": base[:LARGE].view(1024, -1).t(),
        "channels_last": base[:LARGE].view(4, 64, 64, -1).permute(0, 3, 1, 2),
        "view of a bigger storage": base[1001 : 1001 + LARGE],
        "rows of a bigger storage": base.view(4, -1)[1:3],
        "columns": base.view(1024, -1)[:, 100:1000],
        "every other row": base.view(1024, -1)[::2],
        "expanded": base[:1024].view(1024, 1).expand(1024, 768),
        "expanded rows": base[:768].expand(1024, 768),
        "overlapping": base[: LARGE + 1].as_strided((LARGE, 2), (1, 1)),
        "bf16": base[:LARGE].to(torch.bfloat16),
        "odd length": torch.arange(2 * MIB + 3, dtype=torch.uint8),
    }


@pytest.mark.parametrize("name", large_layouts())
def test_large_tensors_of_every_layout(name: str) -> None:
    tensor = large_layouts()[name]
    before = (tensor.data_ptr(), tensor.stride(), tensor.storage_offset(), tensor.untyped_storage()._cdata)
    stored = Stored(tensor)
    is_dense = name not in ("columns", "every other row", "expanded", "expanded rows", "overlapping")
    assert stored.is_in_place() is is_dense
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
    first = nn.Parameter(torch.randn(size))
    second = nn.Parameter(first.data)
    stored = Stored(first, second)
    assert stored.unit.offsets[0] == stored.unit.offsets[1]
    assert stored.unit.copied_bytes == first.nbytes
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
    parameter = nn.Parameter(torch.randn(LARGE))
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


def test_registrations_are_whole_pages_around_what_they_cover() -> None:
    flat = torch.randn(2 * LARGE)
    stored = Stored(flat[1 : 1 + LARGE])
    assert all(
        start % PAGE_BYTES == num_bytes % PAGE_BYTES == 0 for start, num_bytes in stored.device.registered.items()
    )
    assert sum(stored.device.registered.values()) <= LARGE * 4 + 2 * PAGE_BYTES
    stored.close()


def test_neighbours_that_share_a_page_are_one_registration() -> None:
    flat = torch.randn(2 * LARGE)
    stored = Stored(flat[:LARGE], flat[LARGE:])
    assert len(stored.device.registered) == 1
    stored.check()
    stored.close()
    assert stored.device.registered == {}


@pytest.mark.parametrize("first_to_close", [0, 1])
def test_pages_shared_by_two_stores_are_counted(first_to_close: int) -> None:
    flat = torch.randn(2 * LARGE)
    cut = LARGE + 5  # in the middle of a page
    device = SimulatedDevice(copies="late", is_poisoned=True)
    stores = [Stored(flat[:cut], device=device), Stored(flat[cut:], device=device)]
    assert all(s.is_registered() for s in stores)
    for stored in stores:
        stored.check()  # the device refuses a copy that straddles two registrations
    stores[first_to_close].close()
    left = stores[1 - first_to_close]
    assert left.is_registered()
    left.check()
    left.close()
    assert device.registered == {}


def test_two_stores_over_the_same_tensor() -> None:
    parameter = nn.Parameter(torch.randn(LARGE))
    device = SimulatedDevice(copies="late", is_poisoned=True)
    first, second = Stored(parameter, device=device), Stored(parameter, device=device)
    assert len(device.registered) == 1
    first.close()
    second.check()
    second.close()
    assert device.registered == {}


def test_a_store_in_the_middle_of_anothers_registration() -> None:
    flat = torch.randn(4 * LARGE)
    device = SimulatedDevice(copies="late", is_poisoned=True)
    inner = Stored(flat[LARGE : 2 * LARGE], device=device)
    outer = Stored(flat, device=device)
    assert outer.is_registered()
    assert len(outer.unit.segments) == 3, "cut where the inner registration begins and ends"
    outer.check()
    inner.close()
    outer.check()
    outer.close()
    assert device.registered == {}


def test_no_copy_straddles_the_chunks_that_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_store, "_REGISTER_BYTES", 4 * PAGE_BYTES)
    flat = torch.randn(LARGE + 5)
    stored = Stored(flat[5:], torch.randn(3))
    assert len(stored.device.registered) > 100
    assert len(stored.unit.segments) > 100
    stored.check()
    stored.close()
    assert stored.device.registered == {}


def test_close_twice_and_without_pinning() -> None:
    stored = Stored(torch.randn(LARGE), is_pinned=False)
    stored.store.close()
    stored.store.close()
    stored = Stored(torch.randn(LARGE))
    stored.close()
    stored.close()
    assert stored.device.registered == {}


def test_a_dropped_store_takes_its_locks_along() -> None:
    stored = Stored(torch.randn(LARGE), torch.randn(4))
    device = stored.device
    assert device.registered
    del stored
    gc.collect()
    assert device.registered == {}


def test_a_failure_in_the_middle_of_registering_takes_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_store, "_REGISTER_BYTES", MIB)
    tensor = torch.randn(LARGE)
    for operation in range(4):
        stored = Stored(tensor, is_pinned=False)
        stored.device.fail_at(operation, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            stored.store.pin()
        assert stored.device.registered == {}
        stored.close()


def test_pin_works_after_a_failure() -> None:
    stored = Stored(torch.randn(LARGE), is_pinned=False)
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
        stored = Stored(torch.randn(LARGE), torch.randn(8), device=SimulatedDevice(refuses_pinning=True))
    assert len(said) == 1
    assert [s.is_pinned for s in stored.unit.segments] == [False] * 2
    assert (stored.store.pinned_bytes, stored.store.unpinned_bytes) == (0, stored.unit.copied_bytes)
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


def test_pinning_refused_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_store, "_REGISTER_BYTES", MIB)
    tensor = torch.randn(LARGE)
    with pytest.warns(LayerstreamWarning, match=REFUSED) as said:
        stored = Stored(tensor, device=Limited(MIB + MIB // 2))
    assert len(said) == 1
    assert {s.is_pinned for s in stored.unit.segments} == {True, False}
    assert 0 < stored.store.pinned_bytes < tensor.nbytes
    assert stored.store.pinned_bytes + stored.store.unpinned_bytes == tensor.nbytes
    stored.check()
    stored.close()
    assert stored.device.registered == {}


def test_no_room_in_the_control_group_leaves_file_pages_alone(
    floats_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_store, "_has_room_for", lambda num_bytes: False)
    tensor, own = mapped(floats_file, "c"), torch.randn(LARGE)
    before = anonymous_bytes(*span_of(tensor))
    with pytest.warns(LayerstreamWarning, match=REFUSED):
        stored = Stored(tensor, own)
    assert not stored.is_registered(0)
    assert stored.is_registered(1), "memory that is anonymous already costs nothing"
    assert anonymous_bytes(*span_of(tensor)) == before, "not one page was written"
    stored.check()
    stored.close()


def test_room_is_asked_for_the_file_pages_only(floats_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(host_store, "_has_room_for", lambda num_bytes: not asked.append(num_bytes))
    stored = Stored(mapped(floats_file, "c"), torch.randn(LARGE), torch.randn(3))
    assert asked == [LARGE * 4]
    stored.close()
    Stored(torch.randn(LARGE)).close()
    assert asked == [LARGE * 4]


V1, V2 = "sys/fs/cgroup/memory/memory.", "sys/fs/cgroup/memory."


@pytest.mark.parametrize(
    ("files", "has_room"),
    [
        ({}, True),
        ({f"{V2}max": "max", f"{V2}current": "5000"}, True),
        ({f"{V2}max": "10000", f"{V2}current": "5000"}, True),
        ({f"{V2}max": "10000\n", f"{V2}current": "8600\n"}, False),
        ({f"{V1}limit_in_bytes": "10000", f"{V1}usage_in_bytes": "8600"}, False),
        ({f"{V1}limit_in_bytes": "9223372036854771712", f"{V1}usage_in_bytes": "8600"}, True),
        ({f"{V2}max": "10000", f"{V2}current": "nonsense"}, True),
        ({f"{V2}max": "10000"}, True),
    ],
)
def test_the_control_groups_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], has_room: bool
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(host_store, "Path", lambda name: tmp_path / name.lstrip("/"))
    assert host_store._has_room_for(1000) is has_room


# ---- ranges

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)).map(lambda s: (s[0], s[0] + s[1])), max_size=8)


@given(SPANS)
def test_merged_spans_are_sorted_apart_and_cover_the_same(spans: list[tuple[int, int]]) -> None:
    merged = host_store._merged(spans)
    assert all(a[1] < b[0] for a, b in pairwise(merged))
    assert {x for s, e in merged for x in range(s, e)} == {x for s, e in spans for x in range(s, e)}


@given(st.integers(0, 60), st.integers(0, 30), SPANS)
def test_pieces_cut_a_range_at_the_borders_of_locks(start: int, length: int, spans: list[tuple[int, int]]) -> None:
    locks: list[tuple[int, int]] = []  # disjoint, and some that touch
    for s, e in sorted(spans):
        s = max(s, locks[-1][1] if locks else 0)
        if s < e:
            locks.append((s, e))
    pieces = list(host_store._pieces(start, start + length, locks))
    assert [x for s, e, _ in pieces for x in range(s, e)] == list(range(start, start + length))
    for s, e, is_held in pieces:
        holders = [lock for lock in locks if s < lock[1] and lock[0] < e]
        assert s < e
        assert (len(holders) == 1 and holders[0][0] <= s and e <= holders[0][1]) if is_held else holders == []


def test_exact_pages_are_exact() -> None:
    for num_bytes in (1, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1):
        buffer = host_store._exact_pages(num_bytes)
        assert buffer.numel() == num_bytes
        assert buffer.data_ptr() % PAGE_BYTES == 0
        assert buffer.untyped_storage().nbytes() == -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
        assert not buffer.any()


def test_maps_know_gaps_and_what_is_private(floats_file: Path) -> None:
    private, shared, read_only = (mapped(floats_file, mode) for mode in ("c", "r+", "r"))
    own = torch.randn(LARGE)
    maps = host_store._MemoryMaps.read()
    assert [maps.is_private_writable(span_of(t)) for t in (private, shared, read_only, own)] == [
        True,
        False,
        False,
        True,
    ]
    assert [maps.is_file(span_of(t)) for t in (private, shared, read_only, own)] == [True, True, True, False]
    assert not maps.is_private_writable((0, 100))
    assert not maps.is_private_writable((span_of(private)[0], 2**63)), "runs into a gap"
    assert not host_store._MemoryMaps([]).is_private_writable(span_of(own))
