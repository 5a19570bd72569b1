"""Plans: within the budget, tight, explained; the least is the least; more budget is never worse."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from layerstream.blocks import ALIGNMENT_BYTES, Placement, UnitSpec, align, unit_bytes
from layerstream.budget import format_bytes
from layerstream.errors import BudgetError
from layerstream.plan import Plan, make_plan

MIB = 2**20


def units(bases: Sequence[int], *stacks: tuple[Sequence[int], bool]) -> list[UnitSpec]:
    """Bases, then the blocks of each stack as (sizes, repeats)."""
    specs = [UnitSpec(i, f"c (base {i})", "c", None, size) for i, size in enumerate(bases)]
    for number, (sizes, is_repeated) in enumerate(stacks):
        for i, size in enumerate(sizes):
            specs.append(UnitSpec(len(specs), f"c{number}.blocks.{i}", f"c{number}", "blocks", size, is_repeated))
    return specs


def streamed(specs: Sequence[UnitSpec], plan: Plan) -> list[UnitSpec]:
    return [u for u in specs if not plan.is_resident(u.index)]


def resident_pattern(specs: Sequence[UnitSpec], plan: Plan) -> str:
    return "".join("R" if plan.is_resident(u.index) else "." for u in specs if u.is_block)


SIZES = st.lists(st.integers(0, 30), max_size=10)
ANY_UNITS = st.builds(
    lambda bases, once, often: units(bases, (once, False), (often, True)),
    st.lists(st.integers(0, 30), max_size=3),
    SIZES,
    SIZES,
)


def total_bytes(specs: Sequence[UnitSpec]) -> int:
    return sum(u.num_bytes for u in specs)


def device_bytes(specs: Sequence[UnitSpec], plan: Plan) -> int:
    resident = sum(u.num_bytes for u in specs if plan.is_resident(u.index))
    return resident + plan.num_slots * plan.slot_bytes


# ---- what every plan is


@given(ANY_UNITS, st.integers(0, 700))
def test_every_plan_holds_its_promises(specs: list[UnitSpec], budget: int) -> None:
    try:
        plan = make_plan(specs, budget)
    except BudgetError:
        return
    moving = streamed(specs, plan)
    assert plan.budget_bytes == budget
    assert plan.device_bytes == device_bytes(specs, plan) <= budget
    assert len(plan.placements) == len(specs)
    assert all(u.is_block for u in moving), "a base that streams"
    assert plan.slot_bytes == max((u.num_bytes for u in moving), default=0)
    if moving:
        assert min(2, len(moving)) <= plan.num_slots <= len(moving)
    else:
        assert plan.num_slots == 0


@given(ANY_UNITS, st.integers(0, 100))
def test_everything_fits(specs: list[UnitSpec], spare: int) -> None:
    plan = make_plan(specs, total_bytes(specs) + spare)
    assert set(plan.placements) <= {Placement.RESIDENT}
    assert (plan.num_slots, plan.slot_bytes, plan.device_bytes) == (0, 0, total_bytes(specs))


@given(ANY_UNITS)
def test_one_byte_less_than_everything_streams(specs: list[UnitSpec]) -> None:
    try:
        plan = make_plan(specs, total_bytes(specs) - 1)
    except BudgetError:
        return
    assert streamed(specs, plan)


# ---- the least


@given(ANY_UNITS)
def test_least_works_and_one_byte_less_is_refused(specs: list[UnitSpec]) -> None:
    least = make_plan(specs, None)
    assert make_plan(specs, least.least_bytes).device_bytes <= least.least_bytes
    with pytest.raises(BudgetError) as error:
        make_plan(specs, least.least_bytes - 1)
    assert error.value.needed_bytes == least.least_bytes
    assert error.value.budget_bytes == least.least_bytes - 1


@given(ANY_UNITS)
def test_min_takes_the_least(specs: list[UnitSpec]) -> None:
    plan = make_plan(specs, None)
    assert plan.budget_bytes is None
    assert plan.device_bytes == device_bytes(specs, plan) == plan.least_bytes


@given(ANY_UNITS)
def test_least_is_the_least_of_all_plans(specs: list[UnitSpec]) -> None:
    """Against every choice of a slot size: what is larger is resident, what is not streams through two slots."""
    base = sum(u.num_bytes for u in specs if not u.is_block)
    sizes = sorted(u.num_bytes for u in specs if u.is_block)
    candidates = [base + sum(sizes)]
    for slot_bytes in set(sizes):
        smaller = [s for s in sizes if s <= slot_bytes]
        candidates.append(base + sum(s for s in sizes if s > slot_bytes) + min(2, len(smaller)) * slot_bytes)
    assert make_plan(specs, None).least_bytes == min(candidates)


def test_one_block_far_larger_than_the_rest_needs_no_second_slot_of_its_size() -> None:
    specs = units([], ([100, *[1] * 10], True))
    plan = make_plan(specs, 102)
    assert resident_pattern(specs, plan).startswith("R.")
    assert plan.device_bytes <= 102


def test_refusal_explains_itself() -> None:
    specs = units([2 * MIB, MIB], ([10 * MIB, 12 * MIB, 10 * MIB], True))
    with pytest.raises(BudgetError) as error:
        make_plan(specs, 20 * MIB)
    needed = 27 * MIB
    assert str(error.value) == (
        "vram_budget 20.0 MiB is too small: 2 slot(s) for `c0.blocks.1` (12.0 MiB each) and the components' weights "
        f"outside their stacks (3.0 MiB) need {format_bytes(needed)} before activations. Raise vram_budget to at least "
        f"{needed} bytes (27.0 MiB)."
    )
    assert (error.value.needed_bytes, error.value.budget_bytes) == (needed, 20 * MIB)


def test_refusal_without_blocks_says_that_nothing_streams() -> None:
    with pytest.raises(BudgetError) as error:
        make_plan(units([2 * MIB, MIB]), MIB)
    assert str(error.value) == (
        "vram_budget 1.0 MiB is too small: nothing here streams block by block, and the components need 3.0 MiB whole. "
        f"Raise vram_budget to at least {3 * MIB} bytes (3.0 MiB)."
    )
    assert error.value.needed_bytes == 3 * MIB


def test_nothing_to_place() -> None:
    for budget in (None, 0, 5):
        plan = make_plan([], budget)
        assert (plan.placements, plan.num_slots, plan.device_bytes, plan.least_bytes) == ((), 0, 0, 0)


def test_a_single_block_is_resident_since_its_slot_would_be_as_large() -> None:
    plan = make_plan(units([3], ([10], True)), None)
    assert (plan.num_slots, plan.device_bytes) == (0, 13)


# ---- who is resident


def repeated_streamed_bytes(specs: Sequence[UnitSpec], plan: Plan) -> int:
    return sum(u.num_bytes for u in streamed(specs, plan) if u.is_repeated)


@given(st.integers(1, 40), st.integers(1, 8))
def test_more_budget_never_streams_more_of_like_blocks(count: int, size: int) -> None:
    specs = units([5], ([size] * count, True))
    least = make_plan(specs, None).least_bytes
    moved = [repeated_streamed_bytes(specs, make_plan(specs, b)) for b in range(least, total_bytes(specs) + 1)]
    assert moved == sorted(moved, reverse=True)


@given(ANY_UNITS, st.integers(0, 300), st.integers(1, 100))
@example(units([], ([1, 1, 1, 2, 5, 7, 20, 20], True)), 55 - 40, 1)  # a third slot instead of a resident block
@example(units([], ([1, 1, 1, 3, 4, 10], False), ([1, 12], True)), 31 - 24, 1)  # one that repeats for many that do not
def test_more_budget_never_streams_more_repeated_bytes(specs: list[UnitSpec], extra: int, more: int) -> None:
    least = make_plan(specs, None).least_bytes
    small, large = make_plan(specs, least + extra), make_plan(specs, least + extra + more)
    assert repeated_streamed_bytes(specs, large) <= repeated_streamed_bytes(specs, small)


def test_room_for_a_third_slot_does_not_push_blocks_off_the_device() -> None:
    # A denoiser of 7 blocks beside a text encoder of 3 larger ones.
    specs = units([], ([4] * 3, False), ([3] * 7, True))
    small, large = make_plan(specs, 31), make_plan(specs, 32)
    assert repeated_streamed_bytes(specs, large) <= repeated_streamed_bytes(specs, small)


@given(st.integers(2, 60), st.integers(0, 60))
def test_residents_are_evenly_spread(count: int, room: int) -> None:
    """Between neighbours among the residents, and to both ends, the runs of streamed blocks differ by at most one."""
    specs = units([], ([1] * count, True))
    pattern = resident_pattern(specs, make_plan(specs, 2 + room))
    runs = [len(run) for run in pattern.split("R")]
    if pattern.count("R") == 0 or "." not in pattern:
        return
    inner = runs[1:-1]
    assert max(inner, default=0) - min(inner, default=0) <= 1
    # Passes follow one another: the ends together are one run.
    assert abs(runs[0] + runs[-1] - (sum(inner) / len(inner) if inner else count - 1)) <= 1


def test_every_third_block_resident() -> None:
    specs = units([], ([1] * 12, True))
    plan = make_plan(specs, 6)
    assert resident_pattern(specs, plan) == ".R..R..R..R."
    assert (plan.num_slots, plan.device_bytes) == (2, 6)


def test_what_repeats_is_resident_first() -> None:
    specs = units([], ([4] * 6, False), ([4] * 6, True))
    plan = make_plan(specs, 3 * 4 + 7 * 4)
    assert (plan.num_slots, resident_pattern(specs, plan)) == (2, ".R..R." + "RRRRRR")


def test_bases_are_resident_whatever_the_budget() -> None:
    specs = units([50, 7], ([3] * 5, True))
    for budget in (None, 63, 65, 72):
        plan = make_plan(specs, budget)
        assert [plan.is_resident(0), plan.is_resident(1)] == [True, True]
    with pytest.raises(BudgetError):
        make_plan(specs, 62)


def test_a_few_blocks_twice_the_size_are_resident_where_that_streams_less() -> None:
    # FLUX: 19 blocks of 2 and 38 of 1. With 19 x 2 + 2 x 1 the large ones stay and the slots are small; slots for
    # the large ones would hold two of them and keep 37 bytes of residents instead of 39.
    specs = units([], ([2] * 19 + [1] * 38, True))
    plan = make_plan(specs, 41)
    assert resident_pattern(specs, plan)[:19] == "R" * 19
    assert (plan.slot_bytes, plan.num_slots) == (1, 2)
    assert make_plan(specs, 12).slot_bytes == 2


# ---- slots


@given(ANY_UNITS, st.integers(0, 300), st.integers(2, 6))
def test_number_of_slots_is_honoured_where_it_fits(specs: list[UnitSpec], extra: int, num_slots: int) -> None:
    largest = max((u.num_bytes for u in specs if u.is_block), default=0)
    base = sum(u.num_bytes for u in specs if not u.is_block)
    budget = base + num_slots * largest + extra
    plan = make_plan(specs, budget, num_slots=num_slots)
    assert plan.device_bytes == device_bytes(specs, plan) <= budget
    assert plan.num_slots == (0 if budget >= total_bytes(specs) else min(num_slots, len(streamed(specs, plan))))


def test_number_of_slots_is_honoured_at_the_least_budget_too() -> None:
    specs = units([1], ([2] * 8, True))
    plan = make_plan(specs, None, num_slots=4)
    assert (plan.num_slots, plan.device_bytes, plan.least_bytes) == (4, 9, 5)


def test_more_slots_than_fit_fall_back_to_what_does() -> None:
    specs = units([1], ([2] * 8, True))
    plan = make_plan(specs, 6, num_slots=7)
    assert plan.num_slots == 2
    assert plan.device_bytes <= 6


def test_more_slots_only_where_no_further_block_fits() -> None:
    specs = units([], ([1] * 20, True))
    assert {make_plan(specs, budget).num_slots for budget in range(2, 20)} == {2}
    uneven = units([], ([9, 9, 9, 1], True))
    assert make_plan(uneven, 18 + 1).num_slots == 2
    for budget in range(18, 28):
        plan = make_plan(uneven, budget)
        assert plan.device_bytes <= budget


# ---- sizes


@given(st.integers(0, 2**40))
def test_align(num_bytes: int) -> None:
    assert align(num_bytes) % ALIGNMENT_BYTES == 0
    assert 0 <= align(num_bytes) - num_bytes < ALIGNMENT_BYTES


def test_unit_bytes_aligns_every_tensor() -> None:
    assert unit_bytes([]) == 0
    assert unit_bytes([1, 0, 256, 257]) == 256 + 0 + 256 + 512
