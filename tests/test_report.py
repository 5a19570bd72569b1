"""The report and the lines for the log: to the letter, and that they add up."""

from __future__ import annotations

import json

import pytest
import torch

import layerstream
from layerstream.device.simulated import SimulatedDevice
from layerstream.model.adapters import registry
from layerstream.planning.costs import Costs
from layerstream.report import Report, entered_line, predicted_line, streamer_html
from layerstream.stats import PhaseStats, Stats
from tests.fakes import Sized
from tests.html_reading import html_cells, html_text
from tests.test_summary import COSTS, GIB, MIB, plan_of

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

REPORT = Report.of(plan_of(3 * GIB).with_next_gib(), STATS, PHASES)


# ---- reports


def test_a_report() -> None:
    assert str(REPORT).splitlines() == [
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


def test_a_report_says_what_copies() -> None:
    report = Report.of(plan_of(3 * GIB), STATS, PHASES, copied_by="cudaMemcpyBatchAsync")
    assert "43 loads, 19.0 GiB over the bus by cudaMemcpyBatchAsync, 3 not foreseen" in str(report)
    assert report.as_dict()["copied_by"] == "cudaMemcpyBatchAsync"


def test_a_report_before_anything_ran() -> None:
    assert str(Report.of(plan_of(None, None), Stats(), {})).splitlines() == [
        "no budget, the least of weights; peak reserved 0 B, weights at most 0 B; 0 B page-locked in host memory",
        "0 loads, 0 B over the bus, 0 not foreseen; 0 stalls, 0.0 ms; 0 residents gave their room to another phase",
        "nothing has run yet",
    ]


def test_only_phases_that_ran_have_a_line_and_what_is_not_known_says_so() -> None:
    lines = str(Report.of(plan_of(3 * GIB), STATS, {"vae": PhaseStats(num_passes=2)})).splitlines()
    assert lines[3:5] == [
        "phase  passes  loaded  stalls      beside weights  peak reserved  predicted pass",
        "vae    2       0 B     0 (0.0 ms)  not measured    0 B",
    ]


def test_waits_for_what_is_no_block() -> None:
    """A base is named itself, a stack by the sum of its blocks; what a pause took away has no name any more."""
    waited = PhaseStats(stall_ms=100.0, stall_ms_by_unit={0: 35.0, 1: 40.0, 2: 20.0, 99: 5.0})
    assert str(Report.of(plan_of(3 * GIB), STATS, {"text": waited})).splitlines()[5:] == [
        "`text` waited 60.0 ms for `text.layers`, 35.0 ms for `text (base)`; longest for `text.layers.0`, 40.0 ms"
    ]


def test_waits_for_nothing_that_has_a_name_are_no_line() -> None:
    lost = PhaseStats(stall_ms=5.0, stall_ms_by_unit={99: 5.0})
    assert "waited" not in str(Report.of(plan_of(3 * GIB), STATS, {"text": lost}))


def test_a_report_in_a_terminal_is_its_text() -> None:
    assert repr(REPORT) == str(REPORT)


def test_a_report_does_not_change_when_the_counters_go_on() -> None:
    stats, phases = Stats(num_loads=1), {"net": PhaseStats(num_passes=1, stall_ms=3.0, stall_ms_by_unit={6: 3.0})}
    report = Report.of(plan_of(3 * GIB), stats, phases)
    before = str(report), report.as_dict()
    stats.num_loads = 2
    phases["net"].num_passes = 2
    phases["net"].stall_ms_by_unit[6] = 9.0
    assert (str(report), report.as_dict()) == before


def test_a_report_as_plain_values() -> None:
    values = REPORT.as_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["stats"] == STATS.as_dict()
    assert [phase["name"] for phase in values["phases"]] == ["text", "net"]
    net = values["phases"][1]
    assert {name: net[name] for name in ("num_passes", "num_loads", "loaded_bytes", "num_stalls", "stall_ms")} == {
        "num_passes": 4,
        "num_loads": 38,
        "loaded_bytes": 18 * GIB,
        "num_stalls": 10,
        "stall_ms": 30.5,
    }
    assert net["stall_ms_by_unit"] == {"net (base)": 0.5, "net.layers.0": 20.0, "net.layers.2": 10.0}
    assert net["stall_ms_by_stack"] == {"net (base)": 0.5, "net.layers": 30.0}
    assert (round(net["predicted_ms_per_pass"], 1), net["predicted_bound"]) == (44.0, "waits")
    assert values["phases"][0]["predicted_ms_per_pass"] is None
    assert {name: round(ms, 1) for name, ms in values["next_gib_ms"].items()} == {"net": 2.1}


def test_a_report_as_html_has_what_the_text_has() -> None:
    html = REPORT._repr_html_()
    assert html_cells(html) == [list(REPORT.phases[i].cells()) for i in range(2)]
    told = html_text(html)
    for line in str(REPORT).splitlines():
        for part in line.replace("`", "").split("  "):
            assert part.strip() in told


def test_a_report_escapes_names() -> None:
    report = Report.of(plan_of(3 * GIB), STATS, {"<b>": PhaseStats(num_passes=1)})
    assert "<b>" not in report._repr_html_()
    assert html_cells(report._repr_html_())[0][0] == "<b>"


def test_no_limit_is_said_as_such() -> None:
    """A simulated device without a size would have had a budget of 993.3 TiB."""
    unlimited = Stats(budget_bytes=round(0.97 * SimulatedDevice().total_bytes()))
    assert str(Report.of(plan_of(3 * GIB), unlimited, {})).startswith("no memory limit; peak reserved 0 B")


@pytest.mark.parametrize("gib", [2.5, 3.0, 3.5, 6])
def test_a_report_and_its_plan_say_the_same_of_the_next_gib(gib: float) -> None:
    plan = plan_of(int(gib * GIB)).with_next_gib()
    told = [line for line in str(plan).splitlines() if line.startswith("1 GiB more")]
    assert told == [line for line in str(Report.of(plan, STATS, PHASES)).splitlines() if line.startswith("1 GiB more")]
    assert len(told) == (gib < 3.5)


def test_nothing_is_reported_that_was_not_predicted() -> None:
    """Assumed speeds are good enough to plan with, and not to print."""
    partly = Costs(50.0, dict(list(COSTS.compute_ms.items())[1:]))
    for costs in (None, partly):
        report = Report.of(plan_of(3 * GIB, costs).with_next_gib(), STATS, PHASES)
        assert [phase.cells()[-1] for phase in report.phases] == ["", ""]
        assert report.next_gib_ms == {}


# ---- streamers in notebooks


def test_a_streamer_as_html_has_its_state_its_plan_and_its_report() -> None:
    plan = plan_of(3 * GIB)
    html = streamer_html("LayerStreamer(active, `net` <1>)", plan, REPORT)
    assert "active, net <1>" in html_text(html)
    assert html_cells(html) == html_cells(plan._repr_html_()) + html_cells(REPORT._repr_html_())
    empty = streamer_html("", plan, Report.of(plan, STATS, {}))
    assert html_cells(empty) == html_cells(plan._repr_html_())
    assert "report" not in html_text(empty)


# ---- lines for the log


def test_the_line_of_entering_before_anything_was_measured() -> None:
    stats = Stats(pinned_bytes=4800 * MIB, enter_s=0.84)
    new = plan_of(3 * GIB, None, reserves=(None, None, None))
    assert entered_line(new, stats) == (
        "budget 3.0 GiB: 4 of 4 blocks of `text` (1.0 GiB), 6 of 6 blocks of `net` (3.2 GiB) stream; 576.0 MiB of "
        "weights stay while in use; 4.7 GiB page-locked, ready after 0.8 s; more stays once activations have been "
        "measured"
    )
    least = plan_of(None, None, reserves=(None, None, None))
    assert entered_line(least, stats).endswith("; 4.7 GiB page-locked, ready after 0.8 s"), "no more will stay"


def test_the_line_of_entering_with_what_was_measured_before() -> None:
    stats = Stats(pinned_bytes=GIB, enter_s=1.26)
    line = entered_line(plan_of(3 * GIB, reserves=(0, 512 * MIB, 0)), stats)
    assert "4 of 6 blocks of `net` (2.0 GiB) stream; " in line
    assert line.endswith("; 1.0 GiB page-locked, ready after 1.3 s; predicted: 0.044 s a pass of `net` (waits-bound)")
    assert "nothing streams; 4.8 GiB of weights" in entered_line(plan_of(9 * GIB, reserves=(0, 0, 0)), stats)


def test_the_line_of_predictions() -> None:
    assert predicted_line(plan_of(3 * GIB, None)) is None
    plan = plan_of(3 * GIB)
    assert predicted_line(plan) == "predicted: 0.044 s a pass of `net` (waits-bound)"
    assert predicted_line(plan.with_next_gib()) == (
        "predicted: 0.044 s a pass of `net` (waits-bound); 1 GiB more would take 2.1 ms off a pass of `net`"
    )
    fast = Costs(5e4, {u: ms / 1000 for u, ms in COSTS.compute_ms.items()})
    assert predicted_line(plan_of(3 * GIB, fast)) == "predicted: under a millisecond a pass of `net` (waits-bound)"


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
            text = str(streamer.report())
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
    assert str(streamer.report()) == text


def test_a_streamer_in_a_notebook() -> None:
    """Before, while and after it streams; what it displays plans nothing."""
    device = SimulatedDevice(link_gb_per_s=5e-4)
    pipe = {"<b>": Sized(device, [1024] * 8)}
    streamer = layerstream.offload(pipe, vram_budget=6_000, device=device)
    assert html_text(streamer._repr_html_()) == repr(streamer) == "LayerStreamer(not started, vram_budget=6000)"
    with streamer, torch.no_grad():
        assert html_cells(streamer._repr_html_()) == html_cells(streamer._last.plan._repr_html_())
        for _ in range(8):
            pipe["<b>"](torch.zeros(1, 8))
        html = streamer._repr_html_()
        assert "1 GiB more" not in html_text(html), "nobody has asked yet"
        plan, report = streamer.plan, streamer.report()
        html = streamer._repr_html_()
        assert "1 GiB more would take" in html_text(html)
    assert html_cells(html) == html_cells(plan._repr_html_()) + html_cells(report._repr_html_())
    assert html_text(html).startswith("LayerStreamer(active, budget 5.9 KiB: ")
    assert "<b>" not in html
    assert html_text(streamer._repr_html_()).startswith("LayerStreamer(closed, budget 5.9 KiB: ")


def test_components_that_share_a_phase_keep_what_they_did_alone_in_the_report() -> None:
    """Until they were seen to take turns each was a phase of its own, and its loads are in the totals."""
    device = SimulatedDevice()
    pipe = {"net": Sized(device, [1024] * 6), "control": Sized(device, [1024] * 6)}
    x = torch.tensor([[0.0] * 8])
    with layerstream.offload(pipe, vram_budget="min", device=device) as streamer, torch.no_grad():
        for _ in range(5):
            pipe["control"](x)
            pipe["net"](x)
        text, phases = str(streamer.report()), streamer._last.phase_stats
    assert {"net", "control", "net + control"} == set(phases)
    assert [phase.num_passes for phase in phases.values()] == [2, 1, 7]
    cells = [line.split("  ") for line in text.splitlines()]
    rows = {row[0]: next(cell.strip() for cell in row[1:] if cell) for row in cells if len(row) > 4}
    assert rows == {"phase": "passes"} | {name: str(phase.num_passes) for name, phase in phases.items()}
