"""The benchmark programs run on the simulated device, and write what they say they write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import denoiser, pipeline


def test_a_tiny_run_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    arguments = ["--case", "sd35m", "--scale", "tiny", "--device", "cpu", "--passes", "2", "--slots", "2", "3"]
    assert denoiser.main([*arguments, "--vram-budget", "300KiB", "1GiB", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("denoiser_simulated_*.json")
    records = json.loads(path.read_text())
    assert [r["method"] for r in records] == ["resident", *["layerstream"] * 4, "resident"]
    assert all(r["equal"] and r["error"] is None and r["case"] == "sd35m (tiny)" for r in records)
    everything = records[4]
    assert everything["plan"] == "budget=1GiB"
    assert everything["loaded_bytes_per_pass"] == 0
    assert records[1]["loaded_bytes_per_pass"] > 0
    for name in ("gpu", "versions", "command", "commit", "date", "link_gb_per_s", "weights_bytes", "enter_s", "exit_s"):
        assert records[1][name] is not None
    assert "--output" not in records[1]["command"]
    table = path.with_suffix(".md").read_text()
    assert table.count("\n| sd35m (tiny) |") == len(records)
    assert "sd35m (tiny) layerstream slots=2" in capsys.readouterr().out


def test_a_failing_cell_is_a_record_and_exit_code_1(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    arguments = ["--case", "sd35m", "--scale", "tiny", "--device", "cpu", "--passes", "1", "--slots", "2"]
    assert denoiser.main([*arguments, "--vram-budget", "1KiB", "--output", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.json")
    errors = [r["error"] for r in json.loads(path.read_text())]
    assert [e is None for e in errors] == [True, True, False, True]
    assert "too small" in errors[2]


def test_a_tiny_pipeline_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    arguments = ["--case", "ovis", "--scale", "tiny", "--device", "cpu", "--steps", "2", "--calls", "2"]
    assert pipeline.main([*arguments, "--vram-budgets", "min,1GiB,auto", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("pipeline_ovis_simulated_*.json")
    records = json.loads(path.read_text())
    assert [r["method"] for r in records] == ["resident", *["layerstream"] * 3, "resident"]
    assert [r["vram_budget"] for r in records] == [None, "min", "1GiB", "auto", None]
    assert [r["vram_budget_bytes"] for r in records[:3]] == [None, None, 2**30]
    for each in records:
        assert each["error"] is None
        assert each["case"] == "ovis (tiny)"
        assert each["form"] == "pipeline"
        assert each["equal"] is True
        assert each["is_finite"] is True
        assert each["clamped_fraction"] < 0.5
        assert len(each["seconds_all_calls"]) == 2
        assert [each["seconds_first_call"], each["seconds"]] == each["seconds_all_calls"]
        assert each["ratio_to_resident"] > 0
        assert each["num_steps"] == 2
    for name in ("gpu", "versions", "command", "commit", "date", "link_gb_per_s", "weights_bytes", "enter_s", "exit_s"):
        assert records[1][name] is not None
    assert records[1]["loaded_bytes_per_call"] > 0
    assert records[1]["stats_num_loads"] > 0
    assert records[1]["streamer"].startswith("LayerStreamer(active")
    table = path.with_suffix(".md").read_text()
    assert table.count("\n| ovis (tiny) |") == len(records)
    assert records[1]["streamer"] in table
    assert "ovis (tiny) layerstream auto" in capsys.readouterr().out


def test_a_pipeline_that_fails_half_way_is_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    run, num_calls = pipeline.Bench.run, 0

    def failing(self: pipeline.Bench, **changes: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 5:  # after the warm-up, two calls resident and one streamed
            raise RuntimeError("no more memory")
        return run(self, **changes)

    monkeypatch.setattr(pipeline.Bench, "run", failing)
    arguments = ["--case", "sd35m", "--scale", "tiny", "--device", "cpu", "--steps", "2"]
    assert pipeline.main([*arguments, "--vram-budgets", "min,1000,1GiB", "--output", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.json")
    records = json.loads(path.read_text())
    assert [r["error"] is None for r in records] == [True, False, False, True, True]
    assert "no more memory" in records[1]["error"]
    assert records[1]["equal"] is True
    assert len(records[1]["seconds_all_calls"]) == 1
    assert records[1]["stats_num_loads"] > 0
    assert records[2]["vram_budget_bytes"] == 1000
    assert "too small" in records[2]["error"]
    assert records[2]["equal"] is None
    assert records[4]["equal"] is True
    assert "no more memory" in capsys.readouterr().err


def test_without_a_resident_output_nothing_is_called_equal() -> None:
    result: dict[str, Any] = {"equal": None}
    pipeline.compare(torch.zeros(3), None, result)
    assert result["equal"] is None
    verdicts = []
    for other in (0.0, 1.0, 0.0):
        pipeline.compare(torch.zeros(3), torch.full((3,), other), result)
        verdicts.append(result["equal"])
    assert verdicts == [True, False, False]
