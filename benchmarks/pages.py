"""Parts of pages that programs write: what stands between a line that says so and the line that ends it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


class NoPlaceError(Exception):
    """A page has no place for what is to be written into it."""


def marks(name: str, target: str) -> tuple[str, str]:
    """The lines before and after a part, which `make <target>` writes."""
    return f"<!-- {name}: made by `make {target}` -->", f"<!-- end of {name} -->"


def write_parts(page: Path, parts: Mapping[str, Sequence[str]], target: str) -> None:
    """Exchange parts of a page, by name, for these lines; nothing is written where one has no place.

    Raises:
        NoPlaceError: the page does not exist, or lacks the marks of a part.
    """
    text = page.read_text() if page.exists() else ""
    for name, lines in parts.items():
        start, end = marks(name, target)
        if start not in text or end not in text:
            raise NoPlaceError(f"{page} has no lines {start!r} and {end!r}, between which a part of it goes")
        before, rest = text.split(start, 1)
        text = "\n".join([before + start, "", *lines, "", end + rest.split(end, 1)[1]])
    page.write_text(text)
