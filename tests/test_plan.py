"""The planner: what is on the device in every phase. Pure, so tested without a device."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from layerstream.blocks import Placement, Sizes, UnitSpec
from layerstream.errors import BudgetError
from layerstream.planning.costs import Costs
from layerstream.planning.draft import LEAST_SLOTS
from layerstream.planning.pace import Pace
from layerstream.planning.phase_plan import Phase
from layerstream.planning.plan import Plan, make_plan


def units_of(*components: tuple[str, bool, int, list[int]]) -> list[UnitSpec]:
    """(component, is_repeated, bytes of its base, bytes of its blocks), base first."""
    units: list[UnitSpec] = []
    for name, is_repeated, base, blocks in components:
        units.append(UnitSpec(len(units), f"{name} (base)", name, None, base, is_repeated))
        for number, num_bytes in enumerate(blocks):
            units.append(UnitSpec(len(units), f"{name}.layers.{number}", name, "layers", num_bytes, is_repeated))
    return units


PIPE = units_of(
    ("encoder", False, 50, [40] * 6), ("denoiser", True, 30, [100, 100, *[60] * 8]), ("vae", False, 120, [])
)


def phases(*reserves: int | None) -> list[Phase]:
    return [
        Phase(("encoder",), False, reserves[0]),
        Phase(("denoiser",), True, reserves[1]),
        Phase(("vae",), False, reserves[2]),
    ]


def check(plan: Plan, budget: int | None) -> None:
    """What holds of every plan."""
    size = {u.index: u.num_bytes for u in plan.units}
    for phase_plan in plan.phases:
        mine = {u.index for u in plan.units if {u.component, *u.also} & set(phase_plan.phase.components)}
        streamed = [size[i] for i in mine - phase_plan.resident]
        assert {u.index for u in plan.units if u.index in mine and not u.is_block} <= phase_plan.resident <= mine
        assert not phase_plan.kept & mine
        assert all(num_bytes <= phase_plan.slot_bytes for num_bytes in streamed)
        assert phase_plan.num_slots <= len(streamed)
        assert phase_plan.num_slots >= min(LEAST_SLOTS, len([s for s in streamed if s]))
        weights = sum(size[i] for i in phase_plan.resident | phase_plan.kept)
        weights += sum(u.sizes.wire for u in plan.units if u.index in phase_plan.packed)
        assert not phase_plan.packed & (phase_plan.resident | phase_plan.kept)
        buffers = phase_plan.ring[0] * phase_plan.ring[1] + phase_plan.wires[0] * phase_plan.wires[1]
        assert weights + buffers == phase_plan.weights_bytes
        if phase_plan.kept_ring != (0, 0):
            assert not phase_plan.num_slots
            assert phase_plan.kept_ring in [(p.num_slots, p.slot_bytes) for p in plan.phases]
        if budget is not None:
            assert phase_plan.weights_bytes + (phase_plan.phase.reserve_bytes or 0) <= budget
        if budget is None or phase_plan.phase.reserve_bytes is None:
            assert phase_plan.weights_bytes == phase_plan.least_bytes
            assert not phase_plan.kept


def test_everything_fits() -> None:
    total = sum(u.num_bytes for u in PIPE)
    plan = make_plan(PIPE, phases(10, 20, 30), total + 30)
    check(plan, total + 30)
    assert all(p.num_slots == 0 and p.resident | p.kept == {u.index for u in PIPE} for p in plan.phases)
    assert {plan.placement(u.index) for u in PIPE} == {Placement.RESIDENT}


def test_an_unknown_reserve_takes_the_least() -> None:
    plan = make_plan(PIPE, phases(None, 20, None), 10_000)
    check(plan, 10_000)
    assert plan.phase_of("denoiser").num_slots == 0
    assert plan.phase_of("encoder").num_slots == LEAST_SLOTS


def test_min_takes_the_least() -> None:
    plan = make_plan(PIPE, phases(None, None, None), None)
    check(plan, None)
    assert plan.least_bytes == 30 + 2 * 100 == plan.needed_bytes
    assert plan.peak_bytes == 230


def test_the_needed_budget_works_and_a_byte_less_does_not() -> None:
    with pytest.raises(BudgetError) as refused:
        make_plan(PIPE, phases(10, 70, 30), 100)
    assert refused.value.needed_bytes == 300
    assert refused.value.budget_bytes == 100
    assert str(refused.value) == (
        "vram_budget 100 B is too small: while `denoiser` runs, 2 slot(s) for `denoiser.layers.0` (100 B each), the "
        "weights outside stacks (30 B) and activations and other tensors (70 B, measured) need 300 B. Raise "
        "vram_budget to at least 300 bytes (300 B)."
    )
    check(make_plan(PIPE, phases(10, 70, 30), 300), 300)
    with pytest.raises(BudgetError):
        make_plan(PIPE, phases(10, 70, 30), 299)


def test_a_base_larger_than_the_budget_is_named() -> None:
    units = units_of(("encoder", False, 5000, [10] * 3))
    with pytest.raises(BudgetError, match=r"`encoder \(base\)` alone 4\.9 KiB"):
        make_plan(units, [Phase(("encoder",), False)], 1000)


def test_a_few_larger_blocks_stay_so_that_slots_are_small() -> None:
    units = units_of(("denoiser", True, 0, [500, *[10] * 20]))
    plan = make_plan(units, [Phase(("denoiser",), True)], None)
    assert plan.least_bytes == 520
    assert plan.phases[0].slot_bytes == 10


def test_what_is_kept_in_one_phase_is_kept_in_all() -> None:
    """A unit that must go in one phase is loaded again anyhow."""
    budget = 700
    plan = make_plan(PIPE, phases(10, 20, 400), budget)
    check(plan, budget)
    denoiser = plan.phase_of("denoiser").resident
    assert plan.phase_of("encoder").kept & denoiser == plan.phase_of("vae").kept & denoiser < denoiser
    # What nobody else can use goes to the encoder's own blocks.
    assert any(plan.placement(u.index) is Placement.BY_PHASE for u in PIPE if u.component == "encoder" and u.is_block)


def test_buffers_are_rounded() -> None:
    plan = make_plan(PIPE, phases(0, 0, 0), None, granularity=64)
    assert plan.least_bytes == 64 + 2 * 128


def test_the_number_of_slots_can_be_fixed() -> None:
    plan = make_plan(PIPE, phases(0, 0, 0), 500, num_slots=3)
    assert plan.phase_of("denoiser").num_slots == 3


def test_a_shared_base_belongs_to_both_phases() -> None:
    units = [
        UnitSpec(0, "a (base)", "a", None, 50, also=("b",)),
        UnitSpec(1, "b (base)", "b", None, 10),
    ]
    plan = make_plan(units, [Phase(("a",), False, 0), Phase(("b",), False, 0)], 60)
    assert plan.phase_of("b").resident == {0, 1}


def test_text() -> None:
    costs = Costs(1.0, {u.index: 0.00005 for u in PIPE})
    text = str(make_plan(PIPE, phases(10, 20, None), 500, costs=costs))
    assert text.startswith("budget 500 B, least ")
    assert "not measured yet" in text
    assert "ms a pass predicted" in text
    assert all(len(line) <= 120 and line == line.rstrip() for line in text.splitlines())


def test_ovis_at_8_gib_hides_its_copies() -> None:
    """Six blocks of 831 MB and 27 of 359 MB: large residents together at the start left the bus idle (156.7 ms)."""
    units = units_of(("denoiser", True, 70 * 10**6, [830_800_000] * 6 + [358_800_000] * 27))
    ms = 122 / (6 * 2 + 27)
    costs = Costs(55.0, {u.index: 2 * ms if u.num_bytes > 5 * 10**8 else ms for u in units if u.is_block})
    plan = make_plan(units, [Phase(("denoiser",), True, 0)], 8 * 2**30, costs=costs, granularity=2**21)
    prediction = plan.phases[0].prediction
    assert prediction is not None
    assert prediction.ms_per_pass <= 1.01 * prediction.bus_ms  # nothing is lost beside the bus itself
    assert plan.next_gib_ms["denoiser"] > 0


def test_hidden_copies_are_spared_before_an_encoder_keeps_blocks() -> None:
    """Copies that compute hides slow it all the same, at each of many steps; an encoder's loads come once a call. What
    the denoiser cannot use is the encoder's, and what the denoiser loads in its first pass is kept last of all."""
    units = units_of(("encoder", False, 10, [100] * 4), ("denoiser", True, 10, [100] * 12), ("vae", False, 10, []))
    costs = Costs(1e-6, {u.index: 150.0 for u in units if u.is_block})
    encoder = {u.index for u in units if u.component == "encoder" and u.is_block}
    blocks = {u.index for u in units if u.component == "denoiser" and u.is_block}
    for budget, num_resident, num_kept in ((430, 2, 0), (830, 6, 0), (1230, 12, 0), (1430, 12, 2), (1630, 12, 4)):
        plan = make_plan(units, phases(0, 0, 0), budget, costs=costs)
        check(plan, budget)
        denoiser = plan.phase_of("denoiser")
        assert denoiser.prediction is not None
        assert denoiser.prediction.ms_per_pass == pytest.approx(12 * 150)
        assert len(denoiser.resident & blocks) == num_resident
        assert len(denoiser.kept & encoder) == num_kept
        # While the VAE runs nothing streams: what the encoder needs next comes back.
        assert len(plan.phase_of("vae").kept & encoder) == min(4, (budget - 30) // 100)


def test_where_a_call_has_few_passes_room_that_only_spares_hidden_copies_goes_to_the_encoder() -> None:
    units = units_of(("encoder", False, 10, [100] * 4), ("denoiser", True, 10, [100] * 12), ("vae", False, 10, []))
    costs = Costs(1e-6, {u.index: 150.0 for u in units if u.is_block})
    encoder = {u.index for u in units if u.component == "encoder" and u.is_block}
    brief = [replace(phase, is_brief=phase.is_repeated) for phase in phases(0, 0, 0)]
    for budget, num_kept in ((230 + 100 * 2, 2), (230 + 100 * 4, 4)):
        plan = make_plan(units, brief, budget, costs=costs)
        check(plan, budget)
        denoiser = plan.phase_of("denoiser")
        assert denoiser.prediction is not None
        assert denoiser.prediction.ms_per_pass == pytest.approx(12 * 150)
        assert len(denoiser.kept & encoder) == num_kept
    plan = make_plan(units, brief, 230 + 100 * 8, costs=costs)
    assert len(plan.phase_of("denoiser").resident) == 1 + 4, "what nobody else can use is its own"


def test_of_what_a_first_pass_loads_only_what_compute_hides_is_kept_last() -> None:
    """A denoiser of 12 blocks whose loads take 1,200 ms, and whose compute takes 600: six of them are kept before any
    of the encoder's, whose loads are as long."""
    units = units_of(("encoder", False, 10, [100] * 4), ("denoiser", True, 10, [100] * 12), ("vae", False, 10, []))
    costs = Costs(1e-6, {u.index: 50.0 for u in units if u.is_block})
    encoder, blocks = (
        {u.index for u in units if u.component == name and u.is_block} for name in ("encoder", "denoiser")
    )
    plan = make_plan(units, phases(0, 0, 0), 30 + 1200, costs=costs)
    check(plan, 30 + 1200)
    assert len(plan.phase_of("vae").kept & blocks) >= 6
    assert len(plan.phase_of("encoder").resident & encoder) == 4


def test_a_phase_without_slots_leaves_the_next_ones_where_they_are() -> None:
    units = units_of(("small", False, 10, [20] * 2), ("large", False, 10, [100] * 6), ("vae", False, 10, []))
    plan = make_plan(units, [Phase((name,), False, 0) for name in ("small", "large", "vae")], 430)
    check(plan, 430)
    large = plan.phase_of("large")
    assert large.num_slots
    assert plan.phase_of("small").ring == plan.phase_of("vae").ring == large.ring
    full = make_plan(
        units, [Phase((name,), False, 0) for name in ("small", "large")] + [Phase(("vae",), False, 300)], 430
    )
    check(full, 430)
    assert full.phase_of("vae").ring == (0, 0), "there is no room"


sizes = st.lists(st.integers(1, 200), max_size=8)


@settings(deadline=None, max_examples=150)
@given(sizes, sizes, st.integers(0, 80), st.tuples(*[st.none() | st.integers(0, 150)] * 3), st.integers(0, 1500))
@example([], [1, 1, 1], 0, (None, 0, 0), 0)  # takes less time than is told apart
def test_every_plan_holds_its_promises(
    encoder: list[int], denoiser: list[int], base: int, reserves: tuple[int | None, ...], extra: int
) -> None:
    units = units_of(("encoder", False, base, encoder), ("denoiser", True, base, denoiser), ("vae", False, 50, []))
    least = make_plan(units, phases(*reserves), None)
    check(least, None)
    budget = least.needed_bytes + extra
    plan = make_plan(units, phases(*reserves), budget)
    check(plan, budget)
    assert plan == make_plan(units, phases(*reserves), budget)


@settings(deadline=None, max_examples=60)
@given(
    sizes,
    sizes.filter(bool),
    st.tuples(*[st.integers(0, 300)] * 3),
    st.lists(st.integers(0, 2000), min_size=2, max_size=6),
    st.integers(0, 1000),
)
def test_more_budget_is_never_slower_for_what_repeats(
    encoder: list[int], denoiser: list[int], reserves: tuple[int, ...], extras: list[int], seed: int
) -> None:
    rng = random.Random(seed)
    units = units_of(("encoder", False, 20, encoder), ("denoiser", True, 30, denoiser), ("vae", False, 50, []))
    costs = Costs(1e-6, {u.index: u.num_bytes * rng.uniform(0.2, 2) for u in units if u.is_block})
    needed = make_plan(units, phases(*reserves), None).needed_bytes
    last = float("inf")
    for extra in sorted(extras):
        plan = make_plan(units, phases(*reserves), needed + extra, costs=costs)
        prediction = plan.phase_of("denoiser").prediction
        assert prediction is not None
        assert prediction.ms_per_pass <= last + 1e-6
        last = prediction.ms_per_pass


# ---- what few passes use


EXPERTS = units_of(("llm", True, 10, [20, 60, 60] * 4))  # attention, an expert for text, one for images
TEXT = [i for i in range(1, 13) if i % 3 == 2]
SELDOM_USED = Costs(1e-6, {u.index: 1.0 for u in EXPERTS if u.is_block}, dict.fromkeys(TEXT, 0), frozenset(TEXT))


def resident_under(budget: int, costs: Costs) -> tuple[list[int], int]:
    """What stays of the experts for text, and how many bytes of the others stream."""
    plan = make_plan(EXPERTS, [Phase(("llm",), True, 0)], budget, costs=costs)
    (phase_plan,) = plan.phases
    assert phase_plan.weights_bytes <= budget
    streamed = [u for u in EXPERTS if u.index not in phase_plan.resident and u.index not in TEXT]
    return sorted(phase_plan.resident.intersection(TEXT)), sum(u.num_bytes for u in streamed)


def test_what_few_passes_use_gets_the_room_that_nothing_else_has_a_use_for() -> None:
    looped = 10 + 4 * 80
    assert resident_under(looped - 10, SELDOM_USED)[0] == []
    assert resident_under(looped, SELDOM_USED) == ([], 0)
    assert resident_under(looped + 60, SELDOM_USED) == (TEXT[:1], 0)
    assert resident_under(looped + 190, SELDOM_USED) == (TEXT[:3], 0)
    assert resident_under(looped + 240, SELDOM_USED) == (TEXT, 0)


def test_what_no_pass_uses_gets_no_room() -> None:
    costs = Costs(SELDOM_USED.link_gb_per_s, SELDOM_USED.compute_ms, SELDOM_USED.uses, frozenset(TEXT[:1]))
    assert resident_under(10 + 4 * 80 + 190, costs) == (TEXT[:1], 0)


# ---- times that cannot be


def test_one_layer_of_many_that_took_far_longer_is_not_planned_with() -> None:
    """GLM-Image's language model at 12 GiB: 60 ms at one of 40 layers took two more slots, and with them the room of
    two layers, for each token."""
    mib = 2**20
    units = units_of(("lm", True, 1600 * mib, [389 * mib] * 40))

    def planned(times: list[float]) -> tuple[int, int, int]:
        costs = Costs(54.6, {u.index: ms for u, ms in zip(units[1:], times, strict=True)})
        (p,) = make_plan(units, [Phase(("lm",), True, 192 * mib)], 12 * 2**30, costs=costs).phases
        assert p.prediction is not None
        return p.num_slots, len(units) - len(p.resident), round(p.prediction.ms_per_pass)

    even = [1.5] * 40
    late = [*even[:33], 60.0, *even[34:]]
    assert planned(even) == (2, 16, 120)
    assert planned(late) == planned([*even[:33], 4 * 1.5, *even[34:]]) == planned(even)
    uneven = [1.5, 1.5, 1.5, 5.0] * 10  # attention over all of the text in each fourth layer
    assert planned(uneven)[2] >= sum(uneven) - 1


# ---- sizes


def packed(units: list[UnitSpec], share: float) -> list[UnitSpec]:
    """The same, with blocks that have another form at home, of this share of their bytes."""
    return [
        replace(u, packed=Sizes(u.num_bytes, int(share * u.num_bytes), int(share * u.num_bytes))) if u.is_block else u
        for u in units
    ]


def test_a_unit_has_three_sizes() -> None:
    unit = UnitSpec(0, "net.0", "net", "blocks", 100)
    assert unit.sizes == Sizes(100, 100, 100)
    assert packed([unit], 0.67)[0].sizes == Sizes(100, 67, 67)


@pytest.mark.parametrize("budget", [4, 6, 8])
def test_packed_blocks_take_less_of_the_bus_and_room_for_wires(budget: int) -> None:
    gib = 2**30
    units = units_of(("net", True, gib // 8, [gib // 2] * 24))
    costs = Costs(50.0, {u.index: 4.0 for u in units if u.is_block}, decode_gb_per_s=1500.0)
    phase = [Phase(("net",), True, gib // 2)]
    raw = make_plan(units, phase, budget * gib, costs=costs)
    small = make_plan(packed(units, 0.67), phase, budget * gib, costs=costs)
    check(small, budget * gib)
    assert small.least_bytes == raw.least_bytes + 2 * int(0.67 * (gib // 2)), "two wire buffers"
    before, after = raw.phases[0].prediction, small.phases[0].prediction
    assert before is not None
    assert after is not None
    assert after.ms_per_pass < before.ms_per_pass
    num_streamed = sum(u.index not in small.phases[0].resident for u in units)
    assert after.compute_ms == pytest.approx(24 * 4 + num_streamed * gib / 2 / 1500e6)
    num_copied = num_streamed - len(small.phases[0].packed)
    assert after.bus_ms == pytest.approx(num_copied * int(0.67 * (gib // 2)) / 50e6)


def test_a_plan_of_packed_blocks_plays_their_decoding_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes ten times as long as a pass without, and the search compares hundreds of them."""
    gib = 2**30
    units = packed(units_of(("net", True, gib // 8, [gib // 8] * 96)), 0.67)
    costs = Costs(50.0, {u.index: 1.0 for u in units if u.is_block}, decode_gb_per_s=1500.0)
    played, play = 0, Pace._pass_ms_unpacked

    def count(*args: Any) -> float:
        nonlocal played
        played += 1
        return play(*args)

    monkeypatch.setattr(Pace, "_pass_ms_unpacked", count)
    plan = make_plan(units, [Phase(("net",), True, gib // 2)], 6 * gib, costs=costs)
    assert plan.phases[0].num_slots
    assert 0 < played <= 16


def test_costs_without_a_decoder_take_packed_blocks_as_smaller_ones() -> None:
    units = units_of(("net", True, 50, [100] * 10))
    costs = Costs(1e-6, {u.index: 10.0 for u in units if u.is_block})
    plan = make_plan(packed(units, 0.5), [Phase(("net",), True, 0)], 500, costs=costs)
    prediction = plan.phases[0].prediction
    assert prediction is not None
    assert prediction.compute_ms == pytest.approx(100.0)
