"""What `CudaDevice` computes and asks of `torch.cuda`, on a GPU made of monkeypatches. See tests/gpu for a real one."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layerstream.device import batched_copy
from layerstream.device import cuda as device_module
from layerstream.device.base import COPY_BYTES, Device
from layerstream.device.batched_copy import BatchedCopy
from layerstream.device.cuda import CudaDevice

MIB = 2**20
GIB = 2**30
TOTAL = 150_109_880_320  # an H200: no power of two


class FakeGpu:
    """The state that the allocator of `torch.cuda` would hold."""

    def __init__(self, patch: pytest.MonkeyPatch, *, total: int = TOTAL, can_read_fraction: bool = True) -> None:
        self.total = total
        self.free = total
        self.fraction = 1.0
        self.asked: list[tuple[str, Any]] = []
        self.stats: dict[str, Any] = {
            "reserved_bytes": {"all": {"current": 5 * GIB, "peak": 7 * GIB}},
            "allocated_bytes": {"all": {"current": 3 * GIB, "peak": 6 * GIB}},
        }

        def answer(name: str, result: Any) -> None:
            def call(device: Any = None) -> Any:
                self.asked.append((name, device))
                return result() if callable(result) else result

            patch.setattr(torch.cuda, name, call, raising=False)

        answer("get_device_name", "fake")
        answer("cudart", None)
        answer("reset_peak_memory_stats", None)
        answer("memory_stats_as_nested_dict", lambda: self.stats)
        answer("mem_get_info", lambda: (self.free, self.total))
        answer("get_device_properties", lambda: SimpleNamespace(total_memory=self.total))
        # As the allocator does: what is allowed is whole bytes, and what it answers is made of them.
        answer("get_per_process_memory_fraction", lambda: int(self.fraction * self.total) / self.total)
        if not can_read_fraction:
            patch.delattr(torch.cuda, "get_per_process_memory_fraction")
        patch.setattr(device_module, "_CAPS", {})
        patch.setattr(torch.cuda, "Stream", lambda device: None)
        patch.setattr(torch.cuda, "set_per_process_memory_fraction", self.set_fraction)

    def set_fraction(self, fraction: float, device: torch.device) -> None:
        assert isinstance(fraction, float)
        assert 0 <= fraction <= 1, "torch raises"
        assert device == torch.device("cuda", 0)
        self.fraction = fraction

    @property
    def allowed(self) -> int:
        return int(self.fraction * self.total)


class FakeEvent:
    def __init__(self, time_ms: float, is_done: bool = True) -> None:
        self.time_ms = time_ms
        self.is_done = is_done

    def query(self) -> bool:
        return self.is_done

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.is_done
        assert end.is_done, "torch raises"
        return end.time_ms - self.time_ms


def cuda() -> CudaDevice:
    return CudaDevice(torch.device("cuda", 0))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


def test_it_is_a_device(gpu: FakeGpu) -> None:
    device = cuda()
    names = [n for n in [*dir(Device), *Device.__annotations__] if not n.startswith("_")]
    assert len(names) > 25
    assert [n for n in names if not hasattr(device, n)] == []


# ---- what is held


def test_bytes_are_those_of_this_device(gpu: FakeGpu) -> None:
    device = cuda()
    gpu.asked.clear()
    assert device.reserved_bytes() == 5 * GIB
    assert device.allocated_bytes() == 3 * GIB
    assert device.peak_reserved_bytes() == 7 * GIB
    assert device.peak_allocated_bytes() == 6 * GIB
    device.reset_peaks()
    assert gpu.asked == [
        (name, torch.device("cuda", 0)) for name in (*["memory_stats_as_nested_dict"] * 4, "reset_peak_memory_stats")
    ]
    gpu.stats.clear()
    assert device.reserved_bytes() == 0, "before anything was allocated torch has no statistics"


def test_num_ooms(gpu: FakeGpu) -> None:
    device = cuda()
    assert device.num_ooms() == 0, "before anything was refused"
    gpu.stats["num_ooms"] = 3
    assert device.num_ooms() == 3


def test_context_is_what_is_used_outside_the_allocator(gpu: FakeGpu) -> None:
    device = cuda()
    gpu.free = gpu.total - 5 * GIB - 600 * MIB
    assert device.context_bytes() == 600 * MIB
    gpu.free = gpu.total - 4 * GIB  # read at different moments
    assert device.context_bytes() == 0


# ---- the cap


@pytest.mark.parametrize("total", [TOTAL, 25_294_995_456, 8_589_934_592, 84_974_239_744, 1_000_000_007, 3])
def test_a_cap_is_held_to_the_byte(total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch, total=total)
    device = cuda()
    numbers = random.Random(total)
    caps = [
        0,
        1,
        2,
        total // 3,
        total // 2,
        total - 2,
        total - 1,
        total,
        *(numbers.randrange(total) for _ in range(300)),
    ]
    for cap in caps:
        if cap < 0:
            continue
        device.set_cap(cap)
        assert cap - 1 <= gpu.allowed <= cap
    device.set_cap(total // 2)
    assert gpu.allowed == total // 2


def test_a_cap_above_the_total_is_all_there_is(gpu: FakeGpu) -> None:
    device = cuda()
    for cap in (TOTAL + 1, 2 * TOTAL, 2**60):
        device.set_cap(cap)
        assert gpu.fraction == 1.0


@pytest.mark.parametrize("before", [1.0, 0.3, 0.75, 1 / 3, 0.123456789])
def test_the_cap_from_before_comes_back(before: float, gpu: FakeGpu) -> None:
    gpu.fraction = before
    allowed = gpu.allowed
    device = cuda()
    for _ in range(5):
        device.set_cap(4 * GIB)
        device.set_cap(2 * GIB)  # not what was before
        assert gpu.allowed == 2 * GIB
        device.set_cap(None)
        assert gpu.allowed == allowed
    gpu.fraction = 0.9  # the user's, after us
    device.set_cap(None)
    assert gpu.fraction == 0.9


def test_the_smallest_cap_of_two_streamers_holds_and_either_may_end_first(gpu: FakeGpu) -> None:
    gpu.fraction = 0.75
    before = gpu.allowed
    for ends_first in ("large", "small"):
        for owner, cap in (("large", 8 * GIB), ("small", 4 * GIB)):
            cuda().set_cap(cap, owner)  # each streamer has a device object of its own
        assert gpu.allowed == 4 * GIB
        cuda().set_cap(None, ends_first)
        assert gpu.allowed == (8 * GIB if ends_first == "small" else 4 * GIB)
        cuda().set_cap(None, "large")
        cuda().set_cap(None, "small")
        assert gpu.allowed == before


def test_a_limit_that_the_user_set_is_not_raised(gpu: FakeGpu) -> None:
    gpu.fraction = 2 * GIB / gpu.total
    device = cuda()
    device.set_cap(4 * GIB)
    assert gpu.allowed == 2 * GIB


def test_an_older_torch_gets_all_back(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch, can_read_fraction=False)
    device = cuda()
    device.set_cap(None)
    assert gpu.fraction == 1.0
    gpu.fraction = 0.5
    device.set_cap(4 * GIB)
    assert gpu.allowed == 4 * GIB
    device.set_cap(None)
    assert gpu.fraction == 1.0


# ---- buffers


def test_sizes_are_rounded_to_segments(gpu: FakeGpu) -> None:
    device = cuda()
    sizes = (0, 1, 2 * MIB - 1, 2 * MIB, 2 * MIB + 1, 10 * MIB, 3 * GIB + 5)
    assert [device.rounded_bytes(n) for n in sizes] == [
        0,
        2 * MIB,
        2 * MIB,
        2 * MIB,
        4 * MIB,
        10 * MIB,
        3 * GIB + 2 * MIB,
    ]


def test_a_buffer_owns_its_rounded_size(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    device = cuda()
    device.torch_device = torch.device("cpu")
    for num_bytes in (0, 1, 2 * MIB, 2 * MIB + 1):
        buffer = device.allocate(num_bytes)
        assert (buffer.dtype, buffer.shape) == (torch.uint8, (num_bytes,))
        assert buffer.storage_offset() == 0
        assert buffer.untyped_storage().nbytes() == device.rounded_bytes(num_bytes)


# ---- time


def test_no_time_before_the_device_has_passed_the_end(gpu: FakeGpu) -> None:
    device = cuda()
    start, end = FakeEvent(2.0), FakeEvent(5.5, is_done=False)
    assert device.elapsed_ms(start, end) is None
    assert device.stall_ms((start, end)) is None
    end.is_done = True
    assert device.elapsed_ms(start, end) == device.stall_ms((start, end)) == 3.5
    assert device.elapsed_ms(FakeEvent(1.0, is_done=False), end) is None, "a mark of another stream"


def test_fraction_is_never_too_large() -> None:
    numbers = random.Random(0)
    for _ in range(20_000):
        total = numbers.randrange(1, 2 ** numbers.randrange(1, 48))
        cap = numbers.randrange(total + 1)
        fraction = device_module._fraction(cap, total)
        assert cap - 1 <= int(fraction * total) <= cap


# ---- beside another GPU


class TwoGpus:
    """Which of two GPUs is the current one, and on which stream of it work is issued."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current = 0
        patch.setattr(torch.cuda, "current_device", lambda: self.current)
        patch.setattr(torch.cuda, "device", self.device)
        patch.setattr(torch.cuda, "stream", lambda stream: self.device(stream.device_index))
        patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(device_index=device.index))

    @contextlib.contextmanager
    def device(self, index: Any) -> Iterator[None]:
        before, self.current = self.current, getattr(index, "index", index)
        try:
            yield
        finally:
            self.current = before


def second() -> CudaDevice:
    device = object.__new__(CudaDevice)
    device.torch_device = torch.device("cuda", 1)
    return device


def test_another_thread_has_the_same_gpu_as_its_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, launched = TwoGpus(monkeypatch), []
    monkeypatch.setattr(torch, "zeros", lambda *size, device: launched.append(device.index))
    monkeypatch.setattr(device_module, "_THREAD", device_module._Thread())
    device = second()
    enter = device.beside()
    for _ in range(2):
        with enter():
            assert gpus.current == 0
    device.torch_device = torch.device("cuda", 0)
    with enter():
        pass
    assert launched == [1, 0], "once on each GPU"


def test_a_gpu_asks_itself_whether_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = TwoGpus(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpus.current == 0)
    assert not second().is_capturing()
    assert gpus.current == 0


@pytest.mark.parametrize("closed", [None, (0, 1), (1, 0)])
def test_the_way_between_two_gpus_is_opened_in_both_directions(
    closed: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []

    class Byte:
        def __init__(self, size: int, *, device: torch.device) -> None:
            self.index = device.index

        def copy_(self, source: Byte) -> None:
            done.append((source.index, self.index))

    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, two: (one.index, two.index) != closed)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(device.index))
    monkeypatch.setattr(torch, "empty", Byte)
    first = second()
    first.torch_device = torch.device("cuda", 0)
    assert first.reaches(second()) is (closed is None)
    assert done == ([(1, 0), (0, 1), 0, 1] if closed is None else [])


def test_a_refused_page_lock_makes_no_context_on_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, touched = TwoGpus(monkeypatch), []
    device = second()
    device._cudart = SimpleNamespace(
        cudaHostRegister=lambda *args: touched.append(gpus.current) or 2,
        cudaHostUnregister=lambda *args: touched.append(gpus.current) or 2,
    )
    right = torch.empty

    def empty(*size: Any, device: Any = None, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            touched.append(gpus.current)
            raise RuntimeError("refused")
        touched.append(torch.device(device).index)
        return right(*size, **options)

    monkeypatch.setattr(torch, "empty", empty)
    assert not device.register(0, 4096)
    device.unregister(0)
    assert device.pinned_staging(1) is None
    assert touched == [1] * 6


# ---- copies in turns


class _FakeStream:
    def __init__(self, *args: object) -> None:
        self.issued: list[object] = []

    def wait_event(self, event: _FakeEvent) -> None:
        self.issued.append(("waits", event.after))  # as it is recorded now, whatever becomes of the event


class _FakeEvent:
    def record(self, stream: _FakeStream) -> None:
        self.after = (stream, len(stream.issued))


class _FakeTensor:
    current: _FakeStream
    device = torch.device("cpu")

    def __init__(self, name: int, num_bytes: int) -> None:
        self.name, self.num_bytes = name, num_bytes

    def numel(self) -> int:
        return self.num_bytes

    def data_ptr(self) -> int:
        return self.name

    def copy_(self, source: object, non_blocking: bool) -> None:
        assert non_blocking
        self.current.issued.append(("copies", self.name))


def test_copies_take_turns_on_two_streams_and_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def current(stream: _FakeStream) -> Iterator[None]:
        _FakeTensor.current = stream
        yield

    for name, fake in (("Stream", _FakeStream), ("Event", _FakeEvent), ("stream", current)):
        monkeypatch.setattr(torch.cuda, name, fake)
    copies = device_module._CopyStreams(torch.device("cuda"))
    sizes = [COPY_BYTES, COPY_BYTES, 5, 7, COPY_BYTES, 3, COPY_BYTES // 2, COPY_BYTES // 2, 1]
    pieces: Any = [(_FakeTensor(number, size), _FakeTensor(-number, size)) for number, size in enumerate(sizes)]
    for part in (pieces[:4], pieces[4:]):
        copies.copy(device_module._turns(part, is_locked=True))
    one, two = copies._streams
    seen: list[int] = []

    def run(stream: Any, until: int) -> None:
        """What a device does before it passes a point on a stream."""
        while stream.issued[:until]:
            what, which = stream.issued[0]
            if what == "waits":
                run(which[0], which[1] - taken[id(which[0])])
            else:
                seen.append(which)
            del stream.issued[0]
            taken[id(stream)] += 1
            until -= 1

    num_turns = sum(1 for stream in (one, two) for what, _ in stream.issued if what == "waits")  # type: ignore[attr-defined]
    per_stream = [sum(1 for what, _ in stream.issued if what == "copies") for stream in (one, two)]  # type: ignore[attr-defined]
    taken = {id(one): 0, id(two): 0}
    last = copies.now
    run(last, len(last.issued))  # type: ignore[attr-defined]
    assert seen == list(range(len(sizes)))
    assert num_turns == 6
    assert min(per_stream) >= 3


class _FakeRuntime:
    """cuda.bindings.runtime, of which a batch is queued or refused."""

    class cudaError_t:  # noqa: N801
        cudaSuccess = SimpleNamespace(name="cudaSuccess")  # noqa: N815

    class cudaMemcpySrcAccessOrder:  # noqa: N801
        cudaMemcpySrcAccessOrderStream = "in stream order"  # noqa: N815

    cudaMemcpyAttributes = SimpleNamespace  # noqa: N815

    def __init__(self, *errors: str) -> None:
        self.errors = list(errors)
        self.calls: list[tuple[Any, ...]] = []

    def cudaMemcpyBatchAsync(self, *args: Any) -> tuple[Any, ...]:  # noqa: N802
        self.calls.append(args)
        name = self.errors.pop(0) if self.errors else "cudaSuccess"
        return (self.cudaError_t.cudaSuccess if name == "cudaSuccess" else SimpleNamespace(name=name),)


def test_a_batch_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = _FakeRuntime()
    monkeypatch.setattr(batched_copy, "import_module", lambda name: runtime)
    batched = BatchedCopy.find()
    assert batched is not None
    assert batched([1, 2], [3, 4], [5, 6], 7)
    ((targets, sources, sizes, count, (attributes,), indices, num_attributes, stream),) = runtime.calls
    assert (targets, sources, sizes, count, stream) == ([1, 2], [3, 4], [5, 6], 2, 7)
    assert (attributes.srcAccessOrder, indices, num_attributes) == ("in stream order", [0], 1)


def test_a_machine_without_batches_is_found_out_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = _FakeRuntime("cudaErrorInsufficientDriver")
    monkeypatch.setattr(batched_copy, "import_module", lambda name: runtime)
    batched = BatchedCopy.find()
    assert batched is not None
    assert not batched([1], [2], [3], 4)


def test_a_batch_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = _FakeRuntime("cudaSuccess", "cudaErrorNotSupported", "cudaErrorIllegalAddress")
    monkeypatch.setattr(batched_copy, "import_module", lambda name: runtime)
    batched = BatchedCopy.find()
    assert batched is not None
    assert batched([1], [2], [3], 4)
    for name in ("cudaErrorNotSupported", "cudaErrorIllegalAddress"):
        with pytest.raises(RuntimeError, match=rf"1 copies to the device were not all queued \({name}\)"):
            batched([1], [2], [3], 4)


def test_batches_from_another_gpu_are_found_out_about_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = _FakeRuntime("cudaSuccess", "cudaErrorNotSupported")
    monkeypatch.setattr(batched_copy, "import_module", lambda name: runtime)
    batched = BatchedCopy.find()
    assert batched is not None
    assert batched([1], [2], [3], 4)
    for _ in range(2):
        assert not batched([1], [2], [3], 4, "from cuda to cuda")
    assert len(runtime.calls) == 2, "it is asked once"
    assert batched([1], [2], [3], 4)
    assert batched.can()
    assert not batched.can("from cuda to cuda")


@pytest.mark.parametrize("error", [ImportError("none"), RuntimeError("no library")])
def test_without_cuda_bindings_there_are_no_batches(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(batched_copy, "import_module", fail)
    assert BatchedCopy.find() is None
