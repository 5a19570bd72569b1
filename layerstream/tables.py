"""Lines and tables, as text for terminals and as HTML for notebooks: one set of cells for both. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import groupby

# Notebooks bring fonts and colours of their own, dark or light; what is said here is only what they would get wrong:
# numbers set to the right of a column of words, and black tables on pages without a doctype.
_TABLE = "color:inherit"
_CELL = "text-align:left;padding:.15em 1em .15em 0"
_QUOTED = re.compile("`([^`]*)`")


@dataclass(frozen=True)
class Table:
    """Cells under headers.

    Raises:
        ValueError: a row has another number of cells than there are headers.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.headers):
                raise ValueError(f"{len(row)} cells under {len(self.headers)} headers: {row}")

    def text(self) -> str:
        """Columns two spaces apart, as wide as their widest cell; no space at the end of a line."""
        lines = [self.headers, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.headers))]
        padded = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
        return "\n".join(line.rstrip() for line in padded)

    def html(self) -> str:
        """A table element, without colours."""
        head, *body = (
            "<tr>" + "".join(f'<{tag} style="{_CELL}">{_html(cell)}</{tag}>' for cell in line) + "</tr>"
            for tag, line in [("th", self.headers), *(("td", row) for row in self.rows)]
        )
        return f'<table style="{_TABLE}"><thead>{head}</thead><tbody>{"".join(body)}</tbody></table>'


@dataclass(frozen=True)
class Page:
    """Lines and tables, one under another. An empty line sets apart in text; HTML has margins for that."""

    parts: tuple[str | Table, ...]

    def text(self) -> str:
        """As printed in a terminal."""
        return "\n".join(part if isinstance(part, str) else part.text() for part in self.parts)

    def html(self) -> str:
        """As displayed in a notebook; what is between backticks in a line is set as code."""
        return f"<div>{''.join(self._elements())}</div>"

    def _elements(self) -> Iterator[str]:
        for is_line, parts in groupby(self.parts, key=lambda part: isinstance(part, str)):
            if is_line:
                yield f"<p>{'<br>'.join(_html(str(line)) for line in parts if line)}</p>"
            else:
                yield from (part.html() for part in parts if isinstance(part, Table))


def _html(text: str) -> str:
    return _QUOTED.sub(r"<code>\1</code>", escape(text))
