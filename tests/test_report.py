"""What is printed, to the letter, and that it adds up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import layerstream
from layerstream.adapters import registry
from layerstream.plan import Costs, Phase, Plan, make_plan
from layerstream.report import report
from layerstream.simulated import SimulatedDevice
from layerstream.stats import PhaseStats, Stats
from layerstream.tables import table
from tests.fakes import Sized
from tests.test_plan import units_of

MIB, GIB = 2**20, 2**30

UNITS = units_of(
    ("text", False, 128 * MIB, [256 * MIB] * 4),
    ("net", True, 256 * MIB, [768 * MIB, *[512 * MIB] * 5]),
    ("vae", False, 192 * MIB, []),
)
COSTS = Costs(50.0, {u.index: u.num_bytes / 1e9 * 12 for u in UNITS if u.component == "net" and u.is_block})


def plan_of(budget: int | None, costs: Costs | None = COSTS) -> Plan:
    phases = [Phase(("text",), False, 64 * MIB), Phase(("net",), True, 512 * MIB), Phase(("vae",), False, None)]
    return make_plan(UNITS, phases, budget, costs=costs)


STATS = Stats(
    budget_bytes=3 * GIB,
    num_loads=43,
    loaded_bytes=19 * GIB,
    num_demand_loads=3,
    num_stalls=12,
    stall_ms=34.56,
    peak_reserved_bytes=2900 * MIB,
    peak_device_bytes=2500 * MIB,
    pinned_bytes=4800 * MIB,
    num_evicted=2,
)
PHASES = {
    "text": PhaseStats(
        num_passes=1,
        num_loads=5,
        loaded_bytes=GIB,
        num_stalls=2,
        stall_ms=4.06,
        stall_ms_by_unit={1: 4.06},
        reserve_bytes=64 * MIB,
        peak_reserved_bytes=800 * MIB,
    ),
    "net": PhaseStats(
        num_passes=4,
        num_loads=38,
        loaded_bytes=18 * GIB,
        num_stalls=10,
        stall_ms=30.5,
        stall_ms_by_unit={5: 0.5, 6: 20.0, 8: 10.0},
        reserve_bytes=512 * MIB,
        peak_reserved_bytes=2900 * MIB,
    ),
}


# ---- plans


def test_a_plan() -> None:
    assert str(plan_of(3 * GIB)).splitlines() == [
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
    """Nothing was measured, and there is no budget that could be raised."""
    assert str(plan_of(None, None)).splitlines() == [
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


def test_a_plan_that_holds_everything_has_nothing_to_gain() -> None:
    text = str(
        make_plan(UNITS, [replace(p.phase, reserve_bytes=0) for p in plan_of(None).phases], 8 * GIB, costs=COSTS)
    )
    assert "1 GiB more" not in text
    assert "streamed" not in text
    assert "net        layers  6       512.0 MiB to 768.0 MiB  6 resident" in text
    assert "; 41.9 ms a pass predicted, compute-bound" in text


# ---- reports


def test_a_report() -> None:
    assert report(plan_of(3 * GIB), STATS, PHASES).splitlines() == [
        "budget 3.0 GiB; peak reserved 2.8 GiB, weights at most 2.4 GiB; 4.7 GiB page-locked in host memory",
        "43 loads, 19.0 GiB over the bus, 3 not foreseen; 12 stalls, 34.6 ms; 2 residents gave their room to another "
        "phase",
        "",
        "phase  passes  loaded    stalls        beside weights  peak reserved  predicted pass",
        "text   1       1.0 GiB   2 (4.1 ms)    64.0 MiB        800.0 MiB",
        "net    4       18.0 GiB  10 (30.5 ms)  512.0 MiB       2.8 GiB        44.0 ms, waits",
        "`text` waited 4.1 ms for `text.layers`",
        "`net` waited 30.0 ms for `net.layers`; longest for `net.layers.0`, 20.0 ms",
        "1 GiB more would take 2.1 ms off a pass of `net`",
    ]


def test_a_report_before_anything_ran() -> None:
    assert report(plan_of(None, None), Stats(), {}).splitlines() == [
        "no budget, the least of weights; peak reserved 0 B, weights at most 0 B; 0 B page-locked in host memory",
        "0 loads, 0 B over the bus, 0 not foreseen; 0 stalls, 0.0 ms; 0 residents gave their room to another phase",
        "nothing has run yet",
    ]


def test_only_phases_that_ran_have_a_line_and_what_is_not_known_says_so() -> None:
    lines = report(plan_of(3 * GIB), STATS, {"vae": PhaseStats(num_passes=2)}).splitlines()
    assert lines[3:5] == [
        "phase  passes  loaded  stalls      beside weights  peak reserved  predicted pass",
        "vae    2       0 B     0 (0.0 ms)  not measured    0 B",
    ]


def test_waits_for_what_is_no_block() -> None:
    """A base is named itself, a stack by the sum of its blocks; what a pause took away has no name any more."""
    waited = PhaseStats(stall_ms=100.0, stall_ms_by_unit={0: 35.0, 1: 40.0, 2: 20.0, 99: 5.0})
    assert report(plan_of(3 * GIB), STATS, {"text": waited}).splitlines()[5:-1] == [
        "`text` waited 60.0 ms for `text.layers`, 35.0 ms for `text (base)`; longest for `text.layers.0`, 40.0 ms"
    ]


def test_waits_for_nothing_that_has_a_name_are_no_line() -> None:
    lost = PhaseStats(stall_ms=5.0, stall_ms_by_unit={99: 5.0})
    assert not any(line.endswith("waited ") for line in report(plan_of(3 * GIB), STATS, {"text": lost}).splitlines())


# ---- what the next GiB would buy


@pytest.mark.parametrize(("gib", "gain_ms"), [(2.5, 12.9), (3.0, 2.1), (3.5, None), (6, None)])
def test_one_gib_more(gib: float, gain_ms: float | None) -> None:
    """The difference to the plan with that GiB, in both texts alike; less than 0.05 ms is not worth a line."""
    plan = plan_of(int(gib * GIB))
    more = plan_of(int((gib + 1) * GIB)).phase_of("net").prediction
    now = plan.phase_of("net").prediction
    assert now is not None
    assert more is not None
    gain = now.ms_per_pass - more.ms_per_pass
    told = [line for line in str(plan).splitlines() if line.startswith("1 GiB more")]
    assert told == [line for line in report(plan, STATS, PHASES).splitlines() if line.startswith("1 GiB more")]
    assert told == ([] if gain < 0.05 else [f"1 GiB more would take {gain:.1f} ms off a pass of `net`"])
    assert (gain_ms is None and gain < 0.05) or gain == pytest.approx(gain_ms, abs=0.05)


def test_nothing_is_promised_that_was_not_measured() -> None:
    """Assumed speeds are good enough to plan with, and not to print."""
    partly = Costs(50.0, dict(list(COSTS.compute_ms.items())[1:]))
    for costs in (None, partly):
        plan = plan_of(3 * GIB, costs)
        for text in (str(plan), report(plan, STATS, PHASES)):
            assert "1 GiB more" not in text
            assert "predicted, " not in text
            assert " ms, " not in text.split("predicted pass")[-1].split("waited")[0]


# ---- against the engine


def test_phases_add_up_to_the_whole() -> None:
    device = SimulatedDevice(link_gb_per_s=1e-3)

    class Text(Sized):
        pass

    pipe = {
        "text": Text(device, [2048] * 5, takes=lambda x: 1_000),
        "net": Sized(device, [4096] * 8, ms=[3.0] * 8, takes=lambda x: 5_000),
        "vae": Sized(device, [], takes=lambda x: 9_000),
    }
    layerstream.register_adapter("Text", layerstream.Adapter(stacks=["blocks"]))
    x = torch.tensor([[0.0] * 8])
    try:
        with (
            layerstream.offload(pipe, vram_budget=36_000, device=device) as streamer,
            device.accounting(),
            torch.no_grad(),
        ):
            for _ in range(4):
                pipe["text"](x)
                for _ in range(6):
                    pipe["net"](x)
                pipe["vae"](x)
            text = streamer.report()
            stats, phases = streamer.stats(), streamer._last.phase_stats
    finally:
        registry._REGISTERED.clear()
    assert list(phases) == ["text", "net", "vae"]
    assert [phase.num_passes for phase in phases.values()] == [4, 24, 4]
    for name in ("num_loads", "loaded_bytes", "num_stalls"):
        assert sum(getattr(phase, name) for phase in phases.values()) == getattr(stats, name) > 0
    assert sum(phase.stall_ms for phase in phases.values()) == pytest.approx(stats.stall_ms)
    for phase in phases.values():
        assert sum(phase.stall_ms_by_unit.values()) == pytest.approx(phase.stall_ms)
    assert max(phase.peak_reserved_bytes for phase in phases.values()) == stats.peak_reserved_bytes <= 36_000
    assert max(phase.peak_weights_bytes for phase in phases.values()) <= stats.peak_device_bytes
    for name, phase in phases.items():
        assert any(line.split()[:2] == [name, str(phase.num_passes)] for line in text.splitlines())
    # It can still be asked when all is over, and says the same of what has happened.
    assert streamer.report() == text


def test_components_that_share_a_phase_keep_what_they_did_alone_in_the_report() -> None:
    """Until they were seen to take turns each was a phase of its own, and its loads are in the totals."""
    device = SimulatedDevice()
    pipe = {"net": Sized(device, [1024] * 6), "control": Sized(device, [1024] * 6)}
    x = torch.tensor([[0.0] * 8])
    with layerstream.offload(pipe, vram_budget="min", device=device) as streamer, torch.no_grad():
        for _ in range(5):
            pipe["control"](x)
            pipe["net"](x)
        text, phases = streamer.report(), streamer._last.phase_stats
    assert {"net", "control", "net + control"} == set(phases)
    assert [phase.num_passes for phase in phases.values()] == [2, 1, 7]
    cells = [line.split("  ") for line in text.splitlines()]
    rows = {row[0]: next(cell.strip() for cell in row[1:] if cell) for row in cells if len(row) > 4}
    assert rows == {"phase": "passes"} | {name: str(phase.num_passes) for name, phase in phases.items()}


# ---- tables


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert table(["a", "long header", "c"], [["wide cell", "1", ""], ["", "", "last"]]).split("\n") == [
        "a          long header  c",
        "wide cell  1",
        "                        last",
    ]
    assert table(["only", "headers"], []) == "only  headers"


cells = st.text(
    st.characters(codec="ascii", exclude_characters=" \n\r\t\x0b\x0c\x1c\x1d\x1e\x1f"), min_size=1, max_size=9
)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(cells, min_size=n, max_size=n), min_size=1, max_size=6)))
def test_a_table_can_be_read_back(rows: list[list[str]]) -> None:
    headers, *rest = rows
    lines = table(headers, rest).split("\n")
    assert [line.split() for line in lines] == rows
    assert all(line == line.rstrip() for line in lines)


def test_a_row_of_another_length_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="shorter|longer"):
        table(["a", "b"], [["1", "2", "3"]])
