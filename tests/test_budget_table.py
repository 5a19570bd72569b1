"""The tables of docs/choosing-a-budget.md: what is counted, and what is planned from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("diffusers")

from benchmarks import budget_table
from benchmarks.budget_table import Card, Case
from benchmarks.counting import OUTSIDE, count
from benchmarks.true_size import Model, models
from layerstream.errors import BudgetError
from layerstream.planning.packed_choice import as_packed

ROOT = Path(__file__).parent.parent
WIDTH, NUM_TOKENS, NUM_BLOCKS = 4096, 1024, 16
BLOCK_BYTES = WIDTH * WIDTH * 2
BLOCK_FLOPS = 2 * NUM_TOKENS * WIDTH * WIDTH


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_BLOCKS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Conv2d(4, 3, 1, bias=False)

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> torch.Tensor:
        pixels: torch.Tensor = self.out(latents)
        return pixels


def _modules() -> dict[str, nn.Module]:
    with torch.device("meta"):
        made = {"transformer": Denoiser(), "vae": Decoder()}
    return {name: module.to(torch.bfloat16) for name, module in made.items()}


def _inputs(module: nn.Module) -> dict[str, Any]:
    return {"x": torch.empty(NUM_TOKENS, WIDTH, dtype=torch.bfloat16, device="meta")}


@pytest.fixture(scope="module")
def case() -> Case:
    return Case(Model("toy", "8 x 8", 10, {"transformer": 2}, _modules, _inputs, (1, 4, 8, 8), {"transformer": 3}))


def test_what_a_module_computes_is_counted_by_part() -> None:
    with torch.device("meta"):
        module = nn.ModuleDict({"first": nn.Linear(8, 16, bias=False), "second": nn.Linear(16, 4, bias=False)})
        x = torch.empty(2, 8)
        told = count(module, lambda: module["second"](module["first"](x)), ["first"])
    assert dict(told.flops) == {"first": 2 * 2 * 8 * 16, OUTSIDE: 2 * 2 * 16 * 4}
    assert told.total_flops == 2 * 2 * 8 * 16 + 2 * 2 * 16 * 4
    assert told.peak_bytes == (2 * 16 + 2 * 4) * 4


def test_what_is_freed_takes_nothing_any_more() -> None:
    def call() -> torch.Tensor:
        x = torch.empty(1000)
        for _ in range(10):
            x = x + 1
        return x

    assert count(nn.Module(), call).peak_bytes == 2 * 1000 * 4


def test_attention_makes_no_matrix_of_scores() -> None:
    heads, tokens, width = 2, 100, 8

    def call() -> torch.Tensor:
        x = torch.empty(1, heads, tokens, width)
        return functional.scaled_dot_product_attention(x, x, x)

    told = count(nn.Module(), call)
    assert told.total_flops == 2 * (2 * heads * tokens * tokens * width)
    assert told.peak_bytes == 2 * heads * tokens * width * 4


def test_passes_take_what_they_compute_or_what_they_copy(case: Case) -> None:
    assert case.counts["transformer"].total_flops == NUM_BLOCKS * BLOCK_FLOPS
    tflop = NUM_BLOCKS * BLOCK_FLOPS / 1e12
    everything = budget_table._call(case, case.plan(2**34, 25, 1.0))
    assert everything.ratio == pytest.approx(1)
    assert everything.streamed_bytes == 0
    least = case.plan(None, 25, 1.0).needed_bytes
    # Compute for a hundredth of the time in which all blocks are copied, then for a hundred times as long.
    copies_ms = NUM_BLOCKS * BLOCK_BYTES / 25e6
    bus = budget_table._call(case, case.plan(least, 25, copies_ms / tflop / 100))
    assert bus.streamed_bytes == pytest.approx(NUM_BLOCKS * BLOCK_BYTES, rel=0.2)
    assert bus.ratio == pytest.approx(bus.streamed_bytes / 25e6 / (copies_ms / 100), rel=0.1)
    compute = budget_table._call(case, case.plan(least, 25, copies_ms / tflop * 100))
    assert compute.ratio == pytest.approx(1, abs=0.02)
    assert compute.pass_s == pytest.approx(copies_ms * 100 / 1e3)
    assert compute.seconds == pytest.approx(20 * compute.pass_s, rel=0.02)


def test_what_pays_is_packed_and_told_beside(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    card = _card(case.plan(None, 25, 1.0).needed_bytes + 4 * BLOCK_BYTES, monkeypatch)
    monkeypatch.setattr(case, "_packed", {unit.index: as_packed(unit) for unit in case.units if unit.is_block})
    tflop = NUM_BLOCKS * BLOCK_FLOPS / 1e12
    of_bus = tflop * 1e3 / (NUM_BLOCKS * BLOCK_BYTES / 25e6 / 100)  # copies take a hundred times as long as compute
    raw, packed = budget_table._ratio(case, card, of_bus, 25), case.packed_ratio(card, of_bus, 25)
    assert 0.6 < packed / raw < 0.85
    assert budget_table._packed(case, card, of_bus, [raw]).split(" / ")[1] == f"{packed:.2f}"
    of_compute = tflop * 1e3 / (NUM_BLOCKS * BLOCK_BYTES / 25e6 * 100)
    assert case.packed_ratio(card, of_compute, 25) == pytest.approx(1, abs=0.02)
    assert budget_table._packed(case, card, of_compute, [1.0]) == ""


def _card(num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> Card:
    """A card with a budget of so many bytes."""
    card = Card(memory_gib=4, tflops=20.0, memory_gb_per_s=400.0, like="none")
    monkeypatch.setattr(budget_table, "_TAKEN_BYTES", 4 * 2**30 - num_bytes)
    assert card.budget_bytes == num_bytes
    return card


def test_copies_hide_from_the_link_on_over_which_they_take_as_long_as_compute(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = _card(case.plan(None, 25, 1.0).needed_bytes, monkeypatch)
    gb_per_s = BLOCK_BYTES / (BLOCK_FLOPS / (card.tflops * 1e12)) / 1e9
    assert budget_table._hides_from(case, card) == pytest.approx(gb_per_s, rel=0.2)


def test_what_does_not_fit_says_so(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    card = _card(2**26, monkeypatch)
    with pytest.raises(BudgetError):
        case.fitting(card.budget_bytes, 25, 1.0)
    assert "| toy | does not fit: " in budget_table._card_table([case], card)[-1]


@pytest.mark.slow
def test_the_page_has_what_the_planner_says_now() -> None:
    """Of one model; `make budget-table` writes all of them."""
    page = (ROOT / "docs" / "choosing-a-budget.md").read_text()
    (longcat,) = (Case(model) for model in models() if model.name == "LongCat-Image")
    rows = [budget_table._models_table([longcat])[-1], budget_table._token_table([longcat])[-1]]
    rows += [budget_table._card_table([longcat], card)[-1] for card in budget_table.CARDS]
    assert [row for row in rows if row not in page] == []
