"""Packed units that stay on the device: which plans have them, against all placements there are."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from layerstream.blocks import Placement, Sizes, UnitSpec
from layerstream.planning import draft, packed_stay
from layerstream.planning.costs import Costs
from layerstream.planning.pace import Pace
from layerstream.planning.packed_choice import as_packed, may_pack, worth_packing
from layerstream.planning.packed_stay import Streamable, counts_to_play, spread
from layerstream.planning.phase_plan import Phase
from layerstream.planning.plan import Plan, make_plan
from tests.test_plan import check, units_of

MB = 10**6
SHARE = 0.67


def packed(units: list[UnitSpec], which: set[int] | None = None) -> list[UnitSpec]:
    """The same, with these blocks packed; None: all."""
    return [
        replace(u, packed=Sizes(u.num_bytes, int(SHARE * u.num_bytes), int(SHARE * u.num_bytes)))
        if u.is_block and (which is None or u.index in which)
        else u
        for u in units
    ]


def one_phase(units: list[UnitSpec], budget: int, costs: Costs, *, is_repeated: bool = True) -> Plan:
    plan = make_plan(units, [Phase(("net",), is_repeated, 0)], budget, costs=costs)
    check(plan, budget)
    return plan


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Inside its `context`, plans have nothing stay packed."""
    return monkeypatch


def ms_without(units: list[UnitSpec], budget: int, costs: Costs, patch: pytest.MonkeyPatch) -> float:
    with patch.context() as inside:
        inside.setattr(draft, "counts_to_play", lambda *args: [])
        prediction = one_phase(units, budget, costs).phases[0].prediction
    assert prediction is not None
    return prediction.ms_per_pass


def best_of_all(units: list[UnitSpec], budget: int, costs: Costs) -> float:
    """Of every placement of the blocks in a budget: resident, packed on the device, or streamed."""
    blocks = [u for u in units if u.is_block]
    pace = Pace(
        [(u.sizes.wire, costs.compute_ms[u.index]) for u in blocks],
        costs.link_gb_per_s,
        decode_ms=[u.num_bytes / costs.decode_gb_per_s / MB if u.packed else 0.0 for u in blocks],  # type: ignore[operator]
    )
    wires = 2 * max((u.packed.wire for u in blocks if u.packed is not None), default=0)
    best = float("inf")
    for where in itertools.product("rps", repeat=len(blocks)):
        if any(w == "p" and u.packed is None for w, u in zip(where, blocks, strict=True)):
            continue
        taken = wires + sum(
            {"r": u.num_bytes, "p": u.sizes.wire, "s": 0}[w] for w, u in zip(where, blocks, strict=True)
        )
        through = [i for i, w in enumerate(where) if w != "r"]
        slot_bytes = max((blocks[i].num_bytes for i in through), default=0)
        kept = pace.keeping_packed({i for i, w in enumerate(where) if w == "p"})
        for slots in range(min(2, len(through)), min(4, len(through)) + 1):
            if taken + slots * slot_bytes <= budget:
                best = min(best, kept.pass_ms(through, slots))
    return best


def test_close_to_the_best_of_all_placements(without: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    ratios, num_gained = [], 0
    for _ in range(60):
        count = rng.randint(4, 6)
        size = rng.randint(40, 100) * MB
        units = packed(units_of(("net", True, 0, [size] * count)))
        costs = Costs(
            1.0, {u.index: size / MB * rng.uniform(0.1, 0.6) for u in units if u.is_block}, decode_gb_per_s=30.0
        )
        least = make_plan(units, [Phase(("net",), True, 0)], None).least_bytes
        budget = least + int(rng.uniform(0, 1) * max(0, size * count - least)) + size // 2
        plan = one_phase(units, budget, costs)
        prediction = plan.phases[0].prediction
        assert prediction is not None
        best = best_of_all(units, budget, costs)
        assert prediction.ms_per_pass >= best - 1e-5
        raw = ms_without(units, budget, costs, without)
        assert prediction.ms_per_pass <= raw, "never slower for it"
        num_gained += prediction.ms_per_pass < 0.99 * raw
        ratios.append(prediction.ms_per_pass / best)
    assert num_gained >= 15
    assert sum(ratio < 1.01 for ratio in ratios) >= 0.8 * len(ratios), sorted(ratios)
    assert max(ratios) < 1.3


@pytest.mark.parametrize("gib", [4, 5, 6, 7])
def test_a_pass_that_waits_for_the_bus_waits_less(gib: int, without: pytest.MonkeyPatch) -> None:
    units = packed(units_of(("net", True, 2**27, [2**28] * 48)))
    costs = Costs(50.0, {u.index: 1.2 for u in units if u.is_block}, decode_gb_per_s=2000.0)
    plan = one_phase(units, gib * 2**30, costs)
    phase = plan.phases[0]
    assert phase.prediction is not None
    assert phase.packed
    assert phase.prediction.ms_per_pass < 0.96 * ms_without(units, gib * 2**30, costs, without)
    assert {plan.placement(index) for index in phase.packed} == {Placement.PACKED}
    (stack,) = [s for s in plan.summary().stacks if s.stack is not None]
    assert stack.num_placed["resident packed"] == len(phase.packed)
    assert f"{len(phase.packed)} resident packed" in str(plan)
    assert stack.streamed_bytes == 2**28 * (48 - len(phase.packed) - len(phase.resident) + 1)


def test_what_waits_for_nothing_keeps_nothing_packed() -> None:
    units = packed(units_of(("net", True, 2**27, [2**28] * 24)))
    costs = Costs(50.0, {u.index: 40.0 for u in units if u.is_block}, decode_gb_per_s=2000.0)
    assert not one_phase(units, 4 * 2**30, costs).phases[0].packed


def test_only_of_what_is_repeated_and_packed() -> None:
    units = units_of(("net", True, 2**27, [2**28] * 24))
    costs = Costs(50.0, {u.index: 1.0 for u in units if u.is_block}, decode_gb_per_s=2000.0)
    assert not one_phase(units, 3 * 2**30, costs).phases[0].packed
    assert not one_phase(packed(units), 3 * 2**30, costs, is_repeated=False).phases[0].packed
    some = {u.index for u in units if u.index % 6}
    phase = one_phase(packed(units, some), 4 * 2**30, costs).phases[0]
    assert phase.packed
    assert phase.packed <= some


@pytest.mark.parametrize("room", [0, 4])
def test_other_phases_have_it_stay_where_all_of_it_fits(room: int) -> None:
    gib = 2**30
    units = packed(units_of(("net", True, 2**27, [2**28] * 24), ("vae", False, 2**20, [])))
    costs = Costs(50.0, {u.index: 1.0 for u in units if u.is_block}, decode_gb_per_s=2000.0)
    phases = [Phase(("net",), True, 0), Phase(("vae",), False, (4 - room) * gib)]
    plan = make_plan(units, phases, 5 * gib, costs=costs)
    check(plan, 5 * gib)
    own, other = plan.phases
    assert own.packed
    assert other.packed == (own.packed if room else frozenset())


def test_pieces_of_a_block_may_stay_packed() -> None:
    units = packed(units_of(("net", True, 2**20, [2**27] * 36)))
    pieces = [replace(u, block=f"net.{(u.index - 1) // 3}") if u.is_block else u for u in units]
    costs = Costs(50.0, {u.index: 1.0 for u in units if u.is_block}, decode_gb_per_s=2000.0)
    phase = one_phase(pieces, 3 * 2**30 // 2, costs).phases[0]
    assert phase.packed
    assert phase.num_slots >= 4, "a block's pieces, and one more"
    assert phase.prediction is not None
    assert phase.prediction.ms_per_pass < 1e9


def test_the_counts_that_are_played() -> None:
    units = [Streamable(100, 67, 67.0, 1.0, True) for _ in range(40)]
    found = counts_to_play(units, 1000, 500.0)
    assert 0 < len(found) <= packed_stay._MOST_PLAYED
    assert all(ms >= 500.0 and 67 * count <= 1000 for ms, count in found)
    # All the room goes to what is packed, as long as the bus is slower for it.
    assert found[0][1] == 14
    assert sorted(count for _, count in counts_to_play(units[:4], 10**6, 0.0)) == [1, 2, 3, 4]
    assert counts_to_play(units, 50, 0.0) == []
    assert counts_to_play([replace(u, may_stay=False) for u in units], 10**6, 0.0) == []


@pytest.mark.parametrize(("gib", "ms"), [(4, 1.2), (6, 1.2), (5, 2.0)])
def test_what_is_resident_raw_is_worth_packing_where_more_of_it_stays_so(gib: int, ms: float) -> None:
    units = units_of(("net", True, 2**27, [2**28] * 48))
    blocks = {u.index for u in units if u.is_block}
    costs = Costs(50.0, dict.fromkeys(blocks, ms), decode_gb_per_s=2000.0)
    plan = one_phase(units, gib * 2**30, costs)
    found = worth_packing(plan, plan.phases[0], blocks)
    assert set(found) == blocks
    num_streamed = len(blocks - plan.phases[0].resident)
    assert not plan.phases[0].resident & set(found[:num_streamed]), "what streams first"
    some = [as_packed(u) if u.index in found[:num_streamed] else u for u in units]
    all_of_it = [as_packed(u) if u.is_block else u for u in units]
    before, after = (one_phase(each, gib * 2**30, costs).phases[0].prediction for each in (some, all_of_it))
    assert before is not None
    assert after is not None
    assert after.ms_per_pass < 0.97 * before.ms_per_pass


def test_what_no_pass_uses_is_not_packed_for_that() -> None:
    units = units_of(("net", True, 2**27, [2**28] * 48))
    blocks = {u.index for u in units if u.is_block}
    costs = Costs(50.0, dict.fromkeys(blocks, 1.2), {48: 0}, decode_gb_per_s=2000.0)
    plan = one_phase(units, 5 * 2**30, costs)
    assert set(worth_packing(plan, plan.phases[0], blocks)) == blocks - {48}


def test_even_spreads() -> None:
    assert spread(range(10), 5) == [0, 2, 4, 6, 8]
    assert spread(range(3), 3) == [0, 1, 2]
    assert spread(range(3), 0) == []


def test_what_is_there_packed_takes_no_turn_of_a_wire() -> None:
    pace = Pace([(10 * MB, 1.0)] * 4, 1.0, decode_ms=[5.0] * 4, num_wires=1)
    assert pace.pass_ms(range(4), 2) == pytest.approx(4 * 15)  # a copy waits for the unpacking before
    kept = pace.keeping_packed({1, 3})
    assert kept.pass_ms(range(4), 2) == pytest.approx(2 * 15)
    assert pace.keeping_packed(set(range(4))).pass_ms(range(4), 2) == pytest.approx(4 * 6)
    assert pace.keeping_packed(set()) is pace
    prediction = kept.prediction(range(4), 2, True)
    assert (prediction.bus_ms, prediction.compute_ms) == (20.0, 24.0)


def test_what_is_to_be_packed_is_planned_with_as_it_is() -> None:
    """While a model is packed unit by unit, which may take minutes: residents given up for it would stream raw."""
    units = units_of(("net", True, 0, [1000] * 8))
    costs = Costs(1e-3, {u.index: 0.1 for u in units if u.is_block})
    (before,) = one_phase(units, 7000, costs).phases
    as_wanted = [replace(u, packed=Sizes(1000, 100, 100, is_there=False)) if u.is_block else u for u in units]
    (phase_plan,) = one_phase(as_wanted, 7000 + 2 * 100, costs).phases
    assert phase_plan.wires == (2, 100)
    assert not phase_plan.packed
    assert phase_plan.resident == before.resident
    assert phase_plan.prediction == before.prediction
    as_packed_now = [replace(u, packed=Sizes(1000, 100, 100)) if u.is_block else u for u in units]
    (after,) = one_phase(as_packed_now, 7000 + 2 * 100, costs).phases
    assert after.prediction is not None
    assert before.prediction is not None
    assert after.prediction.ms_per_pass < before.prediction.ms_per_pass


# ---- what may be packed at all


def _spec(index: int, num_bytes: int, stack: str | None, block: str | None = None) -> UnitSpec:
    return UnitSpec(index, f"net.{stack}.{index}", "net", stack, num_bytes, block=block)


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ([_spec(0, 900, None), _spec(1, 50, "blocks"), _spec(2, 60, "blocks")], {1, 2}),
        ([_spec(0, 500, "embed"), _spec(1, 50, "blocks"), _spec(2, 60, "blocks")], {1, 2}),
        ([_spec(0, 60, "embed"), _spec(1, 50, "blocks"), _spec(2, 60, "blocks")], {0, 1, 2}),
        ([_spec(0, 500, "embed"), _spec(1, 500, "head")], {0, 1}),
        # The pieces of the one block of a stack are alone in it, too.
        ([_spec(0, 90, "mid", "m"), _spec(1, 90, "mid", "m"), _spec(2, 60, "down"), _spec(3, 70, "down")], {2, 3}),
        ([_spec(0, 9, "blocks"), _spec(1, 60, "blocks"), _spec(2, 70, "blocks"), _spec(3, 500, "embed")], {1, 2}),
        ([], set()),
    ],
)
def test_what_is_larger_than_what_takes_turns_stays_raw(units: list[UnitSpec], expected: set[int]) -> None:
    """Wire buffers would be as large as it."""
    assert may_pack(units, 10) == expected
