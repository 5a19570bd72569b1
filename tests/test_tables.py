"""Tables and pages: text that can be read back, HTML that says the same."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerstream.tables import Page, Table
from tests.html_reading import html_cells, html_text


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert Table(("a", "long header", "c"), (("wide cell", "1", ""), ("", "", "last"))).text().split("\n") == [
        "a          long header  c",
        "wide cell  1",
        "                        last",
    ]
    assert Table(("only", "headers"), ()).text() == "only  headers"


cells = st.text(
    st.characters(codec="ascii", exclude_characters=" \n\r\t\x0b\x0c\x1c\x1d\x1e\x1f"), min_size=1, max_size=9
)
tables = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(cells, min_size=n, max_size=n).map(tuple), min_size=1, max_size=6)
)


@settings(max_examples=40, deadline=None)
@given(tables)
def test_a_table_can_be_read_back(rows: list[tuple[str, ...]]) -> None:
    lines = Table(rows[0], tuple(rows[1:])).text().split("\n")
    assert [tuple(line.split()) for line in lines] == rows
    assert all(line == line.rstrip() for line in lines)


@settings(max_examples=40, deadline=None)
@given(tables)
def test_html_has_the_same_cells_whatever_is_in_them(rows: list[tuple[str, ...]]) -> None:
    html = Page((Table(rows[0], tuple(rows[1:])),)).html()
    # What is between backticks is set as code; all else is to the letter.
    quoted = [[cell if cell.count("`") < 2 else None for cell in row] for row in rows[1:]]
    found = html_cells(html)
    assert len(found) == len(quoted)
    for cells_found, row in zip(found, quoted, strict=True):
        assert all(wanted in (None, cell) for cell, wanted in zip(cells_found, row, strict=True))


def test_a_page_as_text_and_as_html() -> None:
    page = Page(("first", "", Table(("a", "b"), (("1", "<2>"),)), "`code` & text", "last"))
    assert page.text().splitlines() == ["first", "", "a  b", "1  <2>", "`code` & text", "last"]
    html = page.html()
    assert html_cells(html) == [["1", "<2>"]]
    assert html_text(html) == "first ab1<2> code & text last"
    assert "<code>code</code> &amp; text<br>last" in html


def test_html_brings_no_colours() -> None:
    """Notebooks are dark or light; a colour that is right in one is unreadable in the other."""
    html = Page(("line", Table(("a",), (("b",),)))).html()
    assert html.replace("color:inherit", "").count("color") == 0
    assert "background" not in html
    assert "#" not in html


def test_a_row_of_another_length_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="3 cells under 2 headers"):
        Table(("a", "b"), (("1", "2", "3"),))
