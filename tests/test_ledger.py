"""The budget: what is measured, what is planned from it, and what is said when it cannot hold. On the simulated device,
whose numbers are exact: nothing is cached, and an interval's peak is what `Sized` was told to take."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import layerstream
from layerstream.blocks import UnitSpec
from layerstream.device.simulated import SimulatedDevice, SimulatedOutOfMemoryError
from layerstream.engine.ledger import Ledger
from layerstream.planning.order import OrderLearner
from layerstream.planning.phase_plan import PhasePlan
from layerstream.stats import Stats
from tests.fakes import Sized

KIB = 1024
BASE = 256  # of every `Sized`
GRAIN = 256  # of the simulated device's buffers
MARGIN = 8 * GRAIN  # on every measurement


def x(*shape: int) -> torch.Tensor:
    """An input that takes no device memory: no operator makes it."""
    height, width = shape or (1, 8)
    return torch.tensor([[0.0] * width] * height)


def batch(num_bytes: int) -> Any:
    """What a pass takes: so much for each row of its input."""
    return lambda x: num_bytes * x.shape[0]


@contextlib.contextmanager
def streamed(device: SimulatedDevice, pipe: dict[str, nn.Module], budget: int | str) -> Iterator[Any]:
    with layerstream.offload(pipe, vram_budget=budget, device=device) as streamer, device.accounting(), torch.no_grad():
        yield streamer


def phase(streamer: Any, name: str = "net") -> PhasePlan:
    found: PhasePlan = streamer.plan.phase_of(name)
    return found


def num_resident(streamer: Any, name: str = "net") -> int:
    return sum(u.is_block for u in streamer.plan.units if u.index in phase(streamer, name).resident)


def net_of(device: SimulatedDevice, takes: Any, num_blocks: int = 6, num_bytes: int = KIB) -> Sized:
    return Sized(device, [num_bytes] * num_blocks, takes=takes)


LEAST = BASE + 2 * KIB  # of such a net: its base and two slots


class Decoder(Sized):
    """An autoencoder by its methods: it runs once a call."""

    encode = decode = Sized.forward


def vae_of(device: SimulatedDevice, takes: Any = lambda x: 0) -> Decoder:
    return Decoder(device, [], takes=takes)


class Counting(SimulatedDevice):
    """Counts what the engine asks of the device that costs time, or blocks the host, on a real one."""

    NAMES = ("allocated_bytes", "peak_reserved_bytes", "peak_allocated_bytes", "reset_peaks", "num_ooms")
    BLOCKING = ("empty_cache", "synchronize", "synchronize_event", "measure_link")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked: Counter[str] = Counter()

    def __getattribute__(self, name: str) -> Any:
        if name in Counting.NAMES or name in Counting.BLOCKING:
            self.asked[name] += 1
        return super().__getattribute__(name)


# ---- what is measured


@pytest.mark.parametrize("foreign", [0, 3000])
def test_a_reserve_is_the_peak_less_our_weights_and_what_others_had(foreign: int) -> None:
    device = SimulatedDevice()
    net = net_of(device, batch(10_000))
    with device.foreign(foreign), streamed(device, {"net": net}, 60_000) as streamer:
        for _ in range(2):
            net(x())
            assert phase(streamer).phase.reserve_bytes is None
            assert phase(streamer).weights_bytes == phase(streamer).least_bytes == LEAST
        net(x())
        kept = phase(streamer).phase.reserve_bytes
        assert kept is not None
        # Rounded up to a part of the budget, so that a few bytes more do not plan anew.
        assert 0 <= kept - (10_000 + MARGIN + foreign) < GRAIN
        stats = streamer.stats()
        assert stats.foreign_bytes == foreign
        assert stats.peak_reserved_bytes == max(LEAST, phase(streamer).weights_bytes) + 10_000 + foreign
        assert stats.num_plans == 1


def test_what_is_kept_between_passes_is_others_and_not_measured_twice() -> None:
    """A scheduler keeps the last prediction: it is there before the second pass, whose peak contains it."""
    device = SimulatedDevice()
    net = net_of(device, batch(10_000))
    kept = []
    with streamed(device, {"net": net}, 60_000) as streamer:
        for _ in range(3):
            net(x())
            if not kept:
                kept.append(torch.empty(5_000, dtype=torch.uint8))
        reserve = phase(streamer).phase.reserve_bytes
        assert reserve is not None
        # In the first interval it appeared after the peak, in the second it was there from the start.
        assert 0 <= reserve - (10_000 + MARGIN + 5_000) < GRAIN


def test_what_appears_between_two_calls_belongs_to_the_first() -> None:
    """The scheduler's step after a pass may take more than the pass itself."""
    device = SimulatedDevice()
    net, vae = net_of(device, batch(1_000)), vae_of(device)
    pipe = {"net": net, "vae": vae}
    with streamed(device, pipe, 60_000) as streamer:
        for _ in range(2):
            net(x())
            torch.empty(7_000, dtype=torch.uint8)
        vae(x())
        reserve = phase(streamer).phase.reserve_bytes
        assert reserve is not None
        assert 0 <= reserve - (7_000 + MARGIN) < GRAIN
        assert phase(streamer, "vae").phase.reserve_bytes is None


def test_the_margin_is_no_more_than_there_was() -> None:
    """It has just run in the room that there is: the same call must not be refused for the margin's sake."""
    device = SimulatedDevice()
    net = net_of(device, batch(10_000))
    budget = LEAST + 10_000 + 100
    with streamed(device, {"net": net}, budget) as streamer:
        for _ in range(5):
            net(x())
        assert phase(streamer).phase.reserve_bytes == 10_100
        assert streamer.stats().peak_reserved_bytes == LEAST + 10_000
        assert device.num_ooms() == 0


def test_min_measures_as_well_and_changes_nothing() -> None:
    device = SimulatedDevice()
    net = net_of(device, batch(10_000))
    with streamed(device, {"net": net}, "min") as streamer:
        for _ in range(4):
            net(x())
        assert phase(streamer).phase.reserve_bytes == 10_000 + MARGIN + (-(10_000 + MARGIN)) % GRAIN
        assert phase(streamer).weights_bytes == LEAST
        assert streamer.stats().peak_device_bytes == LEAST
        assert streamer.stats().budget_bytes == 0


def test_autograd_is_another_key() -> None:
    device = SimulatedDevice()
    net = net_of(device, batch(10_000))
    with streamed(device, {"net": net}, 60_000) as streamer:
        for _ in range(3):
            net(x())
        with torch.enable_grad():
            net(x())
        assert phase(streamer).phase.reserve_bytes is None


# ---- who stays, by what was measured


def test_a_measured_phase_promotes_a_larger_shape_demotes_and_a_smaller_one_brings_back() -> None:
    device = SimulatedDevice()
    net, vae = net_of(device, batch(1_000), num_blocks=20), vae_of(device)
    budget = 24 * KIB
    with streamed(device, {"net": net, "vae": vae}, budget) as streamer:
        history = []
        for rows in (1, 1, 9, 9, 1, 1, 4, 4, 9):
            for _ in range(3):
                net(x(rows, 8))
            history.append(num_resident(streamer))
            vae(x())
        few = history[2]
        # Four rows are fewer than nine, whose reserve they borrow for two passes.
        assert history == [20, 20, few, few, 20, 20, 15, 15, few]
        assert 0 < few < 15
        assert streamer.stats().peak_reserved_bytes <= budget
        assert device.num_ooms() == 0


def test_another_image_is_measured_with_all_the_room() -> None:
    """A batch of two takes twice what a batch of one does, though each of its tensors is longer by one only."""
    device = SimulatedDevice()
    net = net_of(device, batch(12_000), num_blocks=20)
    with streamed(device, {"net": net}, LEAST + 30_000) as streamer:
        for rows in (1, 1, 1, 1, 2, 2, 2):
            net(x(rows, 8))
        assert streamer.stats().num_evicted > 0
        assert device.num_ooms() == 0


def test_a_phase_gives_up_its_room_for_one_that_was_not_measured_and_takes_it_back() -> None:
    device = SimulatedDevice()
    net, vae = net_of(device, batch(1_000)), vae_of(device, batch(18_000))
    budget = 24 * KIB
    with streamed(device, {"net": net, "vae": vae}, budget) as streamer:
        history = []
        for _ in range(3):
            for _ in range(4):
                net(x())
            history.append(num_resident(streamer))
            vae(x())
            history.append(sum(u in phase(streamer, "vae").kept for u in phase(streamer).resident))
        # The decode is unknown in the first call and keeps nothing; then it keeps what it leaves room for.
        kept = history[-1]
        assert history == [6, 0, 6, kept, 6, kept]
        assert 2 <= kept < 6
        assert streamer.stats().peak_reserved_bytes <= budget


def test_times_are_planned_with_in_the_next_pass() -> None:
    """Which blocks stay depends on how long each computes; a model alone has no other component to wait for."""
    device = SimulatedDevice(link_gb_per_s=1e-3)
    net = Sized(device, [KIB] * 8, ms=[0.1, 0.1, 0.1, 0.1, 4.0, 4.0, 4.0, 4.0])
    with streamed(device, {"net": net}, LEAST + 2 * KIB + 4 * KIB) as streamer:
        for _ in range(7):
            net(x())
        assert phase(streamer).prediction is not None
        costs = streamer.plan.costs
        assert costs is not None
        assert [round(costs.compute_ms[u.index], 6) for u in streamer.plan.units if u.is_block] == [0.1] * 4 + [4.0] * 4


@pytest.mark.parametrize(("budget", "is_one"), [(LEAST + BASE + 4_000, True), (LEAST + 1_000, False)])
def test_components_that_take_turns_share_a_phase_if_the_least_of_both_fits(budget: int, is_one: bool) -> None:
    """They use the same slots, so that the base of the other is all it costs."""
    device = SimulatedDevice()
    pipe = {"net": net_of(device, batch(1_000)), "control": net_of(device, batch(1_000))}
    with streamed(device, pipe, budget) as streamer:
        for _ in range(6):
            pipe["control"](x())
            pipe["net"](x())
        assert [p.phase.components for p in streamer.plan.phases] == (
            [("net", "control")] if is_one else [("net",), ("control",)]
        )
        assert streamer.stats().peak_reserved_bytes <= budget
        # Where they share it, the base that was given up at every turn stays.
        loads = streamer.stats().loaded_bytes
        pipe["control"](x())
        pipe["net"](x())
        assert (streamer.stats().loaded_bytes - loads < 12 * KIB + 2 * BASE) is is_one


def test_what_another_phase_took_is_no_reason_to_refuse_this_one() -> None:
    """A decode that would not fit now may come in other shapes, or not at all."""
    device = SimulatedDevice()
    net, vae = net_of(device, batch(1_000)), vae_of(device, batch(20_000))
    with streamed(device, {"net": net, "vae": vae}, 24 * KIB) as streamer:
        for _ in range(2):
            for _ in range(2):
                net(x())
            vae(x())
        with device.foreign(8_000):
            for _ in range(4):
                net(x())
            assert phase(streamer, "vae").phase.reserve_bytes is None
            assert num_resident(streamer) == 6


# ---- the cap


def test_the_allocator_holds_the_budget_and_gets_its_limit_back() -> None:
    device = SimulatedDevice()
    net = net_of(device, batch(1_000))
    with streamed(device, {"net": net}, 60_000):
        with pytest.raises(SimulatedOutOfMemoryError), device.foreign(60_001):
            pass
        with device.foreign(60_000):
            pass
    with device.foreign(2**40):
        pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_the_callers_own_limit_comes_back(error: type[BaseException]) -> None:
    device = SimulatedDevice()
    device.set_cap(100_000)
    net = net_of(device, batch(1_000))
    with pytest.raises((error, layerstream.BudgetError)), streamed(device, {"net": net}, 60_000):
        net(x())
        with pytest.raises(SimulatedOutOfMemoryError), device.foreign(60_001):
            pass
        raise error
    with device.foreign(100_000):
        pass
    with pytest.raises(SimulatedOutOfMemoryError), device.foreign(100_001):
        pass


def test_a_callers_smaller_limit_is_kept() -> None:
    """The budget is what we may take; it is no permission to take more than the caller allows the process."""
    device = SimulatedDevice()
    device.set_cap(30_000)
    net = net_of(device, batch(1_000))
    with streamed(device, {"net": net}, 60_000), pytest.raises(SimulatedOutOfMemoryError), device.foreign(30_001):
        pass


def test_min_sets_no_cap_and_a_refused_start_leaves_none() -> None:
    device = SimulatedDevice()
    net = net_of(device, batch(1_000))
    with streamed(device, {"net": net}, "min"), device.foreign(2**40):
        net(x())
    with pytest.raises(layerstream.BudgetError), streamed(device, {"net": net}, 1_000):
        pass
    with device.foreign(2**40):
        pass


# ---- what does not fit


def test_too_small_for_the_weights_beside_what_others_hold() -> None:
    device = SimulatedDevice()
    net = net_of(device, batch(0))
    with device.foreign(3_000):
        with pytest.raises(layerstream.BudgetError) as told, streamed(device, {"net": net}, 5_000):
            pass
        assert str(told.value) == (
            "vram_budget 4.9 KiB is too small: while `net` runs, 2 slot(s) for `net.blocks.0` (1.0 KiB each), the "
            "weights outside stacks (256 B) and what others hold (2.9 KiB) need 5.2 KiB before activations. Raise "
            "vram_budget to at least 5304 bytes (5.2 KiB). What a call takes beside that is not known before it has "
            'run: vram_budget="auto", all that is free, does if anything does, and report() then names the least.'
        )
        assert (told.value.budget_bytes, told.value.least_bytes) == (5_000, LEAST + 3_000)
        with pytest.raises(layerstream.BudgetError), streamed(device, {"net": net}, LEAST + 2_999):
            pass
        with streamed(device, {"net": net}, LEAST + 3_000) as streamer:
            for _ in range(3):
                net(x())
            assert streamer.stats().peak_reserved_bytes == LEAST + 3_000


def test_too_small_for_a_pass() -> None:
    device = SimulatedDevice()
    net = net_of(device, batch(10_000))
    with pytest.raises(layerstream.BudgetError) as told, device.foreign(500), streamed(device, {"net": net}, 10_000):
        net(x())
    assert str(told.value) == (
        "vram_budget 9.8 KiB is too small in `net`: an allocation of 9.8 KiB was refused. The peak was 2.7 KiB: "
        "2.2 KiB of weights, 500 B of activations and other tensors, of which 500 B were there before this component "
        "was entered (500 B before streaming began). It needs more than 12804 bytes (12.5 KiB), which it had reached: "
        'vram_budget="auto", all that is free, does if anything does, and report() then names the least. Or make '
        "images or batches smaller; a VAE takes less with enable_tiling() or enable_slicing()."
    )
    least = told.value.least_bytes
    assert least == LEAST + 10_000 + 500
    assert device.num_ooms() == 1
    with device.foreign(500):
        with pytest.raises(layerstream.BudgetError), streamed(device, {"net": net}, least - 1):
            net(x())
        with streamed(device, {"net": net}, least):
            for _ in range(4):
                net(x())


class Layered(Sized):
    """Takes a piece of memory before every block, and keeps all of them until it ends."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for block in self.blocks:
            kept.append(torch.empty(self.takes(x), dtype=torch.uint8))
            x = block(x)
        del kept
        return x


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=2, max_size=6), st.integers(0, 3_000), st.integers(0, 3_000))
def test_following_the_advice_leads_to_a_budget_that_works(sizes: list[int], piece: int, foreign: int) -> None:
    """A refusal knows what was taken up to it, and no more: each is told more than the last, and none too much. What
    is certain to do does at once, and names the least, which does, too."""

    def peak_under(budget: int | str) -> int:
        device = SimulatedDevice()
        net = Layered(device, [KIB * size for size in sizes], takes=batch(piece))
        with device.foreign(foreign), streamed(device, {"net": net}, budget) as streamer:
            for _ in range(4):
                net(x())
            leasts.append(streamer.report().least_bytes)
            return int(streamer.stats().peak_reserved_bytes)

    leasts: list[int | None] = []
    truth = peak_under("min")
    budget = 1
    for _ in range(len(sizes) + 2):
        try:
            assert peak_under(budget) <= budget
            break
        except layerstream.BudgetError as error:
            assert error.least_bytes is not None
            assert budget < error.least_bytes <= truth
            budget = error.least_bytes
            assert error.needed_bytes is not None
            assert peak_under(error.needed_bytes) <= error.needed_bytes
            assert leasts[-1] == truth
    else:
        pytest.fail(f"{budget} of {truth} bytes are not enough yet")
    assert leasts[-1] is not None
    assert peak_under(leasts[-1]) <= leasts[-1]


def test_a_refused_call_leaves_nothing_on_the_device() -> None:
    """Whoever catches the error and makes the image smaller needs the room now, not when garbage is collected."""
    device = SimulatedDevice()
    net = Layered(device, [KIB] * 6, takes=batch(3_000))

    def refused() -> None:
        with pytest.raises(layerstream.BudgetError), streamed(device, {"net": net}, 12_000):
            net(x())

    gc.collect()
    gc.disable()
    try:
        refused()
        assert device.reserved_bytes() == 0
    finally:
        gc.enable()


class Greedy(Sized):
    """Raises what torch does without memory, by itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        super().forward(x)
        raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("budget", ["min", "auto", "50%", 2**49])
def test_the_size_of_what_has_no_limit_is_in_no_error(budget: int | str) -> None:
    device = SimulatedDevice()
    net = Greedy(device, [KIB, KIB])
    for _ in range(2):
        with (
            pytest.raises(layerstream.BudgetError, match="^the device is too small in `net`: an alloc") as error,
            streamed(device, {"net": net}, budget),
        ):
            net(x())
        assert "TiB" not in str(error.value)
        assert str(device.total_bytes()) not in str(error.value)
        assert isinstance(error.value.__cause__, torch.OutOfMemoryError)


def test_foreign_memory_that_came_later_is_named() -> None:
    device = SimulatedDevice()
    net = net_of(device, batch(10_000))
    with (
        pytest.raises(layerstream.BudgetError, match="of which 4.9 KiB were there .* entered \\(2.0 KiB before stream"),
        device.foreign(2 * KIB),
        streamed(device, {"net": net}, LEAST + 2 * KIB + 11_000),
    ):
        net(x())
        with device.foreign(3_000):
            net(x(1, 9))


def test_what_did_not_fit_beside_residents_fits_in_the_next_call() -> None:
    """With `start`, where the error is the caller's to handle: it says so, and the next call has all the room."""
    device = SimulatedDevice()
    net = Sized(device, [KIB] * 20, takes=lambda x: taken[0])
    taken = [1_000]
    streamer = layerstream.offload({"net": net}, vram_budget=22 * KIB, device=device).start()
    with contextlib.closing(streamer), device.accounting(), torch.no_grad():
        for _ in range(4):
            net(x())
        taken[0] = 15_000  # other content in the same shapes, and another algorithm
        with pytest.raises(torch.OutOfMemoryError) as refused:
            net(x())
        notes = getattr(refused.value, "__notes__", ["The next call gets all the room"])
        assert any("The next call gets all the room" in note for note in notes)
        for _ in range(4):
            net(x())
        assert 0 < num_resident(streamer) < 20


def test_a_margin_is_no_reason_to_refuse() -> None:
    """Others hold a little more than when it was measured: it still fits, if only just."""
    device = SimulatedDevice()
    net = net_of(device, batch(10_000))
    with streamed(device, {"net": net}, LEAST + 10_000 + MARGIN) as streamer:
        for _ in range(4):
            net(x())
        with device.foreign(MARGIN // 2):
            net(x())
        assert streamer.stats().peak_reserved_bytes == LEAST + 10_000 + MARGIN // 2


def test_room_to_grow_is_no_reason_to_refuse() -> None:
    """A quarter more is kept for the tokens to come; where the budget has no quarter more, it has what there is."""
    device = SimulatedDevice()
    net = Sized(device, [KIB] * 6, takes=lambda x: 100 * x.shape[1])
    budget = LEAST + 13_000
    with streamed(device, {"net": net}, budget):
        for _ in range(3):
            net(x(1, 100))
        for length in range(101, 130):
            net(x(1, length))
        assert device.num_ooms() == 0


@pytest.mark.parametrize("takes", [lambda length: 1_300 * length, lambda length: 10 * length**2])
@pytest.mark.parametrize("others", [0, 4_000])
def test_what_a_loop_takes_may_grow_with_the_square_of_its_tokens(takes: Any, others: int) -> None:
    """Attention without a cache; beside a tensor that does not grow: of both, the tokens are few."""
    device = SimulatedDevice()

    class Attending(Sized):
        def forward(self, x: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    net = Attending(device, [10 * KIB] * 20, takes=lambda x: takes(x.shape[1]))
    beside = x(1, others)
    with streamed(device, {"net": net}, BASE + 2 * 10 * KIB + takes(160)) as streamer:
        for _ in range(3):
            net(x(1, 100), beside)
        assert num_resident(streamer) > 4  # else all the room there is would be free anyway
        for length in range(101, 160):
            net(x(1, length), beside)
        assert device.num_ooms() == 0


# A batch of six after one of five looks like the next token of a loop. The plan for five had no room for a sixth,
# because `encoder` stays beside it.
@example([("encoder", 1, 2, 0), ("vae", 5, 2, 0), ("vae", 6, 1, 0)], 0)
@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["encoder", "net", "vae"]), st.integers(1, 6), st.integers(1, 5), st.integers(0, 6_000)
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(0, 30_000),
)
def test_what_fits_is_never_refused(calls: list[tuple[str, int, int, int]], spare: int) -> None:
    """With the least weights of its own component and all others gone, whatever ran before and whatever others hold."""
    device = SimulatedDevice()
    pipe: dict[str, Sized] = {
        "encoder": net_of(device, batch(700)),
        "net": net_of(device, batch(1_900), num_blocks=12),
        "vae": vae_of(device, batch(3_000)),
    }
    least = {"encoder": LEAST, "net": LEAST, "vae": BASE}
    budget = LEAST + max(pipe[name].takes(x(rows, 8)) for name, rows, _, _ in calls) + spare
    last = ""
    with streamed(device, {**pipe}, budget) as streamer, contextlib.ExitStack() as held:
        for name, rows, count, foreign in calls:
            if name != last:  # in the middle of a phase others are not looked at in every pass
                held.close()
                held.enter_context(device.foreign(min(foreign, device.free_bytes())))
            others = device.reserved_bytes() - device.buffer_bytes
            if least[name] + others + pipe[name].takes(x(rows, 8)) <= budget:
                last = name
                for _ in range(count):
                    pipe[name](x(rows, 8))
        assert streamer.stats().peak_reserved_bytes <= budget
        assert device.num_ooms() == 0


# ---- operators that were refused memory and said nothing


class Swallowing(Sized):
    """Like a convolution that tries a faster algorithm first, and takes another where its workspace is refused."""

    workspace_bytes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.empty(self.workspace_bytes, dtype=torch.uint8)
        return super().forward(x)


def test_an_operator_that_swallows_a_refusal_raises() -> None:
    device = SimulatedDevice()
    net = Swallowing(device, [KIB] * 6)
    net.workspace_bytes = 50_000
    with pytest.raises(layerstream.BudgetError) as told, streamed(device, {"net": net}, 40_000):
        net(x())
    assert str(told.value) == (
        "vram_budget 39.1 KiB is too small in `net`: an operator was refused memory and took another way, so that the "
        "result may differ from the resident pipeline's. The peak was 2.2 KiB: 2.2 KiB of weights, 0 B of activations "
        "and other tensors. The next call gets all the room there is: call again, or make images or batches smaller; a "
        "VAE takes less with enable_tiling() or enable_slicing()."
    )
    with streamed(device, {"net": net}, LEAST + 50_000):
        for _ in range(5):
            net(x())


def test_a_swallowed_refusal_raises_in_a_call_inside_an_except_block_too() -> None:
    """The error that the caller is handling says nothing of this call."""
    device = SimulatedDevice()
    net = Swallowing(device, [KIB] * 6)
    net.workspace_bytes = 50_000
    with (
        pytest.raises(layerstream.BudgetError, match="an operator was refused"),
        streamed(device, {"net": net}, 40_000),
    ):
        try:
            raise ValueError("of the caller")
        except ValueError:
            net(x())


def test_the_peak_of_a_refused_call_is_counted() -> None:
    device = SimulatedDevice()
    net = Layered(device, [KIB] * 6, takes=batch(3_000))
    with pytest.raises(layerstream.BudgetError), streamed(device, {"net": net}, 12_000) as streamer:
        net(x())
    assert streamer.stats().peak_reserved_bytes == LEAST + 3 * 3_000


def test_refusals_of_others_are_not_an_operators() -> None:
    device = SimulatedDevice()
    net = Swallowing(device, [KIB] * 6)
    with streamed(device, {"net": net}, 40_000):
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError), device.foreign(50_000):
                pass
            net(x())


@pytest.mark.parametrize("is_inside", [False, True])
@pytest.mark.parametrize("num_passes", [0, 1, 2, 3, 8])
def test_a_swallowed_refusal_is_noticed_whenever_it_happens(num_passes: int, is_inside: bool) -> None:
    """Other libraries may take the room at any time; that nothing is left to learn of a phase does not help then."""
    device = SimulatedDevice()
    net, vae = Swallowing(device, [KIB] * 6), vae_of(device)
    net.workspace_bytes = 20_000
    taken = contextlib.ExitStack()
    with taken, pytest.raises(layerstream.BudgetError), streamed(device, {"net": net, "vae": vae}, 60_000):
        for _ in range(num_passes):
            net(x())
        if is_inside:
            net.register_forward_pre_hook(lambda *_: taken.enter_context(device.foreign(45_000)))
        else:
            taken.enter_context(device.foreign(45_000))
        net(x())
        assert device.num_ooms() == 1
        vae(x())  # at the latest when the next component begins


# ---- what others hold


def ledger(device: SimulatedDevice, budget: int | None, num_blocks: int = 6) -> Ledger:
    found = Ledger(device, Stats(), budget, None)
    units = [UnitSpec(0, "net (base)", "net", None, BASE, True)]
    units += [UnitSpec(n, f"net.{n}", "net", "blocks", KIB, True) for n in range(1, num_blocks + 1)]
    found.components([("net", True)], units, (), (), OrderLearner([]))
    found.open(0)
    return found


def enter(found: Ledger, shape: Sequence[int] = (1, 8), weights_bytes: int = 0, took_bytes: int = 0) -> PhasePlan:
    """What the streamer does when a component is entered; `took_bytes` come and go meanwhile."""
    plan = found.begin("net", "", (("float32", tuple(shape)),), False, weights_bytes)
    found.start_interval(weights_bytes)
    with found._device.foreign(took_bytes):  # type: ignore[attr-defined]
        pass
    return plan


def test_growth_of_others_is_watched_where_the_budget_is_full() -> None:
    for budget, is_watched in ((LEAST + 7_000, True), (10 * 60_000, False)):
        device = Counting()
        found = ledger(device, budget)
        weights = device.allocate(LEAST)
        for _ in range(4):
            enter(found, weights_bytes=LEAST, took_bytes=4_000)
        device.asked.clear()
        assert not found.has_grown(LEAST)
        with device.foreign(1):
            assert found.has_grown(LEAST) is is_watched
        device.free(weights)
        assert device.asked == ({"allocated_bytes": 2} if is_watched else {}), "looking costs time on a GPU"
    assert not ledger(SimulatedDevice(), None).has_grown(0), "without a budget there is nothing to hold"


def test_others_that_grow_make_residents_go() -> None:
    device = SimulatedDevice()
    net = net_of(device, batch(1_000), num_blocks=20)
    budget = 24 * KIB
    with streamed(device, {"net": net}, budget) as streamer:
        for _ in range(4):
            net(x())
        assert num_resident(streamer) == 20
        kept = []
        for _ in range(15):  # images that are kept on the device
            kept.append(torch.empty(KIB, dtype=torch.uint8))
            net(x())
        assert num_resident(streamer) < 8
        assert streamer.stats().peak_reserved_bytes <= budget


def test_others_that_take_what_was_ample_make_residents_go() -> None:
    """Everything fits, with a fifth of the budget to spare. What comes later, little by little, may take more."""
    device = SimulatedDevice()
    net = net_of(device, batch(1_000), num_blocks=20)
    budget = (BASE + 20 * KIB + 1_000 + MARGIN) * 5 // 4
    with streamed(device, {"net": net}, budget) as streamer:
        for _ in range(4):
            net(x())
        assert num_resident(streamer) == 20
        kept = []
        for _ in range(60):
            kept.append(torch.empty(256, dtype=torch.uint8))
            net(x())
        assert num_resident(streamer) < 20


# ---- the steady state


def passes(device: Counting, streamer: Any, net: nn.Module, count: int) -> Counter[str]:
    """What so many equal passes ask of the device."""
    plans = streamer._last.stats.num_plans
    device.asked.clear()
    for _ in range(count):
        net(x())
    assert streamer._last.stats.num_plans == plans
    return Counter(device.asked)


def test_where_there_is_ample_room_nothing_is_read_in_most_passes() -> None:
    device = Counting()
    net = net_of(device, batch(1_000))
    with streamed(device, {"net": net}, 2**20) as streamer:
        for _ in range(4):
            net(x())
        asked = passes(device, streamer, net, 50)
        assert asked.keys() <= {"allocated_bytes"}
        assert asked["allocated_bytes"] <= 10


def test_where_the_budget_is_full_one_number_is_read_a_pass() -> None:
    device = Counting()
    net = net_of(device, batch(10_000), num_blocks=20)
    with streamed(device, {"net": net}, 20 * KIB) as streamer:
        for _ in range(7):
            net(x())
        assert 0 < num_resident(streamer) < 20
        assert passes(device, streamer, net, 50) == {"allocated_bytes": 50}


def test_equal_calls_plan_nothing_and_read_once_a_phase() -> None:
    device = Counting()
    pipe = {
        "encoder": net_of(device, batch(2_000)),
        "net": net_of(device, batch(9_000), num_blocks=12),
        "vae": vae_of(device, batch(15_000)),
    }
    with streamed(device, pipe, 24 * KIB) as streamer:

        def call(num_steps: int) -> Counter[str]:
            device.asked.clear()
            embedding = torch.empty(500, dtype=torch.uint8)  # kept until the end, as others' memory
            pipe["encoder"](x())
            for _ in range(num_steps):
                pipe["net"](x())
            pipe["vae"](x())
            del embedding
            return Counter(device.asked)

        for _ in range(5):
            call(10)
        plans = streamer._last.stats.num_plans  # asking `stats()` reads a peak
        asked = [call(num_steps) for num_steps in (10, 10, 30)]
        assert streamer._last.stats.num_plans == plans
        assert asked[0] == asked[1]
        assert all(asked[0][name] <= 3 * len(pipe) for name in asked[0] if name != "allocated_bytes")
        # More steps read one number more each, or none.
        assert asked[2] - asked[0] in (Counter(), Counter({"allocated_bytes": 20}))


def test_a_token_loop_reads_and_plans_now_and_then() -> None:
    device = Counting()
    net = Sized(device, [KIB] * 20, takes=lambda x: 100 * x.shape[1])
    inputs = [x(1, length) for length in range(100, 500)]
    with streamed(device, {"net": net}, 2**20) as streamer:
        for _ in range(4):
            net(inputs[0])
        device.asked.clear()
        for token in inputs:
            net(token)
        # From 100 to 500 in steps of which two make a quarter: 14.4. Each is measured, and planned for.
        assert streamer._last.stats.num_plans <= 16
        assert all(count <= 80 for count in device.asked.values()), device.asked
        device.asked.clear()
        for token in inputs:  # the same again
            net(token)
        assert all(count <= 80 for count in device.asked.values()), device.asked


def test_a_token_loop_whose_cache_fills_the_budget_is_not_planned_token_by_token() -> None:
    """A quarter more was planned for, so that a quarter more fits the plan."""
    device = Counting()
    net = Sized(device, [16 * KIB] * 40, takes=lambda x: 100 * x.shape[1])
    inputs = [x(1, length) for length in range(100, 500)]
    with streamed(device, {"net": net}, 400 * KIB) as streamer:
        cache = [torch.empty(25_600, dtype=torch.uint8)]
        for _ in range(4):
            net(inputs[0])
        plans = streamer._last.stats.num_plans
        for token in inputs:
            net(token)
            cache.append(torch.empty(256, dtype=torch.uint8))
        assert 0 < num_resident(streamer) < 20
        # Cache and pass grow from 35 to 178 KB, by 7.2 quarters, and their shapes by as many.
        assert streamer._last.stats.num_plans - plans <= 20
        assert device.num_ooms() == 0
