"""The harness measures tiny cases on the simulated device, and writes what it says it writes."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from benchmarks import __main__ as command
from benchmarks import cases, cell, pages, plots, suite, targets, weights
from benchmarks.cell import Cell
from benchmarks.methods import METHODS, OURS, Method, MissingPeerError
from benchmarks.records import command_line, typical
from layerstream.standins import build_pipeline

ROOT = Path(__file__).parent.parent
TINY = ["--scale", "tiny", "--device", "cpu"]
# What BENCHMARKS results must have, whatever was measured.
FIELDS = {
    "case", "form", "method", "guidance", "vram_budget_bytes", "ratio_to_resident", "peak_reserved_bytes",
    "peak_allocated_bytes", "host_peak_rss_bytes", "weights_bytes", "enter_s", "exit_s", "equal", "error", "gpu",
    "predicted_ms_per_pass", "link_gb_per_s", "versions", "command", "commit", "date", "machine", "locked_bytes",
}  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as users type it: workers are forked from a server, which a test's own process should not be."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def records_in(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("*.json")
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


# ---- whole runs


def test_a_suite_is_measured_in_turns(tmp_path: Path) -> None:
    arguments = ("--methods", "layerstream", "--budgets", "min", "--passes", "2", "--rounds", "2")
    done = run("suite", "sd35m-denoiser", *arguments, *TINY, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [(r["round"], r["method"]) for r in records_in(tmp_path)] == [
        (0, "resident"), (0, "layerstream"), (0, "resident"), (1, "layerstream"), (1, "resident"),
    ]  # fmt: skip
    page = next(tmp_path.glob("*.md")).read_text()
    assert "## Medians" in page
    assert "| sd35m (tiny) | denoiser | layerstream | min | 2 |" in page


def test_a_suite_is_measured_and_written(tmp_path: Path) -> None:
    done = run("suite", "sd35m-quick", *TINY, "--steps", "2", "--passes", "4", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    records = records_in(tmp_path)
    assert [(r["form"], r["method"]) for r in records] == [
        (form, method) for form in ("denoiser", "pipeline") for method in ("resident", "layerstream", "resident")
    ]
    for each in records:
        assert each.keys() >= FIELDS
        assert each["error"] is None
        assert each["equal"] is True
        assert each["is_finite"] is True
        assert each["case"] == "sd35m (tiny)"
        assert each["ratio_to_resident"] > 0
        assert each["command"].startswith("python -m benchmarks suite sd35m-quick --scale tiny")
        assert "--output" not in each["command"]
        assert (each["ms_per_pass"] is None) is (each["form"] == "pipeline")
        assert (each["seconds"] is None) is (each["form"] == "denoiser")
    ours = records[4]
    assert ours["vram_budget_bytes"] == 6 * 2**30
    assert len(ours["seconds_all_calls"]) == 1 + cell._MOST_CALLS, "the first, and as many as short ones are timed"
    assert ours["seconds"] == round(statistics.median(ours["seconds_all_calls"][1:]), 3)
    assert ours["stats_num_loads"] > 0
    assert ours["loaded_bytes_per_call"] >= 0
    assert ours["plan"].startswith("LayerStreamer(active")
    page = next(tmp_path.glob("*.md")).read_text()
    assert page.count("\n| sd35m (tiny) |") == len(records)
    assert ours["report"] in page
    assert "sd35m (tiny) pipeline layerstream 6GiB:" in done.stdout


def test_one_measurement_from_a_mapped_file(tmp_path: Path) -> None:
    done = run("run", "--case", "ovis", "--mapped", "--vram-budget", "min", *TINY, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    resident, ours, last = records_in(tmp_path)
    assert (resident["method"], ours["method"], last["method"]) == ("resident", "layerstream", "resident")
    assert (resident["is_mapped"], ours["is_mapped"], last["is_mapped"]) == (False, True, False)
    assert ours["equal"] is True
    assert ours["guidance"] == "single"
    assert ours["loaded_bytes_per_pass"] > 0
    assert ours["vram_budget_bytes"] is None


@pytest.mark.parametrize(
    "name",
    ["nextstep-tokens", "mammoth-call", "glm-call", "qwen-denoiser", "wan22-denoiser", "longcat-rewrite"],
)
def test_cases_without_peers_are_measured_with_their_limits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fork_from_here(monkeypatch)
    common: dict[str, Any] = {"scale": "tiny", "device": "cpu", "tells_first_call": False}
    wanted = list(suite.expand(name, **common))[:2]
    wanted[1] = dataclasses.replace(wanted[1], vram_budget="min")
    resident, ours = suite.run(wanted, topic=name, command="-", output=tmp_path, cell_seconds=400)
    for each in (resident, ours):
        assert each["error"] is None
        assert each["equal"] is True
        assert each["is_finite"] is True
    told = [each for each in ("token", "pass") if f"{each}_s" in ours]
    assert told == {"nextstep-tokens": ["token"], "qwen-denoiser": ["pass"], "wan22-denoiser": ["pass"]}.get(
        name, ["token", "pass"]
    )
    for kind in told:
        used, held = resident[f"{kind}_used_bytes"], ours[f"{kind}_held_bytes"]
        assert 0 < used <= resident["weights_bytes"]
        assert held > 0
        if name == "qwen-denoiser":
            whole = suite.run(
                [wanted[0], dataclasses.replace(wanted[1], vram_budget="auto")],
                topic="all",
                command="-",
                output=tmp_path / "all",
                cell_seconds=400,
            )[1]
            assert whole["pass_held_bytes"] >= used, "what stays counts"
        assert resident[f"{kind}_loop_s"] + resident[f"{kind}_outside_s"] == pytest.approx(
            resident[f"{kind}_s"], abs=1e-5
        )
        assert ours[f"{kind}_limit_s"] > 0
        assert ours[f"{kind}_of_limit"] == pytest.approx(ours[f"{kind}_s"] / ours[f"{kind}_limit_s"], rel=1e-2)
    page = next(tmp_path.glob("*.md")).read_text()
    assert ("| s/token |" in page) is ("token" in told)
    assert ("the switch |" in page) is (name == "wan22-denoiser")
    if "token" in told:
        missing = resident["token_used_bytes"] - ours["token_held_bytes"]  # small slots hold all of tiny ones
        assert ours["token_loaded_bytes"] >= max(1, missing)
        assert ours["call_limit_s"] >= resident["seconds"] * 0.99
    if name == "wan22-denoiser":
        assert ours["num_passes"] == len(cases.build("wan22", "denoiser", "tiny").turns(torch.device("cpu"))) == 8
        assert len(ours["ms_of_steps"]) == 4


def test_the_limit_of_a_token_is_what_the_bus_or_the_model_takes() -> None:
    base = {"case": "glm", "form": "pipeline", "weights_bytes": 60 * 10**9, "link_gb_per_s": 50.0}
    resident = {
        **base, "method": "resident", "seconds": 12.0, "token_s": 0.1, "token_loop_s": 0.06, "token_outside_s": 0.04,
        "token_used_bytes": 20 * 10**9, "num_tokens": 63,
    }  # fmt: skip
    ours = {**base, "method": "layerstream", "seconds": 30.0, "token_s": 0.33, "num_tokens": 63}
    streamed, fits = ({**ours, "token_held_bytes": held * 10**9} for held in (6, 18))
    suite.rate([resident, streamed, fits])
    assert streamed["token_limit_s"] == pytest.approx(0.04 + 14 / 50)
    assert streamed["token_of_limit"] == pytest.approx(0.33 / 0.32, abs=1e-4)
    assert streamed["token_ratio"] == 3.3
    assert streamed["call_limit_s"] == pytest.approx(12 + 63 * 0.22)
    suite.rate([resident, alone := {**streamed, "vram_budget_bytes": 12 * 2**30}])
    assert alone["call_limit_s"] == pytest.approx(12 + 63 * 0.22 + 20 / 50), "the prompt's pass finds nothing"
    assert fits["token_limit_s"] == pytest.approx(0.1), "2 GB cross while the language model runs"
    assert fits["weights_cross_s"] == 1.2
    assert "token_limit_s" not in resident


def test_only_steps_of_an_expert_beside_another_are_at_the_switch() -> None:
    turns = [(name, {}) for name in ("first", "second") for _ in range(4)]
    told = cell._at_the_switch([5.0, 5, 5, 5, 7, 5, 5, 5], turns, 2)
    assert told == {"ms_of_steps": [10, 10, 12, 10], "ms_at_switch": 12, "switch_ratio": 1.2}
    assert [name for _, (name, _) in cell._warm_up_turns(list(enumerate(turns)), 2)] == ["first", "second"]


# ---- what cannot be measured


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["run", "--case", "dalle"], "invalid choice: 'dalle'"),
        (["run", "--case", "ovis", "--method", "magic"], "invalid choice: 'magic'"),
        (["run", "--case", "ovis", "--vram-budget", "8 elephants"], "'8 elephants' is not a size"),
        (["run", "--case", "ovis", "--passes", "0"], "0 is not positive"),
        (["run", "--case", "ovis", "--method", "model_offload", *TINY], "runs only as pipeline"),
        (["run", "--case", "ovis", "--method", "flextensor", *TINY], "needs --vram-budget"),
        (["run", "--case", "ovis", "--method", "vllm_omni", "--vram-budget", "1GiB", *TINY], "takes no --vram-budget"),
        (["run", "--case", "ovis", "--vram-budget", "50%", *TINY], "50% is another size on another GPU"),
        (["run", "--case", "nextstep", "--form", "denoiser", *TINY], "nextstep is measured only as pipeline"),
        (["suite", "everything"], "invalid choice: 'everything'"),
        (["suite", "ovis-quick", "--methods", "magic"], "no method magic"),
        (["suite", "ovis-quick", "--methods", "mmgp", *TINY], "measures none of mmgp"),
        (["suite", "ovis-quick", "--without", "layerstream", *TINY], "measures none of resident, paired"),
        (["suite", "ovis-quick", "--without", "mmgp", "--methods", "mmgp"], "not allowed with argument --without"),
        (["suite", "ovis-quick", "--budgets", "99GiB", *TINY], "no suite has 99GiB"),
        (["suite", "ovis-quick", "--budgets", "auto", *TINY], "measures none of auto"),
        (["plots", "--results", "no/such/folder"], "no results"),
    ],
)
def test_wrong_arguments_are_said_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(arguments)
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert said in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["run", "--case", "ovis"])
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_a_missing_peer_is_said_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "--case", "ovis", "--method", "mmgp", "--vram-budget", "1GiB", *TINY, "--output", str(tmp_path)]
    try:
        METHODS["mmgp"].check()
        pytest.skip("mmgp is installed")
    except MissingPeerError:
        pass
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "pip install mmgp" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_budget_below_the_least_is_said_and_nothing_is_written(tmp_path: Path) -> None:
    done = run("run", "--case", "ovis", "--vram-budget", "1KiB", *TINY, "--output", str(tmp_path))
    assert done.returncode == 2
    assert "vram_budget 1.0 KiB is too small" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def fail(setup: Any) -> None:
    raise RuntimeError("this peer cannot")


def die(setup: Any) -> None:
    os._exit(3)


def hang(setup: Any) -> None:
    time.sleep(600)


def fork_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the sake of what exists only here; the threads of OpenMP do not survive that."""
    work = suite._work

    def work_alone(*arguments: Any) -> None:
        torch.set_num_threads(1)
        work(*arguments)

    monkeypatch.setattr(suite, "_work", work_alone)
    monkeypatch.setattr(suite, "_server", lambda _: multiprocessing.get_context("fork"))


@pytest.mark.parametrize(
    ("apply", "error"),
    [(fail, "this peer cannot"), (die, "the process died"), (hang, "ended after 12 s, in hang (test_benchmarks.py:")],
)
def test_a_cell_that_fails_is_a_record_and_the_others_go_on(
    apply: Any, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fork_from_here(monkeypatch)
    monkeypatch.setitem(METHODS, "odd", Method("odd", apply))
    wanted = [Cell("ovis", "denoiser", m, "", scale="tiny", device="cpu", passes=2) for m in ("resident", "odd")]
    done = suite.run(
        [*wanted, wanted[0]], topic="odd", command="-", output=tmp_path, cell_seconds=12 if apply is hang else 400
    )
    assert [r["error"] is None for r in done] == [True, False, True]
    assert error in done[1]["error"]
    assert done[1]["gpu"] == "simulated"
    assert done == records_in(tmp_path)
    assert suite.are_all_good(done), "a peer that cannot run is no failure of the harness"


def test_a_case_whose_weights_cannot_be_made_does_not_lose_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = cell.prepare

    def prepare_some(wanted: Cell) -> None:
        if wanted.case == "ovis":
            raise OSError("the disk is full")
        prepare(wanted)

    fork_from_here(monkeypatch)
    monkeypatch.setattr(cell, "prepare", prepare_some)
    cases_in_turn = ("sd35m", "ovis", "sd35m", "ovis")  # measured case by case
    wanted = [Cell(case, "denoiser", "resident", "", scale="tiny", device="cpu", passes=2) for case in cases_in_turn]
    done = suite.run(wanted, topic="some", command="-", output=tmp_path, cell_seconds=400)
    assert [(r["case"], r["error"]) for r in done[:2]] == [("sd35m (tiny)", None)] * 2
    assert [r["case"] for r in done[2:]] == ["ovis (tiny)"] * 2
    assert all("no weights could be made: OSError('the disk is full')" in r["error"] for r in done[2:])
    assert done == records_in(tmp_path)


def test_what_has_no_time_left_is_not_begun(tmp_path: Path) -> None:
    methods = ("resident", "layerstream", "resident")
    wanted = [Cell("ovis", "denoiser", method, "", scale="tiny", device="cpu", passes=2) for method in methods]
    done = suite.run(wanted, topic="late", command="-", output=tmp_path, cell_seconds=400, seconds=0)
    assert ["not begun" in (r["error"] or "") for r in done] == [True, True, False]
    assert done[-1]["ms_per_pass"], "without it there are no ratios"
    assert not suite.are_all_good(done)


def test_a_difference_is_a_failure() -> None:
    good = {"method": "resident", "equal": True, "error": None}
    assert suite.are_all_good([good])
    for method in ("layerstream", "mmgp"):
        assert not suite.are_all_good([good, {**good, "method": method, "equal": False}])


# ---- parts


def test_outputs_are_compared_with_the_first_resident_ones(tmp_path: Path) -> None:
    path = tmp_path / "expected.pt"
    verdicts = []
    for method, value in (("layerstream", 1.0), ("resident", 0.0), ("resident", 1.0), ("layerstream", 0.0)):
        record: dict[str, Any] = {"equal": None}
        cell._compare({"pass": [torch.full((3,), value)]}, path, method, record)
        verdicts.append(record["equal"])
    assert verdicts == [None, True, False, True], "before there is something to compare with, nothing is equal"
    cell._compare({"another": [torch.zeros(3)]}, path, "layerstream", record)
    assert record["equal"] is False, "nothing was compared"


@pytest.mark.parametrize(
    ("slow", "steps", "expected", "wanted"),
    [
        (0.1, 50, None, [1, 1, 3]),
        (0.1, 40, None, [1, 1]),
        (2.5, 50, 127.0, [1, 1, 3]),
        (10.0, 50, 502.0, [1, 3]),
        (10.0, 3, None, [1]),
    ],
)
def test_a_call_that_would_take_too_long_is_extrapolated(
    slow: float, steps: int, expected: float | None, wanted: list[int]
) -> None:
    calls = []

    def timed(count: int) -> float:
        calls.append(count)
        return 2.0 + slow * count

    assert cell._extrapolated(timed, steps, 100, 2) == expected
    assert calls == wanted


@pytest.mark.parametrize("steps", [40, 50])
def test_nothing_is_extrapolated_from_passes_that_profile(steps: int) -> None:
    passes = 0

    def timed(count: int) -> float:
        nonlocal passes
        seconds = sum(20.0 if n < 14 else 2.5 for n in range(passes, passes + count))
        passes += count
        return seconds

    assert cell._extrapolated(timed, steps, 100, 14) == (None if steps == 40 else 125.0)


def test_ratios_are_to_the_median_of_the_resident_ones() -> None:
    base = {"case": "ovis", "form": "denoiser", "ms_per_pass": None}
    done = [
        {**base, "method": "resident", "ms_per_pass": 90.0},
        {**base, "method": "layerstream", "ms_per_pass": 150.0},
        {**base, "method": "mmgp"},
        {**base, "method": "resident", "ms_per_pass": 110.0},
        {**base, "case": "sd35m", "method": "resident", "ms_per_pass": 7.0},
    ]
    suite.rate(done)
    assert [r.get("ratio_to_resident") for r in done] == [0.9, 1.5, None, 1.1, 1.0]


def test_rounds_take_turns_and_their_medians_are_told(tmp_path: Path) -> None:
    cells = list(suite.expand("ovis-denoiser", ["layerstream"], ["min", "auto"], scale="tiny"))
    told = [(c.round, c.method, c.vram_budget) for c in suite.in_turns(cells, 2)]
    one = [("resident", None), ("layerstream", "min"), ("layerstream", "auto"), ("resident", None)]
    assert told == [*((0, *cell) for cell in one), *((1, *cell) for cell in one[1:])]

    times = {("resident", None): [100.0, 104.0, 102.0], ("layerstream", "min"): [230.0, 250.0, 244.0]}
    done = [
        {**record_of(*key, each), "round": number, "equal": True, "peak_reserved_bytes": int(1e9) + number}
        for number in range(3)
        for key, values in times.items()
        for each in [values[number]]
    ]
    suite.rate(done)
    resident, ours = typical(done)
    assert (resident["ms_per_pass"], ours["ms_per_pass"]) == (102.0, 244.0)
    assert ours["ratio_to_resident"] == round(244 / 102, 4)
    assert ours["times_of_rounds"] == [230.0, 250.0, 244.0]
    assert ours["peak_reserved_bytes"] == int(1e9) + 2, "the highest of all"
    assert ours["equal"] is True
    assert typical([*done[:3], {**done[3], "equal": False}, *done[4:]])[1]["equal"] is False, "one differed"
    late = {"ms_per_pass": None, "equal": None}
    assert typical([*done[:5], {**done[5], **late}])[1]["equal"] is True, "one was not begun, and none differed"
    assert typical([{**each, **late} for each in done])[1]["equal"] is None
    assert typical([{**each, "round": 0} for each in done]) == [{**each, "round": 0} for each in sorted_by_cell(done)]


def sorted_by_cell(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(done, key=lambda record: record["method"] != "resident")


def test_a_pass_that_the_bus_bounds_is_held_against_its_bytes() -> None:
    bus = {"link_gb_per_s": 50.0, "predicted_bound": "bus", "predicted_ms_per_pass": 280.0}
    least = {**record_of("layerstream", "min", 284.2, **bus), "loaded_bytes_per_pass": 14 * 10**9}
    told = "\n".join(targets.lines([record_of("resident", None, 100.0), least]))
    assert "under min, at most 1.008 x its bytes' time: missed by 0.7 %, 1.0150 x of 280.00 ms" in told
    few = {**least, "case": "sd15", "loaded_bytes_per_pass": 10**9, "ms_per_pass": 110.0}
    told = "\n".join(targets.lines([{**record_of("resident", None, 100.0), "case": "sd15"}, few]))
    assert "under min, at most 1.15 x what bounds it: met, 1.100 x of 100.00 ms" in told


def test_every_suite_has_resident_first_and_those_with_peers_last() -> None:
    for name, wanted in suite.suites().items():
        for case, form in dict.fromkeys((entry.case, entry.form) for entry in wanted):
            methods = [entry.method for entry in wanted if (entry.case, entry.form) == (case, form)]
            assert methods[0] == "resident", name
            is_last = case in cases.WITH_PEERS or name.endswith(("-pairs", "-packed", "-stored", "-links", "-replicas"))
            assert (methods[-1] == "resident") is is_last, name
            assert set(OURS).intersection(methods)


def test_a_suite_can_be_narrowed_to_methods() -> None:
    found = list(suite.expand("ovis-denoiser", ["mmgp", "flextensor"], scale="tiny"))
    assert [(c.method, c.vram_budget) for c in found] == [
        ("resident", None), ("flextensor", "5GiB"), ("flextensor", "10GiB"), ("mmgp", "10GiB"), ("resident", None),
    ]  # fmt: skip


def test_a_suite_can_be_narrowed_to_budgets() -> None:
    found = list(suite.expand("ovis", ["layerstream", "vllm_omni", "flextensor"], ["min", "10GiB"], scale="tiny"))
    told = [(c.form, c.method, c.vram_budget) for c in found if c.method != "resident"]
    assert told == [
        ("denoiser", "layerstream", "min"), ("denoiser", "layerstream", "10GiB"), ("denoiser", "vllm_omni", None),
        ("denoiser", "flextensor", "10GiB"),
        ("pipeline", "layerstream", "10GiB"), ("pipeline", "vllm_omni", None), ("pipeline", "flextensor", "10GiB"),
    ]  # fmt: skip


@pytest.mark.parametrize("is_mapped", [False, True])
def test_weights_are_shared_as_they_were_drawn(is_mapped: bool, tmp_path: Path) -> None:
    first = cases.build("sd35m", "pipeline", "tiny")
    weights.store(first.modules, tmp_path / "w")
    assert weights.is_stored(tmp_path / "w")
    second = cases.build("sd35m", "pipeline", "tiny", is_filled=False)
    weights.give(second.modules, tmp_path / "w", is_mapped=is_mapped)
    for name, module in first.modules.items():
        for (key, one), (_, other) in zip(named(module), named(second.modules[name]), strict=True):
            assert torch.equal(one, other), key
    assert torch.equal(first.run_pipeline(), second.run_pipeline())
    t5 = second.modules["text_encoder_3"]
    assert t5.shared.weight is t5.encoder.embed_tokens.weight


def named(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def test_passes_of_guidance_take_turns() -> None:
    work = cases.build("ovis", "denoiser", "tiny")
    first, second = work.inputs(torch.device("cpu"))
    assert first["hidden_states"] is second["hidden_states"]
    assert not torch.equal(first["encoder_hidden_states"], second["encoder_hidden_states"])
    assert len(cases.build("sd35m", "denoiser", "tiny").inputs(torch.device("cpu"))) == 1


def test_the_call_of_a_case_is_its_pipelines() -> None:
    work = cases.build("longcat", "pipeline", "tiny")
    assert type(work.pipe) is type(build_pipeline("longcat", scale="tiny"))
    assert set(work.modules) == {"vae", "text_encoder", "transformer"}
    work.steps = 2
    assert work.call()["num_inference_steps"] == 2


# ---- plots


def test_plots_and_the_table_come_from_the_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    base: dict[str, Any] = {
        "case": "ovis", "form": "denoiser", "gpu": "G", "is_mapped": False, "vram_budget": None, "equal": True,
        "ratio_to_resident": 1.0, "seconds": None, "peak_reserved_bytes": 16 * 10**9, "ms_per_pass": 100.0,
        "error": None, "date": "2026-11-24",
    }  # fmt: skip
    records = [
        {**base, "method": "resident"},
        {**base, "method": "layerstream", "vram_budget": "6GiB", "ms_per_pass": 150.0, "ratio_to_resident": 1.5,
         "peak_reserved_bytes": 6 * 10**9},
        {**base, "method": "mmgp", "ms_per_pass": None, "error": "ended after 9 s, in f (a.py:1), in g (b.py:2)",
         "ratio_to_resident": None},
        {**base, "method": "vllm_omni", "ms_per_pass": None, "error": "cannot", "ratio_to_resident": None},
        {**base, "method": "resident", "case": "ovis (tiny)"},
    ]  # fmt: skip
    (tmp_path / "ovis_g_20261124.json").write_text(json.dumps(records))
    (tmp_path / "older_g_20261120.json").write_text(json.dumps([{"case": "ovis", "ms_per_pass": 1}]))
    readme, page = tmp_path / "README.md", tmp_path / "page.md"
    for path, parts in ((readme, (plots.SHORT, plots.OPTIONS)), (page, (plots.LONG,))):
        with pytest.raises(pages.NoPlaceError, match="has no lines"):
            plots.make(tmp_path, readme, page)
        marks = [mark for part in parts for mark in pages.marks(part, "bench-plots")]
        path.write_text("\n".join(["before", *marks, "after", ""]))
    (picture,) = plots.make(tmp_path, readme, page)
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| | ovis, denoiser |" in text
    assert "| resident | **100.0 ms / 16.0** |" in text
    assert "| layerstream, 6GiB | **1.50 x / 6.0** |" in text
    assert "| vllm-omni, layerwise | [1] |\n" in text
    assert "| mmgp | [2] |\n" in text
    assert "\nNo time: [1] cannot; [2] ended after 9 s, in f (a.py:1).\n" in text
    assert "|" not in readme.read_text(), "there are no whole calls, and no pairs or packs"
    plots.make(tmp_path, readme, page)
    assert page.read_text() == text
    drawn = picture.read_bytes()
    other = {**base, "method": "layerstream", "vram_budget": "6GiB", "gpu": "H", "ms_per_pass": 120.0}
    (tmp_path / "ovis_h_20261124.json").write_text(json.dumps([other]))
    (picture,) = plots.make(tmp_path, readme, page)
    assert picture.read_bytes() == drawn, "a picture is of one GPU"
    pair = {**base, "method": "paired", "vram_budget": "min", "ms_per_pass": 130.0, "ratio_to_resident": 1.3}
    (tmp_path / "pairs_g_20261124.json").write_text(json.dumps([pair]))
    plots.make(tmp_path, readme, page)
    assert "| **least** | paired | 1.30 x, 14.9 GiB |" in readme.read_text()


def call_of(method: str, budget: str | None, seconds: float | None, gib: float = 10, **fields: Any) -> dict[str, Any]:
    """A record of a whole call."""
    return {
        "case": "ovis", "form": "pipeline", "gpu": "G", "method": method, "vram_budget": budget, "seconds": seconds,
        "peak_reserved_bytes": int(gib * 2**30), "equal": True, "error": None, **fields,
    }  # fmt: skip


def test_the_short_table_is_of_whole_calls() -> None:
    told = plots.short_table(
        [
            call_of("resident", None, 12.7, 22.1),
            call_of("layerstream", "6GiB", 19.04, 5.87),
            call_of("layerstream", "10GiB", 13.06, 9.84),
            call_of("layerstream", "auto", 12.7, 20),
            call_of("flextensor", "10GiB", 12.1, 16.8),  # fast, and too large
            call_of("mmgp", "10GiB", 14.0, equal=False),  # fast, and another image
            call_of("diffusers_block", None, None, error="ended after 90 s, in f (a.py:1)"),
            call_of("diffusers_leaf", None, 35.3, 6.03, is_extrapolated=True),
            call_of("vllm_omni", None, 27.15, 9.97, is_extrapolated=True),
            call_of("model_offload", None, None, error="ended after 70 s, in convert (module.py:1370)"),
            call_of("resident", None, 1.0, gpu="another"),
            {**call_of("resident", None, None), "form": "denoiser", "case": "sd35m", "ms_per_pass": 1.0},
        ]
    )
    assert told == [
        "| one image | Ovis-Image-7B |",
        "|---|---|",
        "| all of it on the GPU | 12.7 s, 22.1 GiB |",
        "| **layerstream, 10GiB** | 13.1 s, 9.8 GiB |",
        "| **layerstream, 6GiB** | 19.0 s, 5.9 GiB |",
        "| the fastest other way within 12 GiB | ~27.1 s, 10.0 GiB |",
        "| diffusers' `enable_model_cpu_offload()` | ended after 70 s |",
        "",
        "The fastest other ways: vllm-omni, layerwise (Ovis-Image-7B).",
    ]


def pass_of(method: str, budget: str | None, ratio: float | None, gib: float = 10, **fields: Any) -> dict[str, Any]:
    """A record of a denoiser's passes, on a GPU where a resident one takes 100 ms."""
    return {
        "case": "ovis", "form": "denoiser", "gpu": "G", "method": method, "vram_budget": budget, "error": None,
        "ms_per_pass": ratio and 100 * ratio, "ratio_to_resident": ratio, "seconds": None,
        "peak_reserved_bytes": int(gib * 2**30), "equal": True, **fields,
    }  # fmt: skip


def test_the_table_of_options_is_of_the_least_and_of_tight_budgets() -> None:
    sd35m, qwen = {"case": "sd35m"}, {"case": "qwen"}
    told = plots.options_table(
        [
            pass_of("resident", None, 1.0014, 15.04),
            pass_of("layerstream", "min", 2.46, 2.1),
            pass_of("layerstream", "5GiB", 1.78, 4.9),
            pass_of("layerstream", "8GiB", 1.27, 7.9),
            pass_of("layerstream", "10GiB", 1.02, 9.9),  # no option was measured there
            pass_of("layerstream", "auto", 1.0, 14.6),
            pass_of("paired", "6GiB", 1.1, 5.94),
            pass_of("paired", "5GiB", 1.21, 4.9),
            pass_of("paired", "min", 1.35, 2.23),
            pass_of("packed", "8GiB", 1.04, 7.9),
            pass_of("packed_auto", "8GiB", 1.26, 7.9),  # the long table has it
            pass_of("packed_paired", "min", 1.17, 2.52),
            pass_of("vllm_omni", None, 2.37, 2.93),  # larger than any of ours in the least memory, and the smallest
            pass_of("flextensor", "5GiB", 1.77, 6.52),  # faster, and larger still
            pass_of("flextensor", "10GiB", 1.01, 10.1),  # too large for both
            pass_of("mmgp", "2GiB", 1.02, 2.0, equal=False),  # small and fast, and another output
            pass_of("diffusers_leaf", None, None, equal=None, error="not begun: the suite's 440 s were over"),
            pass_of("packed", "min", 1.0, 2.0, gpu="another"),
            pass_of("resident", None, 1.0, 5.37, **sd35m),
            pass_of("layerstream", "min", 1.09, 1.31, **sd35m),
            pass_of("packed", "min", 0.985, 1.6, **sd35m),
            pass_of("vllm_omni", None, 1.09, 1.43, **sd35m),
            pass_of("diffusers_leaf", None, 3.05, 1.03, **sd35m),  # smaller, and slower
            pass_of("paired", "12GiB", 1.22, 11.9, **qwen),
            pass_of("resident", None, 1.0, 12.8, case="longcat"),
            pass_of("layerstream", "min", 2.4, 1.7, case="longcat"),
            {**call_of("paired", "6GiB", 12.3), "case": "longcat", "ratio_to_resident": 1.3},
        ]
    )
    assert told == [
        "| memory | one pass | Stable Diffusion 3.5 medium | Ovis-Image-7B | Qwen-Image |",
        "|---|---|---|---|---|",
        "|  | all of it on the GPU | 1 x, 5.4 GiB | 1 x, 15.0 GiB |  |",
        "| **least** | layerstream | 1.09 x, 1.3 GiB | 2.46 x, 2.1 GiB |  |",
        "|  | paired |  | 1.35 x, 2.2 GiB |  |",
        "|  | packed | 0.98 x, 1.6 GiB |  |  |",
        "|  | packed and paired |  | 1.17 x, 2.5 GiB |  |",
        "|  | another library | 1.09 x, 1.4 GiB (vllm-omni) | 2.37 x, 2.9 GiB (vllm-omni) |  |",
        "| **tight** | layerstream |  | 1.27 x, 7.9 GiB |  |",
        "|  | paired |  | 1.10 x, 5.9 GiB | 1.22 x, 11.9 GiB |",
        "|  | packed |  | 1.04 x, 7.9 GiB |  |",
        "|  | another library |  | 1.77 x, 6.5 GiB (FlexTensor) |  |",
        "",
        "GPU: G.",
    ]


def test_without_pairs_and_packs_there_is_no_table_of_options() -> None:
    done = [pass_of("resident", None, 1.0), pass_of("layerstream", "min", 2.4), pass_of("vllm_omni", None, 2.4)]
    assert plots.options_table(done) == []
    assert (
        plots.options_table([*done, pass_of("packed", "min", None), pass_of("paired", "min", 1.2, equal=False)]) == []
    )
    assert plots.options_table([*done, pass_of("packed", "min", 1.2)]) != []


def test_each_gpu_has_a_long_table_of_its_own() -> None:
    there: dict[str, Any] = {"gpu": "H"}
    told = plots.table(
        [
            pass_of("resident", None, 1.0),
            pass_of("layerstream", "min", 2.4, 2),
            pass_of("mmgp", None, None, error="ended after 9 s, in f (a.py:1)"),
            pass_of("resident", None, 1.0, **there),
            pass_of("layerstream", "min", 2.0, 2, **there),
            pass_of("paired", "min", 3.0, 2, equal=False, **there),
            pass_of("vllm_omni", None, None, error="cannot", **there),
            pass_of("diffusers_leaf", None, None, error="not begun: the suite's 440 s were over", **there),
            pass_of("layerstream", "min", 2.0, gpu="without resident"),
        ]
    )
    assert told == [
        "Times as ratios to resident in the same run / peak of reserved GB; bold: bit-equal.",
        "",
        "### H",
        "",
        "| | ovis, denoiser |",
        "|---|---|",
        "| resident | **100.0 ms / 10.7** |",
        "| layerstream, min | **2.00 x / 2.1** |",
        "| layerstream, passes paired, min | 3.00 x / 2.1 |",
        "| vllm-omni, layerwise | [1] |",
        "",
        "No time: [1] cannot.",
        "",
        "### G",
        "",
        "| | ovis, denoiser |",
        "|---|---|",
        "| resident | **100.0 ms / 10.7** |",
        "| layerstream, min | **2.40 x / 2.1** |",
        "| mmgp | [1] |",
        "",
        "No time: [1] ended after 9 s, in f (a.py:1).",
    ]


def test_a_picture_is_of_the_gpu_with_a_sweep_and_an_option() -> None:
    most = [pass_of("resident", None, 1.0), *(pass_of("layerstream", f"{n}GiB", 1.5) for n in range(2, 10))]
    there: dict[str, Any] = {"gpu": "H"}
    sweep = [pass_of("layerstream", budget, 1.5, **there) for budget in ("min", "5GiB", "auto")]
    resident, paired = pass_of("resident", None, 1.0, **there), pass_of("paired", "min", 1.3, **there)
    whole = [resident, *sweep, paired]
    assert plots._drawn([*most, *whole]) == whole
    for missing in (resident, sweep[1], paired):
        rest = [each for each in whole if each is not missing]
        assert plots._drawn([*most, *rest]) == most
        assert plots._drawn([*most, *rest, {**missing, "ms_per_pass": None}]) == most, (
            "what has no time is no measurement"
        )


def test_every_method_has_a_colour_of_its_own() -> None:
    assert set(plots._COLOURS) == set(METHODS)
    assert len(set(plots._COLOURS.values())) == len(METHODS)


def test_a_part_of_a_page_is_exchanged_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    start, end = pages.marks("one", "target")
    page.write_text("\n".join(["first", start, "earlier", end, "between", *pages.marks("two", "target"), "last"]))
    pages.write_parts(page, {"one": ["| \\1 |"]}, "target")
    assert page.read_text().splitlines() == [
        "first", start, "", "| \\1 |", "", end, "between", *pages.marks("two", "target"), "last",
    ]  # fmt: skip
    before = page.read_text()
    with pytest.raises(pages.NoPlaceError, match="three"):
        pages.write_parts(page, {"one": ["other"], "three": ["x"]}, "target")
    assert page.read_text() == before


def test_the_newest_of_each_cell_counts_unless_it_has_no_time(tmp_path: Path) -> None:
    base = {"case": "ovis", "form": "denoiser", "gpu": "G", "is_mapped": False, "vram_budget": None, "method": "mmgp"}
    written = [
        ("b", "2026-11-23", None, 1.0),
        ("a", "2026-11-24", "09:00:00", 2.0),
        ("z", "2026-11-24", None, 3.0),
        ("y", "2026-11-24", "10:00:00", 4.0),
        ("x", "2026-11-24", "11:00:00", None),
    ]
    for name, date, time_of_day, ms in written:
        record = {**base, "date": date, "time": time_of_day, "ms_per_pass": ms, "seconds": None}
        (tmp_path / f"{name}_g_20261124.json").write_text(json.dumps([record]))
    (found,) = plots.read(tmp_path)
    assert (found["file"], found["ms_per_pass"]) == ("y_g_20261124", 4.0)


def test_the_newest_reason_counts_where_there_is_no_time(tmp_path: Path) -> None:
    base = {"case": "ovis", "form": "denoiser", "gpu": "G", "is_mapped": False, "vram_budget": None, "method": "mmgp"}
    records = [
        {**base, "date": "2026-11-24", "time": time_of_day, "ms_per_pass": None, "seconds": None, "error": time_of_day}
        for time_of_day in ("11:00:00", "09:00:00")
    ]
    (tmp_path / "x_g_20261124.json").write_text(json.dumps(records))
    (found,) = plots.read(tmp_path)
    assert found["error"] == "11:00:00"


# ---- targets


def record_of(method: str, budget: str | None, ms: float, **fields: Any) -> dict[str, Any]:
    known = {"resident": 100.0}.get(method)
    return {
        "case": "ovis", "form": "denoiser", "method": method, "vram_budget": budget, "is_mapped": False,
        "ms_per_pass": ms, "seconds": None, "ratio_to_resident": ms / 100, "weights_bytes": 14 * 10**9,
        "peak_reserved_bytes": 2 * 10**9, "loaded_bytes_per_pass": 14 * 10**9, "host_peak_rss_bytes": 15 * 10**9,
        "exit_s": 0.3 if known is None else 0.0, "left_on_device_bytes": 1_000, "enter_gb_per_s": 16.0, **fields,
    }  # fmt: skip


def test_targets_are_told_met_or_missed() -> None:
    done = [
        record_of("resident", None, 100.0),
        record_of("layerstream", "min", 250.0, link_gb_per_s=54.5),
        record_of("layerstream", "10GiB", 104.0, predicted_ms_per_pass=102.0, predicted_bound="compute"),
        record_of("layerstream", "12GiB", 108.0, exit_s=0.6, locked_bytes=14 * 10**9),
        record_of("layerstream", "auto", 102.0, left_on_device_bytes=2_000),
        {
            **record_of("layerstream", "6GiB", 180.0, enter_gb_per_s=3.0, enter_s=4.7),
            **{"is_mapped": True, "stats_pin_s": 4.0, "stats_pinned_bytes": 14 * 10**9},
        },
        record_of("vllm_omni", None, 240.0),
        {**record_of("mmgp", "10GiB", 0.0), "ms_per_pass": None},
        record_of("resident", None, 103.0),
    ]
    told = "\n".join(targets.lines(done))
    for line in (
        "at the least budget as fast as vllm-omni's hooks: missed by 4.2 %, 1.042 x its time; GB/s over the bus: "
        "56.0 of 54.5 measured in 2.00 GB reserved, where it has 58.3 in 2.00 GB reserved",
        "at 10 GiB at most 1.05 x resident: met, 1.040 x, predicted 102.0 ms, compute-bound",
        "when everything fits at most 1.005 x: met within the 3.0 % by which the resident processes differ, 1.020 x",
        "entering in place at 15 GB/s or more: met",
        "entering from mapped files at 4 GB/s or more: missed by 25.0 %, 3.0 GB/s"
        "; the slowest took 4.70 s, 4.00 of it to page-lock (3.5 GB/s)",
        "host memory 1.02 x weights + 1 GiB: met, 15.00 GB",
        "leaving in 0.5 s: missed by 20.0 %, 0.60 s at most, which unlocks 14.0 GB of pages",
        "leaving no more on the device than running does: missed by 100.0 %",
        "no budget slower than a smaller one (by 1 % or more): missed, 12GiB takes 3.8 % more than 10GiB "
        "(14.00 GB a pass over the bus after 14.00); the resident processes differ by 3.0 %",
    ):
        assert f"- ovis, denoiser: {line}" in told


def test_targets_of_tokens_and_switches_are_told() -> None:
    ours = {
        **record_of("layerstream", "16GiB", 0.0), "case": "nextstep", "form": "pipeline", "seconds": 9.0,
        "ratio_to_resident": 3.1, "token_ratio": 3.1, "token_of_limit": 1.08,
    }  # fmt: skip
    call = {**ours, "case": "glm", "vram_budget": "24GiB", "ratio_to_resident": 1.5, "weights_cross_s": 0.6}
    video = {**record_of("layerstream", "12GiB", 101.0), "case": "wan22", "switch_ratio": 1.2}
    told = "\n".join(targets.lines([ours, call, video]))
    for line in (
        "- nextstep, pipeline: under 16GiB, a token to a resident one's time, at most 3.2 x: met, 3.100 x",
        "- nextstep, pipeline: under 16GiB, a token to its limit, at most 1.05 x: missed by 2.9 %, 1.080 x",
        "- glm, pipeline: under 24GiB, 1.05 x and the weights' way over the bus: missed by 30.4 %, 9.00 s, "
        "resident 6.00 s, the weights 0.60 s",
        "- wan22, denoiser: under 12GiB, to resident, at most 1.02 x: met, 1.010 x",
        "- wan22, denoiser: under 12GiB, the slowest step at the switch to the others, at most 1.1 x: missed by 9.1 %",
    ):
        assert line in told


def test_targets_of_pairs_are_told() -> None:
    done = [
        record_of("resident", None, 100.0),
        record_of("paired", "min", 132.0),
        record_of("paired", "5GiB", 104.8),
        record_of("paired", "6GiB", 103.5),
        record_of("paired", "8GiB", 180.0),
        record_of("resident", None, 101.0),
    ]
    told = targets.lines(done)
    for line in (
        "- ovis, denoiser: in pairs under min, to resident, at most 1.15 x: missed by 14.8 %, 1.320 x",
        "- ovis, denoiser: in pairs under 5GiB, to resident, at most 1.05 x: met, 1.048 x",
        "- ovis, denoiser: in pairs under 6GiB, to resident, at most 1.03 x: met within the 1.0 % by which the "
        "resident processes differ, 1.035 x",
    ):
        assert line in told
    assert not any("8GiB" in line for line in told)


def test_targets_that_nothing_tells_of_are_not_told() -> None:
    assert targets.lines([record_of("resident", None, 100.0)]) == []
    assert targets.lines([{**record_of("layerstream", "min", 0.0), "ms_per_pass": None}]) == []


@pytest.mark.parametrize("folder", [["--output", "/tmp/x"], ["--out", "/tmp/x"], ["--output=/tmp/x"], []])
def test_a_command_does_not_say_where_its_results_went(folder: list[str]) -> None:
    told = command_line(["suite", "ovis-quick", *folder, "--rounds", "3"])
    assert told == "python -m benchmarks suite ovis-quick --rounds 3"
