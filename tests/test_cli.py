"""The command: exit codes, one line for what is wrong, and the demo on a real pipeline in a folder."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from layerstream import PipelineError, cli, demo
from layerstream.arguments import budget
from layerstream.device.simulated import SimulatedDevice
from layerstream.standins import build_tiny

# Servers do not end by themselves: tests/test_servers.py, tests/test_replicas.py.
SERVERS = {"server_fastapi", "replicas"}
EXAMPLES = sorted(p for p in (Path(__file__).parent.parent / "examples").glob("*.py") if p.stem not in SERVERS)
SMALL = ["--dtype", "float32", "--steps", "2", "--height", "32", "--width", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 3 as `save_pretrained` leaves it."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    build_tiny("sd3").save_pretrained(folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    try:
        code: Any = cli.main([str(a) for a in arguments])
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    return code, out, err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert (code, "demo" in out) == (0, True)
    code, out, _ = run(capsys, "demo", "--help")
    assert code == 0
    for option in ("model", "dtype", "prompt", "steps", "height", "width", "seed", "device", "vram-budget", "output"):
        assert f"--{option} " in out
    assert all(option in out for option in ("--skip-resident", "--pairing", "--packing", "--store GPU", "--links GPU"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1000", 1000), ("8GiB", "8GiB"), ("8G", "8G"), ("50%", "50%"), ("auto", "auto"), ("Min", "min")],
)
def test_a_budget_is_what_offload_takes(text: str, expected: int | str) -> None:
    assert budget(text) == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["paint"], "paint"),
        (["demo", "--steps", "0"], "0 is not positive"),
        (["demo", "--width", "wide"], "invalid number value: 'wide'"),
        (["demo", "--dtype", "int8"], "int8"),
        (["demo", "--vram-budget", "8 elephants"], "'8 elephants' is not a size"),
        (["demo", "--vram-budget", "0%"], "'0%' is 0 bytes"),
        (["demo", "--output", "no/such/folder/x.png"], "no file in an existing folder"),
        (["demo", "--device", "cuda:99"], 'device "cuda:99" does not exist'),
        (["demo", "--model", "./no-such-folder"], "there is no folder ./no-such-folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.count("\n") == 1, err
    assert err.startswith("layerstream")
    assert said in err


def test_a_model_in_a_folder(
    model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "demo", "--model", model, "--vram-budget", "1MB", *SMALL)
    assert code == 0
    assert "identical images: all 3,072 values, bit for bit" in out
    assert "transformer      SD3Transformer2DModel" in out
    assert "say nothing about a GPU" in out
    assert "  phase " in out, "the report"
    with Image.open(tmp_path / "demo-tiny-sd3.png") as image:
        assert image.size == (32, 32)


def test_without_a_budget_it_takes_a_third_of_the_weights(model: Path) -> None:
    pipe = demo.load_pipeline(str(model), torch.float32)
    call = demo.make_call(pipe, is_standin=False, seed=0, num_inference_steps=2, height=32, width=32)
    streamed = demo.run_streamed(pipe, call, "cpu", None)
    assert isinstance(streamed.budget, int)
    assert streamed.stats.peak_reserved_bytes <= streamed.budget
    assert streamed.stats.num_loads > 0
    assert streamed.stats.num_streamed_blocks > 0
    resident = demo.run_resident(pipe, call, "cpu")
    assert resident is not None
    assert demo.are_identical(resident.image, streamed.image)


@pytest.mark.filterwarnings("ignore:.*are not in the memory of")  # what is tied
def test_other_gpus_have_the_weights_or_carry_them(model: Path) -> None:
    pipe = demo.load_pipeline(str(model), torch.float32)
    call = demo.make_call(pipe, is_standin=False, seed=0, num_inference_steps=2, height=32, width=32)
    resident = demo.run_resident(pipe, call, "cpu")
    assert resident is not None
    stored = demo.run_streamed(pipe, call, "cpu", "min", store=SimulatedDevice(name="other"))
    assert stored.stats.num_stored_units > 0
    assert "are in another GPU's memory: loads come from other" in stored.report
    carrier = SimulatedDevice(name="carrier")
    carried = demo.run_streamed(pipe, call, "cpu", "min", links=[carrier])
    assert carrier.num_operations
    assert demo.are_identical(resident.image, stored.image)
    assert demo.are_identical(resident.image, carried.image)


def test_other_gpus_are_those_of_the_command(
    model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_streamed, given = demo.run_streamed, []

    def noted(*args: Any, **options: Any) -> demo.StreamedRun:
        given.append((options.pop("store"), options.pop("links")))
        return run_streamed(*args, **options)

    monkeypatch.setattr(demo, "run_streamed", noted)
    arguments = ["demo", "--model", model, *SMALL, "--skip-resident", "--output", tmp_path / "out.png"]
    assert run(capsys, *arguments)[0] == 0
    assert run(capsys, *arguments, "--store", "cuda:1", "cpu", "--links", "cuda:2")[0] == 0
    assert given == [(None, None), (["cuda:1", "cpu"], ["cuda:2"])]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--vram-budget", "1000"], "vram_budget 1000 B is too small"),
        (["--skip-resident", "--store", "cuda:99"], 'device "cuda:99" does not exist'),
        (["--skip-resident", "--links", "cuda:99"], 'device "cuda:99" does not exist'),
        (["--height", "33"], "StableDiffusion3Pipeline refused the call: `height` and `width` have to be divisible"),
    ],
)
def test_what_the_pipeline_shows_to_be_wrong(
    model: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "demo", "--model", model, *SMALL, *arguments)
    assert code == 2
    last = err.splitlines()[-1]  # after progress bars
    assert last.startswith("layerstream: ")
    assert said in last


def test_a_difference_is_exit_code_1(
    model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_streamed = demo.run_streamed

    def run_wrongly(*args: Any, **options: Any) -> demo.StreamedRun:
        right = run_streamed(*args, **options)
        image = right.image.clone()
        image.view(-1)[7] += 0.5
        return replace(right, image=image)

    monkeypatch.setattr(demo, "run_streamed", run_wrongly)
    code, out, _ = run(capsys, "demo", "--model", model, *SMALL, "--output", tmp_path / "out.png")
    assert code == 1
    assert "DIFFERENT images: 1 of 3072 values, at most by 0.5. Please report this." in out
    assert "identical" not in out


def test_without_a_resident_run_nothing_is_compared(
    model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["demo", "--model", model, *SMALL, "--output", tmp_path / "out.png"]
    code, out, _ = run(capsys, *arguments, "--skip-resident")
    assert code == 0
    assert "not compared" in out

    def no_room(pipe: Any, device: torch.device) -> None:
        if device != "cpu":  # the way back works
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("diffusers.StableDiffusion3Pipeline.to", no_room)
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "resident    does not fit on cpu (out of memory); streamed only" in out
    assert "not compared" in out


def test_out_of_memory_while_streaming_says_what_to_do(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(demo, "run_streamed", no_room)
    code, _, err = run(capsys, "demo", "--model", model, *SMALL, "--skip-resident")
    assert code == 2
    assert "tried to allocate 2 GiB" in err
    assert "Make the image smaller, or free what else is there." in err


def test_arguments_that_the_pipeline_does_not_take() -> None:
    class Unconditional:
        def __call__(self, num_inference_steps: int = 10, output_type: str = "pt") -> None: ...

    assert demo.make_call(Unconditional(), is_standin=False, seed=3, prompt=None) == {"seed": 3}
    with pytest.raises(PipelineError, match=r"a call of Unconditional takes no prompt, height\."):
        demo.make_call(Unconditional(), is_standin=False, seed=0, prompt="fox", height=8)


def test_identical_means_every_bit() -> None:
    zero, nan = torch.zeros(2, 3), torch.full((2, 3), float("nan"))
    assert demo.are_identical(nan, nan.clone())
    assert not demo.are_identical(zero, -zero)
    assert not demo.are_identical(zero, zero.double())
    assert not demo.are_identical(zero, zero[:1])
    assert demo.difference(zero, zero[:1]) == "torch.float32 [2, 3] became torch.float32 [1, 3]"


def test_first_frame_of_a_video_is_saved(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    video = torch.zeros(1, 4, 3, 8, 16, dtype=torch.bfloat16)
    video[0, 0, 0] = 1.5
    demo.save_png(video, tmp_path / "frame")
    with image.open(tmp_path / "frame") as saved:
        assert (saved.size, saved.getpixel((0, 0))) == ((16, 8), (255, 0, 0))


def test_python_dash_m() -> None:
    command = [sys.executable, "-m", "layerstream", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.startswith("layerstream 0.")


@pytest.mark.slow
def test_the_stand_in(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "demo", "--device", "cpu")
    assert code == 0
    assert "identical images" in out
    assert (tmp_path / "demo-standin.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    assert len(path.read_text().splitlines()) < 40
    command = [sys.executable, "-W", "error::layerstream.LayerstreamWarning", str(path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "identical" in result.stdout
