"""The predictions of docs/several_gpus.md: which speeds they are made with, and that the page has them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from benchmarks import several_gpus
from benchmarks.budget_table import Case, alone
from benchmarks.several_gpus import WAY_GB_PER_S, together_gb_per_s
from benchmarks.true_size import models

ROOT = Path(__file__).parent.parent


def test_links_add_up_until_the_way_between_gpus_is_full() -> None:
    assert together_gb_per_s([50], way=40) == 50
    assert together_gb_per_s([50, 50], way=400) == 100
    assert together_gb_per_s([50, 45, 45], way=400) == 140
    assert together_gb_per_s([50] * 9, way=400) == together_gb_per_s([50] * 99, way=400) == 400


def test_more_links_are_never_slower() -> None:
    by_links = [speed for way, _, speed in several_gpus.ways() if way.startswith("host memory")]
    assert by_links == sorted(by_links)
    assert all(speed <= WAY_GB_PER_S for _, _, speed in several_gpus.ways())


@pytest.mark.slow
def test_the_page_has_what_the_planner_says_now() -> None:
    """`make budget-table` writes it."""
    cases = [alone(Case(m), "transformer") for m in models() if m.name in several_gpus.RESIDENT_MS]
    page = (ROOT / several_gpus.PAGE).read_text()
    assert [row for row in several_gpus.prediction_table(cases) if row not in page] == []
    # As measured on two H200s (benchmarks/results/stored_h200_20261129.md): over NVLink, and from the host.
    for case, measured in zip(cases, ((1.136, 2.472), (1.104, 2.339)), strict=True):
        for gb_per_s, ratio in zip((360.0, 55.4), measured, strict=True):
            assert several_gpus.ratio(case, None, gb_per_s) == pytest.approx(ratio, rel=0.02)
