"""What people are told while they wait, and what profiles and logs say; nothing of it where nobody listens."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch

import layerstream
from layerstream import progress
from layerstream.standins import build_tiny, run_tiny
from tests.fakes import adversary, assert_equal, run, toy, twin


def test_entering_and_predictions_are_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    model = toy()
    with (
        caplog.at_level(logging.INFO, "layerstream"),
        layerstream.offload(model, vram_budget=45_000, device=adversary()),
    ):
        for _ in range(8):
            run(model)
    lines = [(record.name, record.getMessage()) for record in caplog.records]
    assert lines[0][0] == "layerstream"
    assert lines[0][1].startswith("budget 43.9 KiB: 6 of 6 blocks of `Toy`")
    assert [line for name, line in lines if name == "layerstream.streamer" and line.startswith("predicted: ")] == [
        line for _, line in lines[1:]
    ]
    assert len(lines) == 2, "once"


def test_nothing_is_said_by_itself(capfd: pytest.CaptureFixture[str]) -> None:
    model = toy()
    with layerstream.offload(model, vram_budget="min", device=adversary()):
        run(model)
    assert capfd.readouterr() == ("", "")


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("tqdm.std.time", lambda: self.now)


def test_a_bar_is_shown_while_entering_takes_long(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(progress, "_LEAST_BYTES", 0)
    add = progress.Progress.add

    def slow(self: progress.Progress, num_bytes: int) -> None:
        clock.now += 0.4
        add(self, num_bytes)

    monkeypatch.setattr(progress.Progress, "add", slow)
    model = toy()
    expected = run(twin(model))
    with layerstream.offload(model, vram_budget="min", device=adversary()):
        assert_equal(run(model), expected)
    told = capfd.readouterr()
    assert told.out == ""
    assert "layerstream takes hold of the weights" in told.err
    assert "100%" in told.err or "%|" in told.err
    last = told.err.rstrip().splitlines()[-1]
    assert "layerstream: budget the least: 6 of 6 blocks of `Toy`" in last
    assert "ready after" in last


def test_no_bar_where_entering_is_quick_or_tqdm_is_missing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LEAST_BYTES", 0)
    for is_missing in (False, True):
        with monkeypatch.context() as patch:
            if is_missing:
                patch.setitem(sys.modules, "tqdm.auto", None)
            with layerstream.offload(toy(), vram_budget="min", device=adversary()):
                pass
    assert capfd.readouterr() == ("", "")


def test_ranges_in_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy()
    made: list[str] = []
    original = torch.profiler.record_function

    def record_function(name: str) -> Any:
        made.append(name)
        return original(name)

    monkeypatch.setattr(torch.profiler, "record_function", record_function)
    with layerstream.offload(model, vram_budget="min", device=adversary()):
        with torch.profiler.profile() as profile:
            run(model)
        names = {event.key for event in profile.key_averages() if event.key.startswith("layerstream ")}
        assert any(name.startswith("layerstream load Toy.blocks.") for name in names)
        assert any(name.startswith("layerstream wait Toy.blocks.") for name in names)
        assert any(name.startswith("layerstream phase Toy") for name in names)
        made.clear()
        run(model)
        assert made == [], "nobody listens any more"


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_budget_that_an_error_names_does(name: str) -> None:
    """Followed once; and the least that the report names then does as well, though a byte less than it may not."""
    expected = run_tiny(build_tiny(name), name)

    def peak_under(budget: int) -> int | None:
        device = adversary(memory_bytes=10**9)
        pipe = build_tiny(name)
        with layerstream.offload(pipe, vram_budget=budget, device=device) as streamer, device.checking():
            for _ in range(2):
                assert torch.equal(run_tiny(pipe, name), expected)
            assert streamer.stats().peak_reserved_bytes <= budget
            return streamer.report().least_bytes

    def following(budget: int) -> tuple[int, int]:
        """What the error knows to be needed, and the least that the report names once the call has run."""
        with pytest.raises(layerstream.BudgetError) as error:
            peak_under(budget)
        assert error.value.needed_bytes is not None
        assert error.value.least_bytes is not None
        least = peak_under(error.value.needed_bytes)
        assert least is not None
        assert budget < error.value.least_bytes <= least < error.value.needed_bytes
        return error.value.least_bytes, least

    of_weights, least = following(1000)
    assert following(of_weights + 2**12)[1] == least  # and little beside the weights
    assert peak_under(least) is not None
    with pytest.raises(layerstream.BudgetError):
        peak_under(least - 2**12)


def test_the_simulated_device_is_imported_where_it_is_used() -> None:
    code = (
        "import sys, torch, layerstream\n"
        "assert 'layerstream.device.simulated' not in sys.modules\n"
        "layerstream.plan(torch.nn.Linear(2, 2), vram_budget='min', device='cpu')\n"
        "assert 'layerstream.device.simulated' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_simulated_device_does_not_remember_every_operation() -> None:
    model, device = toy(), adversary()
    with layerstream.offload(model, vram_budget="min", device=device):
        run(model, 20)
    assert len(device.operations) < device.num_operations
