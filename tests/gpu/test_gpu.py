"""What only a real GPU can show. Run with `pytest -m gpu`."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.device.cuda import CudaDevice
from layerstream.host import page_locks
from layerstream.host.memory import PageMapping
from layerstream.model import units
from layerstream.standins import build_tiny, run_tiny
from tests.fakes import assert_equal, assert_restored, describe, toy, toy_input

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]


@pytest.fixture(autouse=True)
def memory_comes_back() -> Iterator[None]:
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    yield
    gc.collect()
    torch.cuda.synchronize()
    # cuBLAS keeps a workspace per stream once it is used.
    torch._C._cuda_clearCublasWorkspaces()
    assert torch.cuda.memory_allocated() <= before
    assert not len(page_locks._REAL)


class Wide(nn.Module):
    """A residual block of 12 to 24 MB in bf16."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, num_blocks: int = 16, width: int = 1024) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Wide(width, (3 + n % 4) * width) for n in range(num_blocks))
        self.head = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def stack(**kwargs: Any) -> Stack:
    torch.manual_seed(0)
    return Stack(**kwargs).to(torch.bfloat16).eval().requires_grad_(False)


def resident(model: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """What the model computes on the GPU, weights put back afterwards as they were."""
    tensors = [*model.parameters(), *model.buffers()]
    homes = [t.data for t in tensors]
    try:
        for t in tensors:
            t.data = t.data.cuda()
        with torch.no_grad():
            return [model(x) for x in inputs]
    finally:
        for t, home in zip(tensors, homes, strict=True):
            t.data = home


def wide_input(seed: int = 0, rows: int = 64) -> torch.Tensor:
    return torch.randn(rows, 1024, generator=torch.Generator().manual_seed(seed)).cuda().to(torch.bfloat16)


def offloaded(model: Any, budget: int | str = "min", slots: int | None = None) -> layerstream.LayerStreamer:
    streamer = layerstream.offload(model, vram_budget=budget)
    streamer._num_slots = slots
    return streamer


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_equal_under_load(slots: int) -> None:
    """Other streams keep the copy engine and the multiprocessors busy, and compute is delayed at random."""
    model = stack()
    inputs = [wide_input(n) for n in range(4)]
    expected = resident(model, *inputs)
    before = describe(model)
    noise = torch.cuda.Stream()
    a, host = torch.randn(2048, 2048, device="cuda"), torch.empty(2**24, dtype=torch.uint8, pin_memory=True)
    sink = torch.empty(2**24, dtype=torch.uint8, device="cuda")
    generator = torch.Generator().manual_seed(slots)

    def disturb(module: nn.Module, args: object) -> None:
        if torch.rand((), generator=generator) < 0.3:
            torch.cuda._sleep(int(torch.randint(1, 2_000_000, (), generator=generator)))
        with torch.cuda.stream(noise):
            a @ a
            sink.copy_(host, non_blocking=True)

    handles = [block.up.register_forward_pre_hook(disturb) for block in model.blocks]
    with offloaded(model, slots=slots), torch.no_grad():
        outputs = [model(inputs[n % 4]) for n in range(40)]
    for handle in handles:
        handle.remove()
    assert_equal(outputs, [expected[n % 4] for n in range(40)])
    assert_restored(model, before)


def test_small_toy_with_every_kind_of_tensor() -> None:
    model = toy(writes_buffer=False)
    before = describe(model)
    inputs = [toy_input(n).cuda() for n in range(3)]
    expected = resident(model, *inputs)
    with offloaded(model), torch.inference_mode():
        assert_equal([model(x) for x in inputs], expected)
        assert_equal([model(x) for x in inputs], expected)
    assert_restored(model, before)


def test_residents_and_slots_hold_the_budget_of_weights() -> None:
    model = stack()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    x = wide_input()
    expected = resident(model, x)
    for share in (0.4, 0.7, 1.5):
        torch.cuda.empty_cache()
        base = torch.cuda.memory_allocated()
        budget = base + int(share * weights) + 2**26  # activations and libraries' workspaces
        with offloaded(model, budget) as streamer, torch.no_grad():
            for _ in range(3):
                assert_equal([model(x)], expected)
                assert torch.cuda.memory_reserved() <= budget
            assert streamer.stats().peak_reserved_bytes <= budget
            assert (streamer.stats().num_resident_blocks == 16) is (share > 1)


@pytest.mark.parametrize("share", [None, 0.2, 0.35, 0.5])
def test_pieces_of_large_blocks(share: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "PIECE_BYTES", 7 * 10**6)
    model = stack()
    before = describe(model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    inputs = [wide_input(seed) for seed in (1, 2)]
    expected = resident(model, *inputs)
    budget = "min" if share is None else torch.cuda.memory_allocated() + int(share * weights) + 2**27
    with offloaded(model, budget) as streamer, torch.no_grad():
        for _ in range(6):
            assert_equal([model(x) for x in inputs], expected)
        assert len({u.block_name for u in streamer.plan.units}) < len(streamer.plan.units), "blocks are cut"
        assert streamer.stats().num_streamed_blocks > 0
        if share is not None:
            assert streamer.stats().peak_reserved_bytes <= budget
    assert_restored(model, before)


def test_copies_overlap_compute() -> None:
    """The next block's load ends while this block still computes: seen by events, not by a clock."""
    model = stack(num_blocks=6)
    x = wide_input()
    overlapped: list[bool] = []
    with offloaded(model) as streamer, torch.no_grad():
        model(x)
        torch.cuda.synchronize()
        transfer = streamer._streamer._transfer

        def watch(module: nn.Module, args: object, output: object) -> None:
            torch.cuda._sleep(400_000_000)  # some 200 ms of "compute"
            end = torch.cuda.Event()
            end.record()
            others = [s for s in transfer.ring if s.unit is not None and s.prepared and s.unit is not unit_of[module]]
            while not end.query() and not all(s.ready.query() for s in others):
                time.sleep(0.001)
            overlapped.append(not end.query() and bool(others))

        units = streamer._streamer._units
        unit_of = {block.up: unit for unit in units.values() for block in unit.called}
        handles = [block.up.register_forward_hook(watch) for block in list(model.blocks)[:-1]]
        model(x)
        for handle in handles:
            handle.remove()
    assert overlapped == [True] * 5


def test_a_pipeline_that_was_on_the_gpu_goes_back_to_it() -> None:
    model = stack(num_blocks=4).cuda()
    x = wide_input()
    with torch.no_grad():
        expected = [model(x)]
        before = describe(model)
        allocated = torch.cuda.memory_allocated()
        with offloaded(model):
            gc.collect()
            assert torch.cuda.memory_allocated() < allocated
            assert_equal([model(x)], expected)
        assert_restored(model, before)
        assert_equal([model(x)], expected)


def test_written_buffers_come_back() -> None:
    model, other = toy(writes_buffer=True), toy(writes_buffer=True)
    inputs = [toy_input(n).cuda() for n in range(3)]
    other.cuda()
    with torch.no_grad():
        expected = [other(x) for x in inputs]
        with offloaded(model):
            assert_equal([model(x) for x in inputs], expected)
    assert [float(b.count) for b in model.blocks] == [3.0] * 6
    assert model.blocks[0].count.device.type == "cpu"


def test_streams_and_threads_of_the_caller() -> None:
    model = stack(num_blocks=6)
    inputs = [wide_input(n) for n in range(4)]
    expected = resident(model, *inputs)
    results: dict[int, torch.Tensor] = {}
    torch.cuda.synchronize()

    def work(number: int) -> None:
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            results[number] = model(inputs[number])
        stream.synchronize()

    with offloaded(model):
        for number in range(4):
            work(number)
            assert torch.equal(results.pop(number), expected[number])
        for number in range(4):
            thread = threading.Thread(target=work, args=(number,))
            thread.start()
            thread.join()
            assert torch.equal(results[number], expected[number])


def test_out_of_memory_in_the_middle_of_a_call() -> None:
    model = stack(num_blocks=6)
    before, x = describe(model), wide_input()
    expected = resident(model, x)

    def greedy(module: nn.Module, args: object) -> None:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")

    with pytest.raises(layerstream.BudgetError, match="was refused"), offloaded(model), torch.no_grad():
        handle = model.blocks[3].up.register_forward_pre_hook(greedy)
        with pytest.raises(torch.OutOfMemoryError):
            model(x)
        handle.remove()
        assert_equal([model(x)], expected)
        model.blocks[3].up.register_forward_pre_hook(greedy)
        model(x)
    model.blocks[3].up._forward_pre_hooks.clear()
    assert_restored(model, before)


def test_refused_pinning_leaves_no_error_behind() -> None:
    device = CudaDevice(torch.device("cuda", 0))
    pages = PageMapping(2**21)
    address = pages.range[0]
    assert device.register(address, 2**21)
    assert not device.register(address, 2**21)  # registered already: refused by the driver
    assert float(torch.ones(4, device="cuda").sum()) == 4.0
    device.unregister(address)
    device.unregister(address)
    assert float(torch.ones(4, device="cuda").sum()) == 4.0


def test_staging_ring_when_pinning_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaDevice, "register", lambda self, address, num_bytes: False)
    model = stack()
    x = wide_input()
    expected = resident(model, x)
    with pytest.warns(layerstream.LayerstreamWarning, match="page-locking"):
        streamer = offloaded(model).start()
    with torch.no_grad():
        for _ in range(5):
            assert_equal([model(x)], expected)
    streamer.close()


def test_weights_mapped_from_a_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, x = stack(), wide_input()
    expected = resident(model, x)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    model.load_state_dict(load_file(tmp_path / "weights.safetensors"), assign=True)
    model.requires_grad_(False)
    before = describe(model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with offloaded(model) as streamer, torch.no_grad():
        assert streamer.stats().pinned_bytes >= 0.9 * weights
        for _ in range(3):
            assert_equal([model(x)], expected)
    assert_restored(model, before)


def test_grad_mode_and_backward() -> None:
    model, x = stack(num_blocks=4).requires_grad_(True), wide_input()
    expected = resident(model, x)
    with offloaded(model):
        outputs = [model(x) for _ in range(3)]
        assert_equal([o.detach() for o in outputs], expected * 3)
        with pytest.raises(layerstream.BackwardError):
            outputs[-1].sum().backward()
        del outputs


def test_autocast() -> None:
    model, x = stack(num_blocks=6).float(), wide_input().float()
    with torch.autocast("cuda", torch.bfloat16):
        expected = resident(model, x)
        with offloaded(model), torch.no_grad():
            for _ in range(3):
                assert_equal([model(x)], expected)


def test_compiled_blocks() -> None:
    model, x = stack(num_blocks=4), wide_input()
    for block in model.blocks:
        block.compile()
    expected = resident(model, x)
    with offloaded(model), torch.no_grad():
        for _ in range(3):
            assert_equal([model(x)], expected)


def test_moving_while_active_is_refused() -> None:
    model = stack(num_blocks=4)
    with offloaded(model):
        for move in (lambda: model.to("cpu"), lambda: model.cpu()):
            with pytest.raises(layerstream.MovedWhileStreamingError):
                move()
        model.to("cuda")  # where it is already


@pytest.mark.parametrize("name", ["sd3", "ovis", "sd15", "wan22", "ltx"])
def test_reserved_memory_stays_within_random_budgets(name: str) -> None:
    """Sizes and budgets at random: reserved memory, activations included, never exceeds the budget."""
    try:
        pipe = build_tiny(name, dtype=torch.bfloat16)
    except ImportError as exc:
        pytest.skip(str(exc))
    sizes = [{"height": size, "width": size} for size in (32, 64)]
    modules = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    for module in modules:
        module.to("cuda")
    expected = [run_tiny(pipe, name, **size) for size in sizes]
    for module in modules:
        module.to("cpu")
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        torch.cuda.empty_cache()
        budget = torch.cuda.memory_allocated() + (160 + int(torch.randint(0, 200, (), generator=generator))) * 2**20
        with layerstream.offload(pipe, vram_budget=budget) as streamer:
            for size, image in zip([*sizes, *sizes], [*expected, *expected], strict=True):
                assert torch.equal(run_tiny(pipe, name, **size).cpu(), image.cpu())
                assert torch.cuda.memory_reserved() <= budget
            assert streamer.stats().peak_reserved_bytes <= budget


def test_a_foreign_allocation_that_eats_the_room_is_named() -> None:
    model = stack()
    torch.cuda.empty_cache()
    budget = torch.cuda.memory_allocated() + 256 * 2**20
    with (
        pytest.raises(layerstream.BudgetError, match="other tensors.* were there before"),
        layerstream.offload(model, vram_budget=budget),
        torch.no_grad(),
    ):
        model(wide_input())
        model(wide_input())
        eaten = []
        for _ in range(80):
            eaten.append(torch.empty(2**21, dtype=torch.uint8, device="cuda"))
        for rows in (64, 128, 4096, 16384, 65536):
            model(wide_input(rows=rows))


def test_fused_lora_is_what_the_gpu_computes() -> None:
    """A CPU rounds otherwise than a GPU: merging while streaming is done on the device."""
    peft = pytest.importorskip("peft")
    images = []
    for is_streamed in (False, True):
        pipe = build_tiny("sd3", dtype=torch.bfloat16)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        if is_streamed:
            with layerstream.offload(pipe, vram_budget="min"):
                pipe.transformer.add_adapter(config, adapter_name="style")
                pipe.transformer.fuse_lora()
                images.append(run_tiny(pipe, "sd3").cpu())
        else:
            pipe.transformer.add_adapter(config, adapter_name="style")
            pipe.to("cuda")
            pipe.transformer.fuse_lora()
            images.append(run_tiny(pipe, "sd3").cpu())
    assert torch.equal(images[0], images[1])


def test_two_streamers_share_the_smallest_budget_and_end_in_any_order() -> None:
    first, second, x = stack(num_blocks=4), stack(num_blocks=5), wide_input()
    expected = resident(first, x), resident(second, x)
    torch.cuda.empty_cache()
    read = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: None)
    before = read()
    base = torch.cuda.memory_allocated()
    one = layerstream.offload(first, vram_budget=base + 300 * 2**20).start()
    two = layerstream.offload(second, vram_budget=base + 400 * 2**20).start()
    with torch.no_grad():
        assert_equal([second(x)], expected[1])
        one.close()
        assert_equal([second(x)], expected[1])
        one.start()
        two.close()
        assert_equal([first(x)], expected[0])
        assert torch.cuda.memory_reserved() <= base + 300 * 2**20
        one.close()
    assert read() == before


def test_a_refused_call_leaves_nothing_on_the_device() -> None:
    """Whoever catches the error and makes the batch smaller needs the room now."""
    model, x = stack(), wide_input()
    expected = resident(model, x)
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    budget = base + 256 * 2**20
    try:
        with layerstream.offload(model, vram_budget=budget), torch.no_grad():
            model(wide_input(rows=2**16))
        pytest.fail("it fits")
    except layerstream.BudgetError as error:
        assert error.needed_bytes is not None
        assert error.needed_bytes > budget
        assert torch.cuda.memory_allocated() <= base + 2**25  # a workspace of cuBLAS, perhaps
        with layerstream.offload(model, vram_budget=budget), torch.no_grad():
            assert_equal([model(x)], expected)


def test_layers_cast_inside_each_forward() -> None:
    """Layerwise casting: every layer is kept in 8 bits, and cast up while it runs."""
    images = []
    for is_streamed in (False, True):
        pipe = build_tiny("flux", dtype=torch.bfloat16)
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        if is_streamed:
            with layerstream.offload(pipe, vram_budget="min"):
                images += [run_tiny(pipe, "flux").cpu() for _ in range(2)]
        else:
            pipe.to("cuda")
            images.append(run_tiny(pipe, "flux").cpu())
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])
