"""The benchmark program runs on the simulated device, and writes what it says it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import denoiser


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
