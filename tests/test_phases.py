"""Phases, keys and reserves: what is known of a call before it runs. Pure, so without a device."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerstream.planning import phases as module
from layerstream.planning.phase_plan import MANY_PASSES
from layerstream.planning.phases import GROWTH, CallKind, Key, PhaseTracker

PIPE = [("encoder", False), ("net", True), ("control", True), ("vae", False)]


def key(component: str = "net", *shapes: tuple[int, ...], entry: str = "", is_grad: bool = False) -> Key:
    return Key(component, entry, tuple(("float32", s) for s in shapes or ((1, 8),)), is_grad)


def tracker() -> PhaseTracker:
    return PhaseTracker(PIPE)


def measure(found: PhaseTracker, wanted: Key, *over_bytes: int) -> CallKind:
    """Enter once per measurement, as the ledger does, and report what it took."""
    reserve = found.enter(wanted)
    for number, num_bytes in enumerate(over_bytes):
        if number:
            assert found.enter(wanted) is reserve
        reserve.measured(num_bytes)
    return reserve


def time(reserve: CallKind, compute_ms: dict[int, float]) -> None:
    """Three passes, of which each of the first two was late somewhere."""
    for late in (1, 2, None):
        assert not reserve.is_timed
        reserve.starts_timing()
        reserve.timed({unit: 9 * ms if unit == late else ms for unit, ms in compute_ms.items()})
    assert reserve.is_timed


def reserve_of(found: PhaseTracker, component: str, outside_bytes: int = 0) -> int | None:
    return next(p.reserve_bytes for p in found.phases(outside_bytes) if component in p.components)


def groups(found: PhaseTracker) -> list[tuple[str, ...]]:
    return [p.components for p in found.phases(0)]


# ---- keys


@pytest.mark.parametrize(
    "other",
    [
        key("vae"),
        key(entry="encode"),
        key(is_grad=True),
        key("net", (1, 12)),
        key("net", (1, 8), (1, 8)),
        key("net", (8,)),
        Key("net", "", (("float16", (1, 8)),)),
    ],
)
def test_every_part_of_a_key_counts(other: Key) -> None:
    found = tracker()
    known = measure(found, key(), 10, 10)
    assert found.enter(key()) is known
    found = tracker()
    measure(found, key(), 10, 10)
    assert other != key()
    assert not found.enter(other).is_measured
    assert reserve_of(found, other.component) is None, "and nothing is borrowed from what is unlike, or smaller"


@pytest.mark.parametrize(
    ("component", "dtypes", "num_measurements"),
    [
        ("vae", ["torch.bfloat16"], 1),
        ("vae", [], 1),
        ("encoder", ["torch.int64", "torch.int64"], 2),
        ("encoder", ["torch.float16", "torch.bool"], 2),
        ("net", ["torch.float32"], 2),
    ],
)
def test_what_passes_no_mask_and_runs_once_a_call_is_measured_once(
    component: str, dtypes: list[str], num_measurements: int
) -> None:
    found = tracker()
    wanted = Key(component, "", tuple((dtype, (1, 8)) for dtype in dtypes))
    for number in range(num_measurements):
        reserve = found.enter(wanted)
        assert not reserve.is_measured, number
        reserve.measured(10)
    assert found.enter(wanted).is_measured


def test_passes_whose_times_are_on_their_way_are_neither_known_nor_timed_again() -> None:
    reserve = CallKind(key())
    for number in range(module._TIMED_PASSES):
        assert reserve.num_untimed == module._TIMED_PASSES - number
        reserve.starts_timing()
    assert (reserve.num_untimed, reserve.is_timed) == (0, False)
    reserve.not_timed()
    assert reserve.num_untimed == 1, "one was lost"
    reserve.starts_timing()
    for ms in (3.0, 1.0, 2.0):
        assert not reserve.is_timed
        reserve.timed({0: ms})
    assert reserve.is_timed
    assert reserve.compute_ms == {0: 1.0}


def test_covered_is_no_larger_in_any_dimension() -> None:
    large = key("net", (2, 8), (3,))
    for shapes, is_covered in (
        (((2, 8), (3,)), True),
        (((1, 8), (3,)), True),
        (((1, 1), (1,)), True),
        (((2, 9), (1,)), False),
        (((8, 2), (3,)), False),  # as many elements, in another order
        (((2, 8),), False),
        (((2, 8), (3, 1)), False),
    ):
        assert key("net", *shapes).is_covered_by(large) is is_covered, shapes
    assert not key("net", (1, 8), (3,), is_grad=True).is_covered_by(large), "autograd keeps what is freed otherwise"


def test_a_token_after_is_one_longer_and_nothing_else() -> None:
    past = key("net", (1, 7), (2, 7, 4))
    for shapes, is_after in (
        (((1, 8), (2, 8, 4)), True),
        (((1, 8), (2, 7, 4)), True),  # one of two grows: the cache, not the token
        (((1, 7), (2, 7, 4)), False),
        (((1, 9), (2, 9, 4)), False),
        (((1, 6), (2, 8, 4)), False),
        (((1, 8),), False),
    ):
        assert key("net", *shapes).is_a_token_after(past) is is_after, shapes
    assert not Key("net", "", ()).is_a_token_after(Key("net", "", ())), "nothing that grows"


# ---- measuring


def test_a_key_is_unknown_until_it_was_measured_twice_and_the_larger_counts() -> None:
    for first, second in ((10, 30), (30, 10)):
        found = tracker()
        reserve = measure(found, key(), first)
        assert not reserve.is_measured
        assert reserve_of(found, "net") is None
        reserve.measured(second)
        assert reserve.is_measured
        assert reserve_of(found, "net") == 30
        assert reserve_of(found, "net", 5) == 35, "what others have is kept free as well"
        assert reserve_of(found, "vae", 5) is None, "and says nothing of phases that were never seen"


def test_one_unknown_key_makes_its_phase_unknown() -> None:
    found = tracker()
    measure(found, key("net", (1, 8)), 10, 10)
    found.enter(key("net", (1, 99)))
    assert reserve_of(found, "net") is None
    measure(found, key("net", (1, 99)), 70, 60)
    assert reserve_of(found, "net") == 70, "of the keys of one run the largest"


def test_smaller_shapes_borrow_from_the_least_that_covers_them() -> None:
    found = tracker()
    measure(found, key("net", (1, 50)), 50, 50)
    measure(found, key("net", (1, 90)), 90, 90)
    small = found.enter(key("net", (1, 40)))
    assert (small.over_bytes, small.is_measured) == (50, False)
    # A borrowed reserve is lent to nobody: what it stands for was not seen.
    assert found.enter(key("net", (1, 60))).over_bytes == 90


def test_what_was_borrowed_gives_way_to_two_measurements_of_its_own() -> None:
    found = tracker()
    measure(found, key("net", (1, 50)), 50, 50)
    small = measure(found, key("net", (1, 40)), 41)
    assert (small.over_bytes, small.is_measured) == (50, False), "one is not enough"
    small.measured(20)
    assert (small.over_bytes, small.is_measured) == (41, True), "the larger of its own two"


def test_a_measurement_above_what_was_borrowed_counts_at_once() -> None:
    """Smaller shapes may take more: attention goes another way. The next call must not be planned with less room
    than the last one took."""
    found = tracker()
    measure(found, key("net", (1, 50)), 50, 50)
    measure(found, key("net", (1, 40)), 80)
    assert reserve_of(found, "net") == 80


def test_what_did_not_fit_is_unknown_and_measured_once() -> None:
    """It runs with all the room there is, so that what it takes then is what it takes."""
    found = tracker()
    reserve = measure(found, key(), 10, 30)
    reserve.forget()
    assert reserve_of(found, "net") is None
    assert found.enter(key()) is reserve
    reserve.measured(20)
    assert reserve.is_measured
    assert reserve_of(found, "net") == 20


def test_nothing_is_borrowed_from_what_did_not_fit() -> None:
    found = tracker()
    measure(found, key("net", (1, 50)), 50, 50).forget()
    assert found.enter(key("net", (1, 40))).over_bytes is None


# ---- token loops


def loop(found: PhaseTracker, first: int, last: int) -> list[CallKind]:
    """A cache of (2, length, 4) that grows by a token each time, entered with a token of one length."""
    return [found.enter(key("net", (1, 1), (2, length, 4))) for length in range(first, last + 1)]


def test_shapes_that_grow_by_a_token_are_one_key_with_a_quarter_more() -> None:
    found = tracker()
    first = measure(found, key("net", (1, 1), (2, 100, 4)), 800, 800)
    assert reserve_of(found, "net", 100) == 900
    tokens = loop(found, 101, 111)
    assert set(tokens) == {first}
    # A loop keeps what it has of its tokens between passes, where it counts as others': that grows as well.
    assert reserve_of(found, "net", 100) == int(GROWTH * 900)
    assert loop(found, 100, 111) == [first] * 12, "and so is the next loop"


def test_before_a_quarter_more_it_is_measured_again_without_a_moment_of_knowing_nothing() -> None:
    """Where the tokens' square is taken, a ninth more of them takes a quarter more."""
    found = tracker()
    first = measure(found, key("net", (1, 1), (2, 100, 4)), 800, 800)
    *tokens, last = loop(found, 101, 112)
    assert set(tokens) == {first}
    assert last is not first
    assert not last.is_measured
    assert last.over_bytes == int(GROWTH * 800)
    assert last.compute_ms is first.compute_ms, "a pass takes what it took: nothing is timed anew"
    last.measured(900)  # once: what came before it was measured twice
    assert last.is_measured
    assert last.kept_bytes(0) == int(GROWTH * 900)
    assert set(loop(found, 113, 125)) == {last}


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("beside", [1, 10_000])
def test_a_long_loop_is_measured_a_few_times(power: int, beside: int) -> None:
    found = tracker()
    measure(found, key("net", (1, beside), (2, 16, 4)), 16**power, 16**power)
    num_measured = 0
    for length in range(17, 2000):
        reserve = found.enter(key("net", (1, beside), (2, length, 4)))
        assert reserve_of(found, "net") is not None
        kept = reserve.kept_bytes(0)
        assert kept is not None
        assert kept >= length**power
        if not reserve.is_measured:
            num_measured += 1
            reserve.measured(length**power)
    # From 16 to 2000 in steps of which two make a quarter: log(125) / log(1.118) = 43.3, less what single tokens pass.
    assert 38 <= num_measured <= 44


def test_a_margin_is_kept_and_grows_with_the_rest() -> None:
    reserve = CallKind(key())
    assert reserve.kept_bytes(5) is reserve.needed_bytes(5) is None
    reserve.measured(100, 8)
    assert (reserve.over_bytes, reserve.kept_bytes(20), reserve.needed_bytes(20)) == (100, 128, 128)
    reserve.is_growing = True
    assert reserve.kept_bytes(20) == int(GROWTH * 128), "for a new plan"
    assert reserve.needed_bytes(20) == int(GROWTH * 108) + 20, "an old one holds until its room is filled"
    reserve.forget()
    assert reserve.needed_bytes(0) is None
    reserve.measured(90)
    assert reserve.needed_bytes(0) == int(GROWTH * 90), "no margin is left of what was forgotten"


def test_a_jump_is_no_token() -> None:
    found = tracker()
    measure(found, key("net", (1, 1), (2, 100, 4)), 800, 800)
    assert loop(found, 102, 102)[0].over_bytes is None
    assert reserve_of(found, "net") is None


def test_a_second_image_is_no_token() -> None:
    """A batch of two is one longer than a batch of one as well, in every tensor, and takes twice as much."""
    found = tracker()
    shapes = ((1, 16, 128, 128), (1, 333, 4096), (1,))
    measure(found, key("net", *shapes), 100, 100)
    found.enter(key("net", *[(2, *shape[1:]) for shape in shapes]))
    assert reserve_of(found, "net") is None


def test_growth_after_something_unknown_stays_unknown() -> None:
    """Nothing can be said of a token when nothing was measured of the one before."""
    found = tracker()
    assert all(r.over_bytes is None for r in loop(found, 100, 103))


# ---- what a run says of a phase


def test_the_present_run_and_the_run_before_that_began_alike() -> None:
    """Guidance runs with two lengths of text. The second call needs room for both from its first pass on."""
    found = tracker()
    measure(found, key("net", (1, 8)), 10, 10)
    measure(found, key("net", (1, 12)), 90, 90)
    found.enter(key("vae"))
    assert reserve_of(found, "net") == 90, "while others run, it is what its last run took"
    found.enter(key("net", (1, 8)))
    assert reserve_of(found, "net") == 90
    found.enter(key("vae"))
    assert reserve_of(found, "net") == 90, "the second run ended early, but it began like the one before"
    found.enter(key("net", (1, 8)))
    assert reserve_of(found, "net") == 10, "two runs have gone by without the larger key"


def test_a_run_that_begins_otherwise_goes_by_itself_alone() -> None:
    found = tracker()
    measure(found, key("net", (1, 12)), 90, 90)
    measure(found, key("vae"), 5, 5)
    measure(found, key("net", (1, 3)), 10, 10)
    assert reserve_of(found, "net") == 10, "a smaller image: the room of the larger one is free"


def test_a_phase_that_is_entered_again_does_not_begin_anew() -> None:
    found = tracker()
    measure(found, key("net", (1, 8)), 10, 10)
    measure(found, key("net", (1, 12)), 90, 90)
    for _ in range(5):
        found.again("net")
        found.enter(key("net", (1, 8)))
    assert reserve_of(found, "net") == 90


def test_times_are_of_the_keys_that_are_expected() -> None:
    found = tracker()
    time(measure(found, key("net", (1, 12)), 90, 90), {1: 5.0, 2: 1.0})
    time(measure(found, key("net", (1, 8)), 80, 80), {1: 4.0, 2: 3.0})
    assert found.compute_ms() == {1: 5.0, 2: 3.0}, "of two lengths of text the slower, block by block"
    time(measure(found, key("vae"), 5, 5), {7: 1.0})
    time(measure(found, key("net", (1, 3)), 10, 10), {1: 2.0, 2: 2.0})
    assert found.compute_ms() == {1: 2.0, 2: 2.0, 7: 1.0}


# ---- components that take turns


def turns(found: PhaseTracker, *passes: tuple[str, int]) -> None:
    for component, count in passes:
        found.enter(key(component))
        for _ in range(count - 1):
            found.again(component)


def test_components_that_alternate_become_one_phase() -> None:
    found = tracker()
    turns(found, ("control", 1), ("net", 2), ("control", 1))
    assert found.partners() is None, "not before both have come back"
    turns(found, ("net", 2))
    assert found.partners() == ("net", "control"), "in the order of the pipeline"
    found.merge(("net", "control"))
    assert groups(found) == [("encoder",), ("net", "control"), ("vae",)]
    assert found.phases(0)[1].is_repeated
    assert found.phases(0)[1].name == "net + control"
    assert found.current == ("net", "control")
    turns(found, ("control", 1), ("net", 1))
    assert found.current == ("net", "control")
    assert found.partners() is None, "they are one already"


def test_long_turns_are_phases_of_their_own() -> None:
    """Two experts, one for the first steps and one for the others: their turns come once a call."""
    found = tracker()
    for _ in range(3):
        turns(found, ("net", 4), ("control", 4))
        assert found.partners() is None


def test_one_long_turn_ends_what_counts() -> None:
    found = tracker()
    turns(found, ("control", 1), ("net", 1), ("control", 1), ("net", 4), ("control", 1), ("net", 1))
    assert found.partners() is None
    turns(found, ("control", 1), ("net", 1))
    assert found.partners() == ("net", "control")


def test_what_runs_once_a_call_is_no_partner() -> None:
    found = tracker()
    for _ in range(4):
        turns(found, ("encoder", 1), ("net", 1), ("vae", 1))
        assert found.partners() is None


def test_a_merged_phase_needs_what_its_components_need() -> None:
    found = tracker()
    for _ in range(2):
        measure(found, key("control"), 30, 30)
        measure(found, key("net"), 70, 70)
    found.merge(("net", "control"))
    assert reserve_of(found, "control") == reserve_of(found, "net") == 70
    found.enter(key("control", (5, 5)))
    assert reserve_of(found, "net") is None, "one unknown key of one of them"


# ---- pauses


def test_a_pause_forgets_what_was_changed_and_nothing_else() -> None:
    found = tracker()
    for name, _ in PIPE:
        measure(found, key(name), 10, 10)
    new = found.successor(PIPE[:2], changed=["net"])
    assert groups(new) == [("encoder",), ("net",)]
    assert new.enter(key("encoder")).is_measured
    assert not new.enter(key("net")).is_measured
    assert reserve_of(new, "net") is None
    # A component that was gone for a while comes back unknown: it need not be the same.
    assert not new.successor(PIPE, changed=[]).enter(key("vae")).is_measured


def test_a_pause_parts_what_took_turns() -> None:
    found = tracker()
    turns(found, *[("control", 1), ("net", 1)] * 2)
    found.merge(("net", "control"))
    assert groups(found.successor(PIPE, changed=[])) == [(name,) for name, _ in PIPE]


# ---- how much is remembered


def test_images_of_every_size_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_KEYS", 20)
    found = tracker()
    for size in range(1, 100):
        measure(found, key("net", (3 * size, 100 - size)), size, size)
        assert len(found._kinds) <= 20
    assert found.enter(key("net", (3 * 99, 1))).is_measured, "the latest is known"
    assert not found.enter(key("net", (3, 99))).is_measured, "the first is not"


# ---- any history


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(PIPE), st.integers(1, 6), st.integers(1, 3)), max_size=30), st.integers(0, 50)
)
def test_whatever_runs_a_phase_keeps_what_was_seen(
    calls: list[tuple[tuple[str, bool], int, int]], outside_bytes: int
) -> None:
    """Against a list of all runs: the present one counts, and the one before if both began alike."""
    rng = random.Random(0)
    found = tracker()
    runs: dict[str, list[list[Key]]] = {name: [[]] for name, _ in PIPE}
    seen: dict[Key, list[int]] = {}
    last = ""
    for (component, _), size, times in calls:
        for _ in range(times):
            wanted = key(component, (10 * size, 7))
            if component != last:
                runs[component].append([])
            runs[component][-1].append(wanted)
            last = component
            reserve = found.enter(wanted)
            before, present = runs[component][-2:]
            expected = [*present, *(before if present[0] in before else [])]
            kept = reserve_of(found, component, outside_bytes)
            if all(len(seen.get(k, [])) == 2 for k in expected):
                assert kept == outside_bytes + max(max(seen[k]) for k in expected)
            elif kept is not None:  # borrowed
                assert kept >= outside_bytes + max(max(seen.get(k, [0])) for k in expected)
            if not reserve.is_measured:
                seen.setdefault(wanted, []).append(10 * size + rng.randint(0, 9))
                reserve.measured(seen[wanted][-1])
            assert found.current == (component,)
            assert groups(found) == [(name,) for name, _ in PIPE]


def test_what_runs_a_few_times_a_call_is_brief() -> None:
    """Told of denoisers, by the last call of a pipeline that used them."""
    found = PhaseTracker([("encoder", False), ("net", True), ("vae", False)])

    def call(num_passes: int) -> None:
        found.begin_use(is_call=True)
        for name, count in (("encoder", 2), ("net", num_passes), ("vae", 1)):
            for _ in range(count):
                found.enter(key(name))

    call(4)
    assert not found.brief, "the call is not over"
    call(MANY_PASSES)
    assert found.brief == {"net"}
    assert [phase.is_brief for phase in found.phases(0)] == [False, True, False]
    call(0)
    assert not found.brief
    call(4)
    assert not found.brief, "a call that did not use it says nothing"
    for _ in range(50):  # of the component by itself, which is no call of a pipeline
        found.begin_use(is_call=False)
        found.enter(key("net"))
    call(4)
    assert found.brief == {"net"}
    assert found.successor([("encoder", False), ("vae", False)], []).brief == frozenset()
