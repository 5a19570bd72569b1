"""Timelines: every block, load, wait, pass and phase of the calls inside, and nothing of it outside."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import layerstream
from layerstream.errors import LayerstreamWarning, StreamerStateError
from layerstream.hooks import compiled
from layerstream.standins import build_tiny, run_tiny
from layerstream.transfer import timeline
from tests.fakes import adversary, assert_equal, assert_restored, describe, run, toy, twin


def spans(path: Path) -> dict[str, list[dict[str, Any]]]:
    """By row, in order of time."""
    events = json.loads(path.read_text())["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rows.values()}
    for event in sorted((event for event in events if event["ph"] == "X"), key=lambda event: event["ts"]):
        assert event["dur"] >= 0
        found[rows[event["tid"]]].append(event)
    return found


@pytest.fixture(autouse=True)
def nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own: where something was, blocks that stay keep their hooks."""
    monkeypatch.setattr(compiled, "is_in_use", lambda: False)


@pytest.mark.parametrize("budget", ["min", 45_000, "auto"])
def test_every_block_and_load_is_in_it(budget: Any, tmp_path: Path) -> None:
    model = toy()
    resident, device = twin(model), adversary()
    before = describe(model)
    path = tmp_path / "calls.json"
    with layerstream.offload(model, vram_budget=budget, device=device) as streaming, device.checking(), torch.no_grad():
        assert_equal(run(model, 8), run(resident, 8))
        loads, loaded = streaming.stats().num_loads, streaming.stats().loaded_bytes
        with streaming.trace(path):
            assert_equal(run(model, 3), run(resident, 3))
        loads, loaded = streaming.stats().num_loads - loads, streaming.stats().loaded_bytes - loaded
        found = spans(path)
        assert Counter(span["name"] for span in found["blocks"]) == {f"Toy.blocks.{number}": 3 for number in range(6)}
        assert [span["name"] for span in found["passes"]] == ["Toy"] * 3
        assert len(found["loads"]) == loads
        assert sum(span["args"]["bytes"] for span in found["loads"]) == loaded
        assert len(found["waits"]) <= 3 * 7
        assert {span["name"].split()[0] for span in found["host"]} <= {"load", "phase"}
        for span in found["loads"]:
            assert span["args"].get("GB/s", 1) > 0
        assert_equal(run(model, 8), run(resident, 8))
        has_hooks = any(block._forward_hooks for block in model.blocks)
        assert has_hooks == (budget != "auto"), "blocks that stay are left alone again"
    assert_restored(model, before)


def test_phases_of_a_pipeline_follow_each_other(tmp_path: Path) -> None:
    pipe = build_tiny("sd3")
    expected = run_tiny(pipe, "sd3")
    path = tmp_path / "call.json"
    with layerstream.offload(pipe, vram_budget="min", device=adversary()) as streaming:
        run_tiny(pipe, "sd3")
        with streaming.trace(str(path)):
            assert torch.equal(run_tiny(pipe, "sd3"), expected)
    found = spans(path)
    phases = [span["name"] for span in found["phases"]]
    assert "transformer" in phases
    assert len(phases) > 2
    for one, other in zip(found["phases"], found["phases"][1:], strict=False):
        assert one["ts"] + one["dur"] <= other["ts"] + 1e-3
    assert "vae.decode" in {span["name"] for span in found["passes"]}


def test_an_error_inside_leaves_a_trace_of_what_was_before(tmp_path: Path) -> None:
    model = toy()
    path = tmp_path / "call.json"
    with layerstream.offload(model, vram_budget="min", device=adversary()) as streaming:
        with pytest.raises(ZeroDivisionError), streaming.trace(path):
            run(model, 1)
            raise ZeroDivisionError
        assert len(spans(path)["blocks"]) == 6
        with streaming.trace(path):  # the file is begun anew
            pass
        assert not spans(path)["blocks"]


def test_streaming_may_end_inside(tmp_path: Path) -> None:
    model = toy()
    path = tmp_path / "call.json"
    streaming = layerstream.offload(model, vram_budget="min", device=adversary()).start()
    with streaming.trace(path):
        run(model, 1)
        streaming.close()
        run(model, 1)
    assert len(spans(path)["blocks"]) == 6


def test_what_cannot_be_traced(tmp_path: Path) -> None:
    model = toy()
    streaming = layerstream.offload(model, vram_budget="min", device=adversary())
    with pytest.raises(StreamerStateError, match="nothing streams now"), streaming.trace(tmp_path / "a.json"):
        pass
    assert not (tmp_path / "a.json").exists()
    with streaming:
        with pytest.raises(FileNotFoundError), streaming.trace(tmp_path / "no folder" / "a.json"):
            pass
        with (
            streaming.trace(tmp_path / "a.json"),
            pytest.raises(StreamerStateError, match="traced already"),
            streaming.trace(tmp_path / "b.json"),
        ):
            pass
        run(model, 1)


def test_a_long_trace_ends_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MOST_SPANS", 10)
    model = toy()
    path = tmp_path / "call.json"
    with layerstream.offload(model, vram_budget="min", device=adversary()) as streaming:
        with pytest.warns(LayerstreamWarning, match="at most 10 spans"), streaming.trace(path):
            run(model, 2)
        assert sum(map(len, spans(path).values())) == 10
