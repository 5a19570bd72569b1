"""The learned order, by the number of uses that nothing had predicted: each is a load that compute waits for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstream.planning import order
from layerstream.planning.order import OrderLearner

Pass = Sequence[int]


def misses(learner: OrderLearner, passes: Sequence[Pass]) -> int:
    """Run the passes; how many uses were not the first prediction."""
    missed = 0
    for uses in passes:
        learner.begin_pass()
        for unit in uses:
            missed += learner.predict(1) != [unit]
            learner.observe(unit)
    return missed


def ring(length: int = 12) -> OrderLearner:
    return OrderLearner([(range(length), True)])


# ---- the patterns of models (EXPERIMENTS.md 13)


def test_plain_ring_never_misses() -> None:
    assert misses(ring(), [range(12)] * 20) == 0


def test_prediction_goes_on_into_the_next_pass() -> None:
    learner = ring(4)
    assert learner.predict(6) == [0, 1, 2, 3, 0, 1], "by definition, before anything was seen"
    misses(learner, [range(4)])
    assert learner.predict(6) == [0, 1, 2, 3, 0, 1]
    learner.observe(0)
    assert learner.predict(3) == [1, 2, 3]


def test_block_used_three_times_a_pass_with_different_successors() -> None:
    uses = [0, 1, 2, 1, 3, 4, 1, 5]
    learner = OrderLearner([(range(6), True)])
    assert misses(learner, [uses]) <= 5, "the first pass is learned"
    assert misses(learner, [uses] * 13) == 0, "a map of successors misses 54 of 107"


def test_token_loop_inside_a_call() -> None:
    layers, head = range(48), [48]
    learner = OrderLearner([(layers, False), (head, True)])
    token = [layers, *[head] * 28]
    assert misses(learner, [layers, *[head] * 28]) == 0
    assert misses(learner, token) <= 1, "the end of the head's loop cannot be known the first time"
    assert misses(learner, token * 5) == 0


def test_token_loop_with_a_head_of_several_blocks() -> None:
    layers, head = range(48), range(48, 54)
    learner = OrderLearner([(layers, False), (head, True)])
    token = [layers, *[head] * 28]
    misses(learner, token)
    assert misses(learner, token) <= 1
    assert misses(learner, token * 5) == 0


def test_skip_layer_guidance() -> None:
    full, skipping = range(24), [b for b in range(24) if b not in (7, 8, 9)]
    call = [p for step in range(10) for p in ([full, skipping] if 2 <= step < 6 else [full])]
    learner = ring(24)
    assert misses(learner, call) <= 6
    # Where in the call the skipping starts is not written in the blocks before it: one miss, not 4 x 2.
    assert misses(learner, call) <= 1
    assert misses(learner, call) <= 1


def test_two_denoisers_one_after_another() -> None:
    encoder, high, low = range(4), range(4, 14), range(14, 24)
    learner = OrderLearner([(encoder, False), (high, True), (low, True)])
    call = [encoder, *[high] * 6, *[low] * 8]
    assert misses(learner, call) <= 1, "the change of denoiser"
    assert misses(learner, call) <= 1, "the start of the second call"
    assert misses(learner, call) == 0
    assert misses(learner, call) == 0


def test_two_denoisers_alone() -> None:
    high, low = range(10), range(10, 20)
    learner = OrderLearner([(high, True), (low, True)])
    call = [*[high] * 6, *[low] * 8]
    assert misses(learner, call) <= 1, "the change of denoiser"
    assert misses(learner, call) <= 2, "the start of the second call, and the change"
    assert misses(learner, call) == 0


def test_two_denoisers_taking_turns() -> None:
    a, b = range(5), range(5, 10)
    learner = OrderLearner([(a, True), (b, True)])
    misses(learner, [a, b, a, b])
    assert misses(learner, [a, b] * 6) == 0


# ---- wrapping: to the next component, to the next call


def pipeline() -> OrderLearner:
    return OrderLearner([(range(5), False), (range(5, 15), True), (range(15, 18), False)])


def call(num_steps: int) -> list[Pass]:
    return [range(5), *[range(5, 15)] * num_steps, range(15, 18)]


def test_second_identical_call_never_misses() -> None:
    learner = pipeline()
    assert misses(learner, call(8)) == 1, "where the denoiser's loop ends"
    assert misses(learner, call(8)) == 0
    assert learner.predict(5) == [0, 1, 2, 3, 4], "the next call's first blocks, while nothing runs"


def test_call_with_another_number_of_steps_in_between() -> None:
    learner = pipeline()
    misses(learner, call(8))
    assert misses(learner, call(3)) <= 1
    assert misses(learner, call(8)) <= 1
    assert misses(learner, call(8)) <= 1
    assert misses(learner, call(8)) == 0


@pytest.mark.parametrize("strange", [range(7), [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]], ids=["exit", "skip"])
def test_one_strange_pass_does_not_cost_a_miss_in_every_pass_after_it(strange: Pass) -> None:
    learner = ring()
    misses(learner, [range(12)] * 20)
    # The strange place; where it was the last time; and, two misses being reason to doubt, the use after it.
    assert misses(learner, [strange, range(12)]) <= 4
    # It is guessed once more at most: an interrupted call must not slow down the ones after it.
    assert misses(learner, [range(12)] * 10) <= 2


def test_an_interrupted_call_is_forgotten_soon() -> None:
    learner = pipeline()
    misses(learner, call(8) * 3)
    misses(learner, [*call(3)[:3], range(5, 12)])
    assert misses(learner, call(8)) <= 3
    assert sum(misses(learner, call(8)) for _ in range(5)) <= 3
    assert misses(learner, call(8)) == 0


def test_chains_without_units_are_passed_over() -> None:
    learner = OrderLearner([([], True), ([3, 4], False), ([], False), ([7], True)])
    assert learner.predict(5) == [3, 4, 7, 7, 7]
    assert OrderLearner([]).predict(3) == []
    assert OrderLearner([([], True)]).predict(3) == []


# ---- doubt


def test_two_misses_silence_it_until_the_present_follows_the_past() -> None:
    learner = ring()
    misses(learner, [range(12)] * 2)
    learner.begin_pass()
    for unit in (0, 5, 3):
        learner.observe(unit)
    assert learner.predict(4) == [], "two misses in a pass"
    assert learner.observe(4), "the guess kept in silence was right"
    assert learner.predict(2) == [5, 6], "found again"
    learner.observe(9)
    assert learner.predict(2) == [], "one more miss brings the doubt back"
    learner.begin_pass()
    assert learner.predict(1) == [10], "doubt ends with the pass"


def test_a_first_miss_does_not_silence_it() -> None:
    learner = ring()
    misses(learner, [range(12)] * 2)
    learner.begin_pass()
    learner.observe(5)
    assert learner.predict(2) == [6, 7]


# ---- properties

UNITS = st.integers(0, 6)


@given(
    st.lists(st.lists(UNITS, max_size=8), max_size=12),
    st.lists(st.integers(0, 9), unique=True, max_size=8),
    st.booleans(),
)
def test_predictions_are_units_that_exist(passes: list[list[int]], chain: list[int], repeats: bool) -> None:
    learner = OrderLearner([(chain, repeats)])
    known = set(chain)
    for uses in passes:
        learner.begin_pass()
        for unit in uses:
            for count in (0, 1, 5):
                predicted = learner.predict(count)
                assert len(predicted) <= count
                assert set(predicted) <= known
            learner.observe(unit)
            known.add(unit)


@given(st.lists(UNITS, min_size=1, max_size=24))
def test_whatever_repeats_is_learned(period: list[int]) -> None:
    learner = ring(7)
    misses(learner, [period] * 2)
    assert misses(learner, [period]) <= 1
    assert misses(learner, [period] * 3) == 0


@given(st.lists(UNITS, min_size=1, max_size=12), st.lists(UNITS, max_size=30))
def test_whatever_repeats_is_learned_after_any_past(period: list[int], past: list[int]) -> None:
    learner = ring(7)
    misses(learner, [past, *[period] * 8])
    assert misses(learner, [period] * 3) == 0


@given(st.lists(st.lists(UNITS, max_size=8), max_size=12))
def test_observe_says_what_predict_said(passes: list[list[int]]) -> None:
    learner = ring(7)
    for uses in passes:
        learner.begin_pass()
        for unit in uses:
            predicted = learner.predict(1)
            is_hit = learner.observe(unit)
            if predicted:
                assert is_hit == (predicted == [unit])


# ---- units left out


def test_what_is_given_up_once_a_call_is_foreseen_in_the_next() -> None:
    """Blocks 1 and 3 of an encoder stay until the denoiser runs, and nobody tells of their uses meanwhile."""
    learner = OrderLearner([(range(5), False), (range(5, 8), True)])
    call = [*range(5), *range(5), *[5, 6, 7] * 6]
    misses(learner, [call, call])
    for _ in range(3):
        assert misses(learner, [range(5)]) == 0, "1 and 3 are loaded again"
        learner.leave_out([1, 3])
        assert misses(learner, [[0, 2, 4]]) == 0
        learner.take_in([1, 3])
        assert misses(learner, [[5, 6, 7]] * 6) <= 1


def test_the_trace_has_what_is_left_out_and_predictions_do_not() -> None:
    learner = ring(4)
    misses(learner, [range(4)] * 3)
    learner.leave_out([1, 2])
    assert learner.predict(4) == [0, 3, 0, 3]
    assert learner.trace(3) == [0, 1, 2, 3, 0]
    learner.observe_expected([0, 3])
    learner.take_in([1, 2])
    assert learner.predict(5) == [0, 1, 2, 3, 0]


def test_loads_ahead_do_not_look_past_a_whole_call() -> None:
    """Where a denoiser stays, thousands of untold uses come before the next that is told."""
    learner = ring(3000)
    misses(learner, [range(3000)] * 2)
    learner.leave_out(range(1, 3000))
    assert len(learner.trace(8)) == order._MOST_UNTOLD
    assert learner.predict(8) == [0]
    assert learner.observe(0), "what comes is known, however far it is"


def test_nothing_is_expected_while_all_is_left_out() -> None:
    learner = ring(3)
    misses(learner, [range(3)] * 2)
    learner.leave_out(range(3))
    assert learner.predict(2) == []
    learner.take_in([1])
    assert not learner.observe(2), "told of untold: learned as anything new is"


@given(
    st.lists(UNITS, min_size=1, max_size=8, unique=True),
    st.sets(UNITS, max_size=7),
    st.lists(st.booleans(), max_size=8),
)
def test_leaving_out_and_taking_in_loses_nothing(period: list[int], out: set[int], turns: list[bool]) -> None:
    """Of what repeats, whichever units are told of: nothing that is told is missed, but where told ones begin again.
    Each once a period: of two uses of one unit in a row nobody can say whether one, both or none has come."""
    learner = ring(7)
    misses(learner, [period] * 4)
    for is_out in turns:
        (learner.leave_out if is_out else learner.take_in)(out)
        told = [unit for unit in period if not (is_out and unit in out)]
        assert misses(learner, [told]) <= 1
        assert misses(learner, [told] * 2) == 0


# ---- the history's end


def test_old_history_is_forgotten_and_the_order_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "_MAX_HISTORY", 64)
    learner = OrderLearner([(range(6), True)])
    uses = [0, 1, 2, 1, 3, 4, 1, 5]
    misses(learner, [uses] * 2)
    for _ in range(100):
        assert misses(learner, [uses]) == 0
        assert len(learner._history) <= 64
        learner._index()
        assert sum(map(len, learner._positions.values())) == len(learner._history)


@given(st.integers(1, 5), st.lists(UNITS, max_size=60))
def test_a_history_too_short_for_anything_never_raises(most: int, uses: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "_MAX_HISTORY", most)
        learner = ring(7)
        misses(learner, [uses])
        assert len(learner._history) <= most
