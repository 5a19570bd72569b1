"""Pictures of timelines: drawn from what `streamer.trace` writes, and errors said in one line."""

from __future__ import annotations

import gzip
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

import layerstream
from benchmarks import __main__ as command
from benchmarks import timelines
from benchmarks.timelines import Span, Stretch
from layerstream.hooks import compiled
from tests.fakes import adversary, run, toy

ROOT = Path(__file__).parent.parent


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two passes of six blocks on the simulated device, by whose clock loads take 0.1 ms each and compute no time."""
    monkeypatch.setattr(compiled, "is_in_use", lambda: False)
    model, path = toy(), tmp_path / "two.passes.json"
    with (
        layerstream.offload(model, vram_budget="min", device=adversary(link_gb_per_s=0.1)) as streamer,
        torch.no_grad(),
    ):
        run(model, 2)
        with streamer.trace(path):
            run(model, 2)
    return path


def size_of(picture: Path) -> tuple[int, int]:
    """Width and height in pixels."""
    header = picture.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", header[16:])
    return width, height


def span(row: str, start_ms: float, end_ms: float, gb_per_s: float | None = None) -> Span:
    return Span(row, "a.blocks.0", start_ms, end_ms, gb_per_s)


# ---- pictures


def test_a_trace_is_drawn_and_told(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.png"
    assert command.main(["timeline", str(trace), str(picture)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert re.match(r"0 to [\d.]+ ms: phases ", line)
    for row in ("phases", "passes", "blocks", "waits", "loads"):
        assert re.search(rf"\b{row} [\d.]+ %, \d+ of ", line), line
    assert re.search(r"passes [\d.]+ %, 2 of ", line)
    assert re.search(r"blocks 0\.0 %, 12 of 0 ms", line)
    assert line.endswith(" at 0.1 GB/s")
    assert "host" not in line
    width, height = size_of(picture)
    assert width > 1500
    assert height > 300


def test_a_compressed_trace_is_the_same(trace: Path, tmp_path: Path) -> None:
    compressed = tmp_path / "other.json.gz"
    compressed.write_bytes(gzip.compress(trace.read_bytes()))
    assert timelines.make(compressed, tmp_path / "b.png") == timelines.make(trace, tmp_path / "a.png")


def test_each_window_is_a_panel(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    assert command.main(["timeline", str(trace), str(one), "--from", "0.5"]) == 0
    assert capsys.readouterr().out.startswith("0.5 to ")
    windows = ["--from", "0", "--to", "0.5", "--from", "1", "--to", "1e9"]
    assert command.main(["timeline", str(trace), str(two), *windows]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("0 to 0.5 ms")
    assert second.startswith("1 to 1."), "a window ends where the timeline does"
    assert abs(size_of(two)[1] - 2 * size_of(one)[1]) <= 1


def test_shares_are_of_what_is_seen_and_count_once() -> None:
    spans = [span("loads", 0, 30, 50.0), span("loads", 20, 40, 60.0), span("waits", 10, 15), span("waits", 45, 90)]
    stretch = Stretch(10, 60, spans)
    assert stretch.share("loads") == 30 / 50
    assert stretch.share("waits") == 20 / 50
    assert stretch.share("blocks") == 0
    assert stretch.line() == (
        "10 to 60 ms: phases 0.0 %; passes 0.0 %; blocks 0.0 %; waits 40.0 %, 2 of 25 ms; "
        "loads 60.0 %, 1 of 20 ms at 60.0 GB/s"
    )


def test_bars_have_the_longest_name_that_fits() -> None:
    assert list(timelines._forms("vae.blocks.8 (2 of 2)")) == [
        "vae.blocks.8 (2/2)",
        "blocks.8 (2/2)",
        "8 (2/2)",
        "8",
    ]

    def texts(total_ms: float) -> list[tuple[float, str]]:
        return list(timelines._texts([span("loads", -1, 9, 54.56)], Stretch(0, total_ms, [])))

    assert texts(10) == [(4.5, "a.blocks.0\n54.6")]
    assert texts(200) == [(4.5, "blocks.0\n54.6")]
    assert texts(400) == [(4.5, "0\n54.6")]
    assert texts(1000) == [(4.5, "0")]
    assert texts(9000) == []


PICTURES = {
    "docs/pictures/pairs.png": (
        "blocks 95.7 %, 67 of 6.83 ms; waits 0.2 %",
        "blocks 99.2 %, 13 of 6.85 ms; waits 0.2 %, 12 of 0.0073 ms; loads 92.5 %, 13 of 3.79 ms",
    ),
    "docs/pictures/timeline.png": (
        "blocks 10.4 %, 60 of 0.368 ms; waits 85.9 %, 26 of 7.76 ms; loads 100.0 %, 26 of 8.55 ms",
        "blocks 99.0 %, 60 of 3.02 ms; waits 0.1 %",
    ),
}


def test_the_pictures_of_the_design_page_are_made_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    monkeypatch.chdir(ROOT)
    made = {}
    for said in re.findall(r"python -m benchmarks (timeline .*?)\n```", page, flags=re.DOTALL):
        arguments = said.replace("\\\n", " ").split()
        picture = arguments[2]
        assert f"]({picture.removeprefix('docs/')})" in page
        assert size_of(ROOT / picture)
        arguments[2] = str(tmp_path / "timeline.png")
        assert command.main(arguments) == 0
        made[picture] = capsys.readouterr().out.splitlines()
    assert sorted(made) == sorted(PICTURES)
    for picture, lines in made.items():
        for line, expected in zip(lines, PICTURES[picture], strict=True):
            assert expected in line


# ---- errors


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        command.main(["timeline", *arguments])
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--from", "soon"], "invalid float value: 'soon'"),
        (["--from", "9000"], "no spans from 9000 ms to its end; the timeline has "),
        (["--to", "-1"], "no spans from its start to -1 ms; the timeline has "),
        (["--from", "1", "--to", "1"], "no spans from 1 ms to 1 ms; the timeline has "),
        (["--from", "nan"], "no spans from nan ms"),
        (["--from", "0", "--to", "1", "--from", "2"], "2 --from and 1 --to; more than one panel needs both for each"),
    ],
)
def test_a_wrong_window_is_said_and_nothing_is_drawn(
    options: list[str], said: str, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    assert said in error_of([str(trace), str(picture), *options], capsys)
    assert not picture.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"no JSON", b"\xff\xfe", b"3", b"[]", b"{}", b'{"traceEvents": [{"ph": "X"}]}',
        gzip.compress(b"{}", mtime=0), b"\x1f\x8b and no more", gzip.compress(b"{}" * 99, mtime=0)[:-9],
    ],
)  # fmt: skip
def test_what_is_no_trace_is_said(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    said = error_of([str(path), str(tmp_path / "picture.png")], capsys)
    assert f"{path} is no timeline that streamer.trace() wrote" in said


def test_a_trace_of_nothing_is_said(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events: list[dict[str, Any]] = json.loads(trace.read_text())["traceEvents"]
    trace.write_text(json.dumps({"traceEvents": [event for event in events if event["ph"] == "M"]}))
    assert "no spans from its start to its end; the timeline has 0" in error_of([str(trace), "a.png"], capsys)


def test_files_that_cannot_be_read_or_written_are_said(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "no" / "such.json"
    assert f"{missing} cannot be read: No such file" in error_of([str(missing), "a.png"], capsys)
    nowhere = tmp_path / "no" / "picture.png"
    assert f"{nowhere} cannot be written: No such file" in error_of([str(trace), str(nowhere)], capsys)
    elephant = tmp_path / "picture.elephant"
    assert "Format 'elephant' is not supported" in error_of([str(trace), str(elephant)], capsys)
    assert not elephant.exists()


def test_spans_at_once_lie_side_by_side() -> None:
    """The two passes of a pair, and blocks that follow each other with a mark's inaccuracy between."""
    spans = [
        Span("blocks", str(n), start, end, None) for n, (start, end) in enumerate([(0, 4), (2, 4), (3.9995, 8), (6, 8)])
    ]
    assert [[span.name for span in part] for part in timelines.side_by_side(spans)] == [["0", "2"], ["1", "3"]]
    assert timelines.side_by_side([]) == [[]]
