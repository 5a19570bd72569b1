"""Reads the HTML that notebooks are given: it must be well-formed, and tests ask for its text and its cells."""

from __future__ import annotations

from html.parser import HTMLParser

_APART = {"p", "br", "table"}  # begin and end a line


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.text += " " if tag in _APART else ""
        if tag != "br":
            self.open.append(tag)
        if tag == "tr" and "tbody" in self.open:
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " " if tag in _APART else ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open:
            self.rows[-1][-1] += data


def _read(html: str) -> _Reader:
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert not reader.open, "all elements are closed"
    return reader


def html_cells(html: str) -> list[list[str]]:
    """The cells of all tables, row by row, without headers."""
    return _read(html).rows


def html_text(html: str) -> str:
    """What is to be read, without elements."""
    return " ".join(_read(html).text.split())
