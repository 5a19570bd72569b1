"""The engine as a whole, on the adversarial device: each test is a trap that somebody fell into."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import layerstream
from layerstream.device.simulated import SimulatedDevice
from layerstream.hooks import compiled
from tests.fakes import Toy, adversary, assert_equal, assert_restored, describe, run, toy, toy_input, twin


def offloaded(
    model: nn.Module,
    device: SimulatedDevice,
    *,
    slots: int | None = None,
    budget: int | str = "min",
    call_timeout: float | None = None,
):
    streamer = layerstream.offload(model, vram_budget=budget, device=device, call_timeout=call_timeout)
    streamer._num_slots = slots
    return streamer


@pytest.mark.parametrize("copies", ["at_once", "late", "random"])
@pytest.mark.parametrize("slots", [2, 3, 4])
def test_equal_and_restored(copies: str, slots: int) -> None:
    model = toy()
    expected, before = run(twin(model)), describe(model)
    device = adversary(copies=copies)
    with offloaded(model, device, slots=slots) as streamer, device.checking():
        assert_equal(run(model), expected)
        assert streamer.stats().num_streamed_blocks == 6
    assert_restored(model, before)
    assert_equal(run(model), expected)
    assert device.buffer_bytes == 0
    assert not device.registered


def test_weights_on_the_device_are_a_fraction() -> None:
    model = toy(num_blocks=12)
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    device = adversary()
    with offloaded(model, device):
        run(model)
        assert device.peak_buffer_bytes < weights / 3


def test_steady_state_needs_no_demand_load() -> None:
    device = adversary()
    with offloaded(model := toy(), device) as streamer:
        run(model, passes=2)
        before = streamer.stats().num_demand_loads
        loads = streamer.stats().num_loads
        run(model, passes=5)
        assert streamer.stats().num_demand_loads == before
        assert streamer.stats().num_loads == loads + 5 * 6


def test_host_never_waits_in_the_steady_state() -> None:
    model = toy()
    device = adversary()
    with offloaded(model, device):
        run(model)
        device.synchronize = None  # type: ignore[assignment]  # would raise if called
        device.synchronize_event = None  # type: ignore[assignment]
        try:
            run(model)
        finally:
            del device.synchronize, device.synchronize_event


@pytest.mark.parametrize(
    "order", [[0, 1, 2], [5, 4, 3, 2, 1, 0], [0, 0, 0, 1, 1], [3], [0, 2, 4, 1, 3, 5, 0], [0, 1, 2, 3, 4, 5, 2, 2]]
)
@pytest.mark.parametrize("slots", [2, 3])
def test_any_order_and_a_change_of_order(order: list[int], slots: int) -> None:
    model, resident = toy(), toy()
    device = adversary()
    with offloaded(model, device, slots=slots), device.checking():
        for chosen in (list(range(6)), order, list(range(6)), order, order):
            model.order = resident.order = chosen
            assert_equal(run(model, passes=2), run(resident, passes=2))


def test_blocks_of_unlike_size() -> None:
    model = toy(hidden=[64, 8, 32, 8, 128, 16, 8])
    expected = run(twin(model))
    device = adversary()
    with offloaded(model, device), device.checking():
        assert_equal(run(model), expected)


def test_written_buffer_keeps_its_value() -> None:
    model, resident = toy(writes_buffer=True), toy(writes_buffer=True)
    device = adversary()
    before = describe(model)
    with offloaded(model, device), device.checking():
        assert_equal(run(model), run(resident))
    assert_restored(model, before, changed=["count"])
    assert [float(b.count) for b in model.blocks] == [float(b.count) for b in resident.blocks] == [3.0] * 6


def test_buffer_of_a_resident_part_keeps_its_value() -> None:
    class Counted(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(2))
            self.register_buffer("replaced", torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.replaced = self.replaced + 2
            return super().forward(x)

    model = Counted()
    with offloaded(model, adversary()):
        run(model)
    assert model.calls.tolist() == [3.0, 3.0]
    assert model.replaced.tolist() == [6.0, 6.0]


def test_in_place_write_to_an_absent_parameter_lands_in_the_master_copy() -> None:
    model = toy()
    with offloaded(model, adversary()):
        run(model)
        with torch.no_grad():
            for block in model.blocks:
                block.scale.mul_(2)
        streamed = run(model)
    other = toy()
    with torch.no_grad():
        for block in other.blocks:
            block.scale.mul_(2)
    assert_equal(streamed, run(other))
    assert_equal(run(model), run(other))


def test_load_state_dict_while_streaming() -> None:
    model, resident, other = toy(seed=0), toy(seed=0), toy(seed=5)
    resident.load_state_dict(other.state_dict())
    expected = run(resident)
    with offloaded(model, adversary()):
        run(model)
        model.load_state_dict(other.state_dict())
        assert_equal(run(model), expected)
    assert_equal(run(model), expected)


def test_state_dict_values_stay_right_after_their_slots_are_reused() -> None:
    model = toy()
    truth = {k: v.clone() for k, v in model.state_dict().items()}
    device = adversary()
    with offloaded(model, device):
        held = model.state_dict()
        run(model)
        for name, value in truth.items():
            assert torch.equal(held[name], value), name


def test_a_kept_view_of_a_weight_stays_right() -> None:
    model = toy()
    truth = model.blocks[2].up.weight.detach().clone()
    kept = []

    def keep(module: nn.Module, args: object, output: object) -> None:
        kept.append(module.up.weight.detach())

    handle = model.blocks[2].register_forward_hook(keep)
    with offloaded(model, adversary()):
        run(model)
        assert len(kept) == 3
        assert all(torch.equal(k, truth) for k in kept)
    assert all(torch.equal(k, truth) for k in kept)
    handle.remove()


def test_output_that_aliases_a_weight() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(2, 8))

        def forward(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return self.table[1:], {"all": self.table.expand(3, 2, 8)}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Table() for _ in range(5))

        def forward(self) -> torch.Tensor:
            found = [layer() for layer in self.layers]
            return torch.cat([row for row, _ in found] + [both["all"].flatten(0, 1) for _, both in found])

    torch.manual_seed(0)
    model = Model()
    device = adversary()
    with torch.no_grad():
        expected = model()
        with offloaded(model, device) as streamer, device.checking():
            assert torch.equal(model(), expected)
            assert torch.equal(model(), expected)
            assert streamer.stats().peak_device_bytes <= 2 * 256  # cloned, not kept alive slot by slot


def test_hooks_that_users_put_on_a_block_see_its_weights() -> None:
    model = toy()
    truth = [float(b.scale.detach().sum()) for b in model.blocks]
    seen: list[tuple[str, int, float]] = []
    handles = []
    for number, block in enumerate(model.blocks):
        handles.append(
            block.register_forward_pre_hook(
                lambda m, a, n=number: seen.append(("pre", n, float(m.scale.detach().sum())))
            )
        )
    with offloaded(model, adversary()) as streamer:
        for number, block in enumerate(model.blocks):
            handles.append(
                block.register_forward_hook(
                    lambda m, a, o, n=number: seen.append(("post", n, float(m.scale.detach().sum())))
                )
            )
        run(model, passes=2)
        assert streamer.stats().num_touch_loads == 0
    assert seen == [(w, n, truth[n]) for _ in range(2) for n in range(6) for w in ("pre", "post")]
    run(model, passes=1)
    for handle in handles:
        handle.remove()


def test_weights_read_from_outside_their_block() -> None:
    class Peeking(Toy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * self.blocks[4].scale.mean()
            x = self.embed(x) + self.blocks[3].norm(self.embed(x))
            for number, block in enumerate(self.blocks):
                x = block(x) + self.blocks[(number + 2) % 6].scale
            return self.head(x)

    torch.manual_seed(0)
    model = Peeking().eval()
    resident = twin(model)
    for slots in (2, 3, 5):
        device = adversary()
        with offloaded(model, device, slots=slots) as streamer, device.checking():
            assert_equal(run(model), run(resident))
            assert streamer.stats().num_touch_loads > 0 or slots > 2


def test_one_operation_over_weights_of_all_blocks() -> None:
    model = toy()
    expected = torch.cat([b.scale for b in model.blocks])
    device = adversary()
    with offloaded(model, device) as streamer, device.checking(), torch.no_grad():
        assert torch.equal(torch.cat([b.scale for b in model.blocks]), expected)
        assert streamer.stats().num_extra_slots >= 4
        run(model)
        assert len(streamer._streamer._transfer.ring) == 2
        assert not streamer._streamer._transfer.extra


def test_copies_are_plain_and_independent() -> None:
    model = toy()
    expected = run(twin(model))
    with offloaded(model, adversary()):
        copied = copy.deepcopy(model)
        run(model, 1)
        parameter = copy.deepcopy(model.blocks[5].scale)
        again = pickle.loads(pickle.dumps(model.blocks[4].scale))
        buffer = io.BytesIO()
        torch.save(model.blocks[3].state_dict(), buffer)
        assert type(parameter) is nn.Parameter
        assert type(again) is nn.Parameter
        assert not vars(again)
        assert all(type(p) is nn.Parameter for p in copied.parameters())
        assert_equal(run(copied), expected)
        assert_equal(run(model), expected)
        copied.to(torch.float64)  # a copy is free to be cast
    buffer.seek(0)
    assert torch.equal(torch.load(buffer)["scale"], model.blocks[3].scale)
    assert copied.embed.weight.dtype == torch.float64


@pytest.mark.parametrize("first", ["inference", "no_grad", "grad"])
def test_modes_may_change_between_calls(first: str) -> None:
    model = toy()
    expected = run(twin(model), passes=1)
    modes = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
    device = adversary()
    with modes[first](), offloaded(model, device), device.checking():
        for name in ("inference", "no_grad", "grad", first):
            with modes[name]():
                assert_equal([model(toy_input(0))], expected)


def test_entering_inside_inference_mode_and_leaving_outside() -> None:
    model = toy()
    before = describe(model)
    streamer = offloaded(model, adversary())
    with torch.inference_mode():
        streamer.start()
        model(toy_input())
    run(model, 1)
    streamer.close()
    assert_restored(model, before)


def test_parameters_made_under_inference_mode() -> None:
    with torch.inference_mode():
        model = toy()
    expected = run(model)
    with offloaded(model, adversary()):
        assert_equal(run(model), expected)
    assert_equal(run(model), expected)


def test_backward_through_streamed_weights_raises() -> None:
    model = toy()
    with offloaded(model, adversary()):
        loss = model(toy_input()).sum()
        with pytest.raises(layerstream.BackwardError, match=r"Toy\.blocks\.5.*torch\.no_grad"):
            loss.backward()
    assert all(p.grad is None for p in model.blocks.parameters())


def test_backward_past_the_blocks_outputs_still_raises() -> None:
    """Autograd's own version check, where a block's output never reaches the loss as a tensor of its own."""
    model = toy()
    saved = []

    class Stash(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            saved.append(x)
            return x

    model.blocks[1].norm = nn.Sequential(model.blocks[1].norm, nn.Linear(16, 16), Stash())
    with offloaded(model, adversary()):
        model(toy_input())
        with pytest.raises(RuntimeError, match="streamed|modified by an inplace operation"):
            saved[0].sum().backward()


def test_grad_mode_does_not_keep_every_slot_alive() -> None:
    model = toy(num_blocks=10)
    device = adversary()
    with offloaded(model, device), torch.enable_grad():
        outputs = [model(toy_input()) for _ in range(3)]
        assert device.peak_buffer_bytes == device.buffer_bytes
    assert outputs[0].requires_grad


def test_autocast_does_not_keep_cast_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ModuleList([nn.Linear(16, 16) for _ in range(6)]))
    model.forward = lambda x: [x := layer(x) for layer in model[1]][-1]
    x = torch.randn(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x).clone()
        cleared: list[int] = []
        clear = torch.clear_autocast_cache
        monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (cleared.append(1), clear()))
        with offloaded(model, adversary()):
            assert torch.equal(model(x), expected)
            assert torch.equal(model(x), expected)
        assert len(cleared) >= 2 * 6 - 2  # once for each block whose slot another takes
    assert not torch.is_autocast_enabled("cpu")


def test_tied_weights_stay_tied_and_are_stored_once() -> None:
    model = toy()
    model.blocks[4].up.weight = model.blocks[1].up.weight
    model.blocks[3].scale.data = model.blocks[2].scale.data
    shared = nn.Linear(16, 16)
    model.blocks[0].extra = model.blocks[5].extra = shared
    model.embed.tied = model.head.bias
    before = describe(model)
    expected = run(model)
    device = adversary()
    with offloaded(model, device), device.checking():
        assert model.blocks[4].up.weight is model.blocks[1].up.weight
        assert_equal(run(model), expected)
        with torch.no_grad():
            model.blocks[2].scale.add_(1)
        assert torch.equal(model.blocks[3].scale, model.blocks[2].scale)
    assert_restored(model, before, changed=["blocks.2.scale", "blocks.3.scale"])
    assert model.blocks[3].scale.data_ptr() == model.blocks[2].scale.data_ptr()


def test_transformer_encoder_layer_keeps_its_fast_path() -> None:
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0) for _ in range(4)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model = Model().eval()
    x = torch.randn(2, 5, 16)
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            expected = model(x)
            with offloaded(model, adversary()):
                assert torch.equal(model(x), expected)
                assert torch.equal(model(x), expected)


def test_lstm_attention_and_weight_norm() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 8, batch_first=True)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.lstm(x)[0]
            return self.normed(x + self.attention(x, x, x, need_weights=False)[0])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Mixed() for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    model = Model().eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = model(x)
        device = adversary()
        with offloaded(model, device), device.checking():
            assert torch.equal(model(x), expected)
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("error", [ValueError("in a block"), KeyboardInterrupt(), torch.OutOfMemoryError("full")])
@pytest.mark.parametrize("where", ["block", "root"])
def test_restored_after_an_exception_and_usable_before_it_leaves(error: BaseException, where: str) -> None:
    model = toy()
    expected, before = run(twin(model)), describe(model)
    device = adversary()

    def strike(*args: object) -> None:
        raise error

    # Out of memory is told as what it means here.
    leaving = layerstream.BudgetError if isinstance(error, torch.OutOfMemoryError) else type(error)
    with pytest.raises(leaving), offloaded(model, device), device.checking():
        run(model, 1)
        handle = (model.blocks[3].up if where == "block" else model.head).register_forward_pre_hook(strike)
        with pytest.raises(type(error)), torch.no_grad():
            model(toy_input())
        handle.remove()
        assert_equal(run(model), expected)  # the context is still good
        result: list[list[torch.Tensor]] = []
        thread = threading.Thread(target=lambda: result.append(run(model)))
        thread.start()
        thread.join()
        assert_equal(result[0], expected)
        raise error
    assert_restored(model, before)
    assert device.buffer_bytes == 0
    assert not device.registered


def test_five_cycles_without_growth() -> None:
    model = toy()
    expected, before = run(twin(model)), describe(model)
    device = adversary()
    streamer = offloaded(model, device)
    for _ in range(5):
        with streamer:
            assert_equal(run(model), expected)
        assert device.buffer_bytes == 0
        assert not device.registered
    assert_restored(model, before)
    assert device.num_buffers == 0


def test_a_block_called_without_its_root() -> None:
    model, resident = toy(), toy()
    x = torch.randn(2, 16)
    device = adversary()
    with torch.no_grad(), offloaded(model, device), device.checking():
        for number in (0, 1, 2, 5, 0):
            assert torch.equal(model.blocks[number](x), resident.blocks[number](x))


def test_streams_of_the_caller_are_read_at_each_use() -> None:
    model, resident = toy(), toy()
    device = adversary()
    with offloaded(model, device), device.checking():
        for _ in range(4):
            with device.use_stream(device.new_stream()):
                assert_equal(run(model, 1), run(resident, 1))
        assert_equal(run(model), run(resident))


@pytest.mark.parametrize("budget", ["min", 40_000, 10**8])
def test_a_second_stream_that_nothing_orders_waits_for_what_is_there(budget: int | str) -> None:
    """Residents and bases were waited for on the first stream, long ago; and what the second reads is not to be
    overwritten before it has."""
    model, resident = toy(), toy()
    device = adversary()
    with offloaded(model, device, budget=budget) as streamer, device.checking():
        for _ in range(5):  # until nothing is measured or planned any more
            assert_equal(run(model), run(resident))
        streams = [device.new_stream() for _ in range(2)]
        for number in range(6):
            with device.use_stream(streams[number % 2], is_ordered=False):
                assert_equal(run(model, 1), run(resident, 1))
                assert torch.equal(model.blocks[2](torch.ones(2, 16)), resident.blocks[2](torch.ones(2, 16)))
            if number == 3:
                with streamer.paused():
                    pass
        assert_equal(run(model), run(resident))


def test_a_stream_for_each_block_of_what_stays() -> None:
    """Blocks whose hooks have nothing to do, each on a stream of its own."""
    device = adversary()
    model, resident = toy(), toy()
    streams = [device.new_stream() for _ in model.blocks]
    with offloaded(model, device, budget=10**8), device.checking(), torch.no_grad():
        for _ in range(5):
            run(model)
        for _ in range(2):
            x = model.embed(toy_input())
            expected = resident.embed(toy_input())
            for stream, block, its in zip(streams, model.blocks, resident.blocks, strict=True):
                with device.use_stream(stream, is_ordered=False):
                    x, expected = block(x), its(expected)
            assert torch.equal(x, expected)


# ---- exceptions of the caller's


@pytest.mark.parametrize("budget", ["min", 40_000])
def test_a_call_inside_an_except_block_is_no_failed_call(budget: int | str) -> None:
    """A retry after an error: what the caller is handling is not what became of this call."""
    model, resident = toy(), toy()
    with offloaded(model, adversary(), budget=budget) as streamer:
        for _ in range(4):
            run(model)
        loads = streamer.stats().num_loads
        run(model)
        usual = streamer.stats().num_loads - loads
        plans = streamer.stats().num_plans
        for error in (torch.OutOfMemoryError("of somebody else"), ValueError("of somebody else")):
            try:
                raise error
            except type(error):
                loads = streamer.stats().num_loads
                assert_equal(run(model), run(resident))
                assert streamer.stats().num_loads - loads == usual
            assert not getattr(error, "__notes__", [])
        assert streamer.stats().num_plans == plans


def test_an_error_raised_while_another_is_handled_is_the_calls_own() -> None:
    model = toy()

    def fail(module: nn.Module, args: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    with offloaded(model, adversary()) as streamer:
        run(model)
        handle = model.blocks[2].up.register_forward_pre_hook(fail)
        try:
            raise torch.OutOfMemoryError("of the caller")
        except torch.OutOfMemoryError as outer:
            with pytest.raises(torch.OutOfMemoryError, match="Tried") as inner:
                run(model, 1)
            assert inner.value.__context__ is outer
        if sys.version_info >= (3, 11):
            assert any("layerstream" in note for note in inner.value.__notes__)
        handle.remove()
        assert streamer.is_active


# ---- autocast


@pytest.mark.parametrize("share", [0.5, 1.0, 1.6])
def test_one_autocast_region_over_several_passes_keeps_the_budget(share: float) -> None:
    """Autocast keeps a cast copy of every fp32 parameter until its region ends."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(12)]))
    model.forward = lambda x: functools.reduce(lambda x, layer: layer(x), model[0], x)
    weights = 12 * 64 * 64 * 4
    x = torch.randn(1, 64)
    device = adversary()
    expected = []
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = [model(x) for _ in range(4)]
    torch.clear_autocast_cache()
    budget = int(share * weights) + 2**14  # and one block's cast
    with offloaded(model, device, budget=budget) as streamer, device.checking(), torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            outputs = [model(x) for _ in range(4)]
        assert streamer.stats().peak_reserved_bytes <= budget
    assert_equal(outputs, expected)


@pytest.fixture
def nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own: where something was, hooks stay on."""
    monkeypatch.setattr(compiled, "is_in_use", lambda: False)


@contextlib.contextmanager
def settled_under_autocast(model: Toy) -> Iterator[Callable[[], None]]:
    """Streams it through calls under autocast until blocks that stay have the hooks that they keep. Gives such a call,
    which compares."""
    inputs = toy_input()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = twin(model)(inputs)

    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert_equal([model(inputs)], [expected])

    with offloaded(model, adversary(), budget=2**24), torch.no_grad():
        for _ in range(6):
            call()
        yield call


@pytest.mark.usefixtures("nothing_was_compiled")
@pytest.mark.parametrize(
    ("dtype", "requires_grad", "is_kept"),
    [(torch.float32, True, True), (torch.float32, False, False), (torch.bfloat16, True, False)],
)
def test_under_autocast_blocks_that_stay_have_hooks_only_where_casts_are_kept(
    dtype: torch.dtype, requires_grad: bool, is_kept: bool
) -> None:
    model = toy(writes_buffer=False).to(dtype).requires_grad_(requires_grad)
    with settled_under_autocast(model):
        assert any(block._forward_hooks for block in model.blocks) == is_kept


@pytest.mark.usefixtures("nothing_was_compiled")
def test_hooks_come_back_when_autocast_would_keep_what_it_did_not_before() -> None:
    model = toy(writes_buffer=False).requires_grad_(False)
    with settled_under_autocast(model) as call:
        assert not any(block._forward_hooks for block in model.blocks)
        model.requires_grad_(True)
        call()
        assert all(block._forward_hooks for block in model.blocks)


def test_a_thread_per_call() -> None:
    model, resident = toy(), toy()
    expected = run(resident)
    results: list[list[torch.Tensor]] = []
    device = adversary()
    with offloaded(model, device):
        for _ in range(3):
            thread = threading.Thread(target=lambda: results.append(run(model)))
            thread.start()
            thread.join()
    for result in results:
        assert_equal(result, expected)


def test_a_second_thread_is_refused() -> None:
    model, resident = toy(), toy()
    inside, go_on = threading.Event(), threading.Event()
    errors: list[BaseException] = []
    results: list[torch.Tensor] = []

    def pause(module: nn.Module, args: object) -> None:
        if threading.current_thread().name == "first":
            inside.set()
            assert go_on.wait(10)

    handle = model.blocks[2].up.register_forward_pre_hook(pause)

    def second() -> None:
        for use in (
            lambda: run(model, 1),
            lambda: model.blocks[5].scale.sum(),
            lambda: model.blocks[0](torch.ones(2, 16)),
        ):
            try:
                use()
            except layerstream.ConcurrentUseError as exc:
                errors.append(exc)

    with offloaded(model, adversary(), call_timeout=0) as streamer:
        first = threading.Thread(target=lambda: results.extend(run(model, 1)), name="first")
        first.start()
        assert inside.wait(10)
        other = threading.Thread(target=second, name="second")
        other.start()
        other.join()
        closer = threading.Thread(target=streamer.close)
        closer.start()
        closer.join(0.05)
        assert streamer.is_active, "a forward goes on"
        go_on.set()
        closer.join()
        assert not streamer.is_active
        first.join()
        handle.remove()
        assert_equal(results, run(resident, 1))
        streamer.start()
        assert_equal(run(model), run(resident))
    assert len(errors) == 3
    assert "'second'" in str(errors[0])
    assert "'first'" in str(errors[0])
    assert "One call at a time" in str(errors[0])


def test_small_originals_are_let_go_of_however_many_components_there_are() -> None:
    """What describes the components once more would hold the memory of all that is gathered, a second copy of it."""

    def exact(pipe: nn.Module | dict[str, nn.Module]) -> list[bool]:
        with layerstream.offload(pipe, vram_budget="min", device=adversary()) as streamer:
            units = streamer._streamer._units.values()
            return [bound.is_exact for unit in units for bound in unit.binding.tensors]

    alone = exact(toy())
    assert not all(alone)
    assert exact({"a": toy(), "b": toy(1)}) == alone + alone
    tied = {"a": toy(), "b": toy(1), "c": toy(2)}
    tied["b"].head.weight = tied["a"].head.weight
    assert exact(tied).count(False) >= 3 * alone.count(False) - 2


def test_weights_at_home_are_no_device_memory() -> None:
    pipe = {"a": toy(), "b": toy(1)}
    device = adversary()
    with device.accounting(), layerstream.offload(pipe, vram_budget="min", device=device) as streamer:
        before = device.allocated_bytes()
        with streamer.paused():
            assert device.allocated_bytes() <= before


def test_time_to_page_lock_is_a_part_of_the_time_to_enter() -> None:
    with offloaded(toy(), adversary()) as streamer:
        stats = streamer.stats()
    assert 0 < stats.pin_s < stats.enter_s


def test_refused_pinning_falls_back_and_says_so_once() -> None:
    model = toy()
    expected = run(twin(model))
    device = adversary(refuses_pinning=True)
    with pytest.warns(layerstream.LayerstreamWarning, match="page-locking .* was refused") as said:
        streamer = offloaded(model, device).start()
    with device.checking():
        assert_equal(run(model), expected)
    assert streamer.stats().pinned_bytes == 0
    streamer.close()
    assert len(said) == 1


def test_tensor_subclasses_stay_and_are_named_once() -> None:
    class Quantised(torch.Tensor):
        pass

    model = toy()
    model.blocks[1].scale = nn.Parameter(torch.randn(16).as_subclass(Quantised))
    kept = model.blocks[1].scale
    expected = [o.as_subclass(torch.Tensor) for o in run(model)]
    with pytest.warns(layerstream.LayerstreamWarning, match="1 weights of type .*no plain tensors") as said:
        streamer = offloaded(model, adversary()).start()
    assert_equal([o.as_subclass(torch.Tensor) for o in run(model)], expected)
    streamer.close()
    assert len(said) == 1
    assert model.blocks[1].scale is kept


def test_everything_fits() -> None:
    model = toy()
    expected, before = run(twin(model)), describe(model)
    device = adversary()
    with offloaded(model, device, budget=10**9) as streamer, device.checking():
        assert_equal(run(model), expected)
        assert streamer.stats().num_resident_blocks == 6
        loads = streamer.stats().num_loads
        assert_equal(run(model), expected)
        assert streamer.stats().num_loads == loads
        assert streamer.stats().num_slots == 0
    assert_restored(model, before)


def test_no_component_is_on_the_wrong_dtype_or_device() -> None:
    model = toy()
    with offloaded(model, adversary()):
        run(model, 1)
        for block in model.blocks:
            assert block.down.weight.dtype is torch.bfloat16
            assert block.down.weight.device.type == "cpu"
            assert block.transposed.shape == (16, 32)
            assert block.transposed.stride() == (1, 16)
            assert isinstance(block.transposed, nn.Parameter)


def test_decorators() -> None:
    model = toy()
    expected, before = run(twin(model)), describe(model)
    device = adversary()

    @layerstream.offload(vram_budget="min", device=device)
    def work(pipe: nn.Module, passes: int) -> list[torch.Tensor]:
        """Runs."""
        assert pipe.blocks[0]._forward_hooks
        return run(pipe, passes)

    @layerstream.offload(vram_budget="min", device=device)
    class Pipe:
        def __init__(self) -> None:
            self.components = {"transformer": model, "name": "x"}

        def __call__(self, passes: int = 3) -> list[torch.Tensor]:
            """Calls."""
            assert model.blocks[0]._forward_hooks
            return run(model, passes)

    @layerstream.offload(model, vram_budget="min", device=device)
    def bound(passes: int) -> list[torch.Tensor]:
        assert model.blocks[0]._forward_hooks
        return run(model, passes)

    @layerstream.offload(vram_budget="min", device=device)
    def stream(pipe: nn.Module):
        for _ in range(3):
            yield run(pipe)
        return "done"

    assert_equal(work(model, 3), expected)
    assert work.__doc__ == "Runs."
    assert_equal(Pipe()(), expected)
    assert Pipe.__call__.__doc__ == "Calls."
    assert_equal(bound(3), expected)
    for outputs in stream(model):
        assert_equal(outputs, expected)
    with layerstream.offload(model, vram_budget="min", device=device):
        assert_equal(work(model, 3), expected)  # inside an outer context it runs as it is
        assert model.blocks[0]._forward_hooks
    bare = layerstream.offload(lambda pipe: len(list(pipe.parameters())))  # on whatever device is there
    assert bare(model) == len(list(model.parameters()))
    assert_restored(model, before)


def test_repr_counts() -> None:
    model = toy()
    streamer = layerstream.offload(model, vram_budget="min", device="cpu")
    assert "not started" in repr(streamer)
    with streamer:
        assert "active, budget the least: 0 blocks resident, 6 streamed" in repr(streamer)
        assert "6 streamed" in str(streamer)
    assert "closed" in repr(streamer)


def test_default_device_and_dtype_of_the_caller_do_not_matter() -> None:
    model = toy()
    expected = run(twin(model))
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            streamer = offloaded(model, adversary()).start()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal(run(model), expected)
    with torch.device("meta"):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        streamer.close()
    assert not any(value.is_meta for value in state.values())
    assert_equal(run(model), expected)


def test_a_streamer_that_its_user_lost_can_be_closed() -> None:
    model = toy()
    before = describe(model)
    offloaded(model, adversary()).start()
    with pytest.raises(layerstream.AlreadyOffloadedError) as refused:
        layerstream.offload(model).start()
    assert isinstance(refused.value.streamer, layerstream.LayerStreamer)
    refused.value.streamer.close()
    assert_restored(model, before)


def test_a_pipeline_dropped_without_closing_gives_its_page_locks_back() -> None:
    device = adversary()
    model = toy()
    offloaded(model, device).start()
    run(model, 1)
    assert device.registered
    del model
    gc.collect()
    assert not device.registered
