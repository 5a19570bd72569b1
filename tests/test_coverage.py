"""The page of coverage is of the installed diffusers, and of the sweep as it is."""

from __future__ import annotations

import re
from importlib.metadata import version

import pytest
from torch import nn

from layerstream.standins.repository.tiny.variants import NOT_SWEPT, VARIANTS
from tools import coverage

pytest.importorskip("diffusers")

# Importing everything that diffusers has warns of what is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")


def of_the_page(library: str) -> str:
    found = re.search(rf"{library} ([0-9.]+[0-9])", coverage.PAGE.read_text())
    assert found is not None
    return found[1]


def test_the_classes_are_those_of_the_installed_diffusers() -> None:
    if any(of_the_page(library) != version(library).partition("+")[0] for library in ("diffusers", "transformers")):
        pytest.skip("the page is of other versions")
    page = coverage.classes_on(coverage.PAGE.read_text())
    for kind, classes in coverage.model_classes().items():
        assert page[kind] == list(classes), f"{kind}: run `make coverage`"
    pipelines = coverage.pipeline_classes()
    assert page["Encoders of transformers"] == list(coverage.encoder_classes(pipelines.values())), "run `make coverage`"
    text = coverage.PAGE.read_text()
    assert [name for name in pipelines if not re.search(rf"\b{name}\b", text)] == []
    assert set(NOT_SWEPT) <= set(pipelines)


def test_the_page_names_all_that_is_swept() -> None:
    swept = coverage.PAGE.read_text().partition("\n## Pipelines\n")[2]
    assert f"{len(VARIANTS)} are swept" in swept, "run `make coverage`"
    assert [name for name in VARIANTS if not re.search(rf"\b{name}\b", swept)] == []


class Odd(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 2)


class Strict(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, 2)


def test_a_row_says_what_streams() -> None:
    row = coverage.describe("Odd", Odd, None)
    assert row.stacks == ("`layers` 3",)
    assert row.stack_bytes == 3 * (256 + 256)  # each tensor at a place of its own
    assert row.weights_bytes == row.stack_bytes + 2 * 256
    assert not row.is_tiny
    assert row.line("layout only").startswith("| Odd | `layers` 3 | 2.0 KiB | 0.5 KiB | 75 % | layout only |")


def test_a_class_without_defaults_is_taken_from_a_tiny_pipeline_or_says_why_not() -> None:
    assert coverage.describe("Strict", Strict, Strict(4).to("meta")).is_tiny
    line = coverage.describe("Strict", Strict, None).line("layout only")
    assert re.match(r"\| Strict \| cannot be built: TypeError, .*'width' \| - \|", line)
