"""A plan as people see it: text to the letter, HTML and plain values with the same numbers, and no planning for it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from layerstream.blocks import UnitSpec
from layerstream.device.simulated import SimulatedDevice
from layerstream.planning.costs import Costs
from layerstream.planning.phase_plan import Phase
from layerstream.planning.plan import Plan, make_plan
from tests.html_reading import html_cells, html_text
from tests.test_plan import units_of

MIB, GIB = 2**20, 2**30

UNITS = units_of(
    ("text", False, 128 * MIB, [256 * MIB] * 4),
    ("net", True, 256 * MIB, [768 * MIB, *[512 * MIB] * 5]),
    ("vae", False, 192 * MIB, []),
)
COSTS = Costs(50.0, {u.index: u.num_bytes / 1e9 * 12 for u in UNITS if u.component == "net" and u.is_block})


def plan_of(
    budget: int | None,
    costs: Costs | None = COSTS,
    *,
    reserves: tuple[int | None, int | None, int | None] = (64 * MIB, 512 * MIB, None),
) -> Plan:
    names = (("text", False), ("net", True), ("vae", False))
    phases = [Phase((name,), is_repeated, size) for (name, is_repeated), size in zip(names, reserves, strict=True)]
    return make_plan(UNITS, phases, budget, costs=costs)


def assumed(reserve_bytes: int) -> list[Phase]:
    """As `layerstream.plan` plans ahead."""
    return [replace(p.phase, reserve_bytes=reserve_bytes, is_assumed=True) for p in plan_of(None).phases]


# ---- text


def test_a_plan() -> None:
    assert str(plan_of(3 * GIB).with_next_gib()).splitlines() == [
        "budget 3.0 GiB, least 2.2 GiB, predicted peak 3.0 GiB",
        "",
        "component  stack   blocks  each                    placement               slots",
        "text       base    1       128.0 MiB               1 by phase",
        "text       layers  4       256.0 MiB               4 by phase",
        "net        base    1       256.0 MiB               1 by phase",
        "net        layers  6       512.0 MiB to 768.0 MiB  2 by phase, 4 streamed  2 x 512.0 MiB",
        "vae        base    1       192.0 MiB               1 by phase",
        "",
        "text: 2.6 GiB of weights + 64.0 MiB beside them = 2.7 GiB",
        "net: 2.5 GiB of weights + 512.0 MiB beside them = 3.0 GiB; 44.0 ms a pass predicted, waits-bound",
        "vae: 192.0 MiB of weights + what it takes beside them, not measured yet",
        "1 GiB more would take 2.1 ms off a pass of `net`",
    ]


def test_a_plan_of_the_least_promises_nothing() -> None:
    """Nothing was timed, and there is no budget that could be raised."""
    assert str(plan_of(None, None).with_next_gib()).splitlines() == [
        "budget the least, least 2.2 GiB, predicted peak 2.2 GiB",
        "",
        "component  stack   blocks  each                    placement   slots",
        "text       base    1       128.0 MiB               1 by phase",
        "text       layers  4       256.0 MiB               4 streamed  2 x 256.0 MiB",
        "net        base    1       256.0 MiB               1 by phase",
        "net        layers  6       512.0 MiB to 768.0 MiB  6 streamed  2 x 768.0 MiB",
        "vae        base    1       192.0 MiB               1 by phase",
        "",
        "text: 640.0 MiB of weights + 64.0 MiB beside them = 704.0 MiB",
        "net: 1.8 GiB of weights + 512.0 MiB beside them = 2.2 GiB",
        "vae: 192.0 MiB of weights + what it takes beside them, not measured yet",
    ]


def test_what_was_assumed_is_not_said_to_be_measured() -> None:
    lines = str(make_plan(UNITS, assumed(512 * MIB), 3 * GIB)).splitlines()
    assert lines[0] == "budget 3.0 GiB, least 2.2 GiB, predicted peak 3.0 GiB"
    assert "net: 2.5 GiB of weights + 512.0 MiB assumed beside them = 3.0 GiB" in lines


def test_what_is_assumed_to_take_nothing_has_no_number() -> None:
    """Nobody knows yet what activations take: neither the sum nor the peak has them."""
    text = str(make_plan(UNITS, assumed(0), 3 * GIB))
    assert text.startswith("budget 3.0 GiB, least 1.8 GiB, predicted peak 3.0 GiB before activations\n")
    assert "beside" not in text
    assert "\nnet: 3.0 GiB of weights\n" in text


def test_a_plan_with_nothing_measured_has_a_peak_before_activations() -> None:
    assert ", predicted peak 1.8 GiB before activations\n" in str(plan_of(3 * GIB, reserves=(None, None, None)))


def test_no_limit_is_said_as_such() -> None:
    """A simulated device without a size would have had a budget of 993.3 TiB."""
    unlimited = round(0.97 * SimulatedDevice().total_bytes())
    assert str(plan_of(unlimited)).startswith("no memory limit, least 2.2 GiB, predicted peak 5.3 GiB\n")


def test_a_plan_that_holds_everything_has_nothing_to_gain() -> None:
    plan = make_plan(UNITS, assumed(0), 8 * GIB, costs=COSTS).with_next_gib()
    text = str(plan)
    assert plan.next_gib_ms == {"net": 0.0}
    assert "1 GiB more" not in text
    assert "streamed" not in text
    assert "net        layers  6       512.0 MiB to 768.0 MiB  6 resident" in text
    assert "; 41.9 ms a pass predicted, compute-bound" in text


def test_a_plan_in_one_line() -> None:
    assert repr(plan_of(3 * GIB)) == (
        "Plan(budget 3.0 GiB, least 2.2 GiB, predicted peak 3.0 GiB; blocks: 6 by phase, 4 streamed)"
    )
    vae = [unit for unit in UNITS if unit.component == "vae"]
    assert repr(make_plan(vae, [Phase(("vae",), False)], None)) == (
        "Plan(budget the least, least 192.0 MiB, predicted peak 192.0 MiB before activations)"
    )


# ---- HTML and plain values


def test_html_has_the_numbers_of_the_text() -> None:
    plan = plan_of(3 * GIB).with_next_gib()
    html = plan._repr_html_()
    lines = str(plan).splitlines()
    assert [" ".join(cells).split() for cells in html_cells(html)] == [line.split() for line in lines[3:8]]
    told = html_text(html)
    for line in [lines[0], *lines[9:]]:
        assert line.replace("`", "") in told


def test_html_escapes_names() -> None:
    unit = UnitSpec(0, "<b> (base)", "<b>", None, 5)
    html = make_plan([unit], [Phase(("<b>",), False)], None)._repr_html_()
    assert "<b>" not in html
    assert html_cells(html)[0][0] == "<b>"
    assert "<b>: 5 B of weights" in html_text(html)


def test_a_plan_as_plain_values() -> None:
    values = plan_of(3 * GIB).with_next_gib().as_dict()
    assert json.loads(json.dumps(values)) == values
    assert (values["budget_bytes"], values["needed_bytes"], values["peak_bytes"]) == (3 * GIB, 2304 * MIB, 3 * GIB)
    assert values["stacks"][3] == {
        "component": "net",
        "stack": "layers",
        "num_blocks": 6,
        "smallest_bytes": 512 * MIB,
        "largest_bytes": 768 * MIB,
        "total_bytes": 3328 * MIB,
        "streamed_bytes": 2048 * MIB,
        "num_placed": {"by phase": 2, "streamed": 4},
        "num_slots": 2,
        "slot_bytes": 512 * MIB,
    }
    assert values["stacks"][2]["stack"] is None
    net, vae = values["phases"][1:]
    assert (net["reserve_bytes"], net["is_assumed"], net["bound"]) == (512 * MIB, False, "waits")
    assert net["ms_per_pass"] == pytest.approx(44.0, abs=0.05)
    assert (vae["reserve_bytes"], vae["ms_per_pass"]) == (None, None)
    assert values["next_gib_ms"]["net"] == pytest.approx(2.1, abs=0.05)


def test_pieces_are_counted_as_their_blocks() -> None:
    """Of one block a piece streams, of another none: two blocks, each in one place."""
    blocks = ("net.layers.0", "net.layers.0", "net.layers.1", "net.layers.1")
    pieces = [UnitSpec(i, f"{name}.{i}", "net", "layers", 10, True, (), name) for i, name in enumerate(blocks)]
    plan = make_plan(pieces, [Phase(("net",), True, 0)], 40, costs=Costs(1e-6, dict.fromkeys(range(4), 1.0)))
    partly = replace(plan, phases=(replace(plan.phases[0], resident=frozenset({0, 2, 3}), num_slots=2, slot_bytes=10),))
    (stack,) = partly.summary().stacks
    assert stack.num_placed == {"partly streamed": 1, "resident": 1}
    assert (stack.num_streamed, stack.streamed_bytes, stack.total_bytes) == (1, 10, 40)


# ---- what the next GiB would buy


@pytest.mark.parametrize(("gib", "gain_ms"), [(2.5, 12.9), (3.0, 2.1), (3.5, None), (6, None)])
def test_one_gib_more(gib: float, gain_ms: float | None) -> None:
    """The difference to the plan with that GiB; less than 0.05 ms is not worth a line."""
    plan = plan_of(int(gib * GIB)).with_next_gib()
    more = plan_of(int((gib + 1) * GIB)).phase_of("net").prediction
    now = plan.phase_of("net").prediction
    assert now is not None
    assert more is not None
    gain = now.ms_per_pass - more.ms_per_pass
    told = [line for line in str(plan).splitlines() if line.startswith("1 GiB more")]
    assert told == ([] if gain < 0.05 else [f"1 GiB more would take {gain:.1f} ms off a pass of `net`"])
    assert (gain_ms is None and gain < 0.05) or gain == pytest.approx(gain_ms, abs=0.05)


def test_nothing_is_promised_that_was_not_measured() -> None:
    """Assumed speeds are good enough to plan with, and not to print."""
    partly = Costs(50.0, dict(list(COSTS.compute_ms.items())[1:]))
    for costs in (None, partly):
        plan = plan_of(3 * GIB, costs).with_next_gib()
        assert plan.next_gib_ms == {}
        assert "1 GiB more" not in str(plan)
        assert "predicted, " not in str(plan)


def test_showing_a_plan_plans_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, asked = plan_of(3 * GIB), plan_of(3 * GIB).with_next_gib()

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("planned")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["layerstream.planning.plan"], "make_plan", never)
        for show in (str, repr, Plan._repr_html_, Plan.as_dict):
            shown, shown_with_gain = show(plan), show(asked)
            assert (shown == shown_with_gain) == (show is repr)
        assert "1 GiB more" in str(asked), "it was worked out before, and once"
        assert asked.with_next_gib() is asked
        with pytest.raises(AssertionError, match="planned"):
            plan.with_next_gib()
    assert plan == asked
    assert str(plan.with_next_gib()) == str(asked)
