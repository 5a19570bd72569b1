"""The kernels without a GPU: what they do in Triton's interpreter, and that they compile for GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.codec.data import NAMES

pytest.importorskip("triton")

FORMS = ["normal/wide", "random bits/wide", "bunched/wide", "normal/short", "random bits/short"]
FORMS += ["normal/long", "junk in weights/long"]
REFUSED = ["normal/lossy", "normal/few bytes"]
GPUS = [75, 80, 86, 89, 90, 120]
PACKING = [("histogram",), ("pack", False, 8), ("pack", True, 8)]
# Weights like others; all of them are tried on a GPU.
LIKE_OTHERS = {"fp16 origin", "2 % zeros", "near 1 (LN)", "uniform"}
TRIED = [name for name in NAMES if name not in LIKE_OTHERS]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, Any]]:
    """What a process of its own found of each data set: the interpreter is chosen when the kernels are imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.codec.interpreted", *TRIED, *FORMS, *REFUSED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {found.pop("name"): found for found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", [*TRIED, *FORMS])
def test_in_the_interpreter(interpreted: dict[str, dict[str, Any]], name: str) -> None:
    found = interpreted[name]
    assert found["same_bytes"], "the encoders differ"
    assert found["same_words"], "what comes back differs"
    assert found["nothing_else"], "something was written past the end"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_packed_in_the_interpreter(interpreted: dict[str, dict[str, Any]], name: str) -> None:
    assert interpreted[name] == {"is_refused": True}


def test_data_sets_have_what_they_are_for(interpreted: dict[str, dict[str, Any]]) -> None:
    assert interpreted["normal"]["exceptions"] > 0
    assert interpreted["bunched"]["exceptions"] > 128, "more than one turn of the loop that writes them"
    assert interpreted["random bits"]["exceptions"] == 0


@pytest.mark.parametrize("gpu", GPUS)
def test_unpacking_compiles(gpu: int, tmp_path: Path) -> None:
    for facts in compiled(f"cuda:{gpu}", tmp_path, ("unpack", False, 4, True), ("unpack", True, 4, True)):
        assert facts["barriers"] == 1, "values are moved between lanes through shared memory"
        assert facts["shared_bytes"] == 0
        assert facts["registers"] <= (64 if gpu == 75 else 32 if gpu in (80, 90) else 40), "fewer warps fit"
        assert facts["spilled_bytes"] <= 8, "Triton 3.9 spills these once on 90"
        assert "inline_asm" in facts["source"]


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
def test_packing_compiles(gpu: int, tmp_path: Path) -> None:
    kernels = [("rank",), *((name, is_wide, *more) for name, *more in PACKING for is_wide in (False, True))]
    assert all(facts["spilled_bytes"] <= 64 for facts in compiled(f"cuda:{gpu}", tmp_path, *kernels))


@pytest.mark.parametrize("gpu", ["cuda:90", "hip:gfx942"])
def test_unpacking_compiles_without_assembly(gpu: str, tmp_path: Path) -> None:
    (facts,) = compiled(gpu, tmp_path, ("unpack", False, 4, False))
    assert "inline_asm" not in facts["source"]


def compiled(gpu: str, cache: Path, *asked: tuple[object, ...]) -> list[dict[str, Any]]:
    """Compile kernels in a process of its own: where LLVM knows no such GPU, it ends the process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.codec.compiling", gpu, *map(repr, asked)],
        env={**os.environ, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
