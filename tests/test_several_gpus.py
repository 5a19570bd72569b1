"""The predictions of docs/several_gpus.md: which speeds they are made with, and that the page has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks import several_gpus
from benchmarks.budget_table import Case, alone
from benchmarks.several_gpus import LINK_GB_PER_S, WAY_GB_PER_S, together_gb_per_s
from benchmarks.true_size import models
from layerstream.transfer import route

ROOT = Path(__file__).parent.parent


class Counting:
    """A device, or a helper, that counts what it is to copy."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.device = self

    def prepare(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> int:
        return sum(source.numel() for _, source in pairs)

    def copy(self, what: Any, *rest: Any) -> None:
        self.num_bytes += what if isinstance(what, int) else what.numel()

    def record_copies(self) -> None:
        return None


@pytest.mark.parametrize("num_helpers", [1, 2, 3, 5, 7])
def test_links_together_are_as_fast_as_the_route_shares_them_out(num_helpers: int) -> None:
    size = 2**32
    unit = torch.empty(size, dtype=torch.uint8, device="meta")
    device, helpers = Counting(), [Counting() for _ in range(num_helpers)]
    links = route.CopyByLinks(device, helpers)  # type: ignore[arg-type]
    links.prepare(SimpleNamespace(pairs=lambda buffer: [(buffer, unit, True)]), unit, "unit")([])  # type: ignore[arg-type]
    brought = sum(helper.num_bytes for helper in helpers)
    assert device.num_bytes + brought == size
    busy_s = [
        device.num_bytes / LINK_GB_PER_S + brought / WAY_GB_PER_S,
        *(h.num_bytes / LINK_GB_PER_S for h in helpers),
    ]
    assert size / max(busy_s) == pytest.approx(together_gb_per_s([LINK_GB_PER_S] * num_helpers), rel=0.03)


def test_the_way_between_gpus_is_the_most_that_comes() -> None:
    assert together_gb_per_s([], own=50, way=400) == 50
    assert together_gb_per_s([50], own=50, way=400) == pytest.approx(93.75)
    assert together_gb_per_s([50] * 8, own=50, way=400) == together_gb_per_s([50] * 99, own=50, way=400) == 400


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
