"""Checks that a tag, the version and the changelog name the same release: `python -m tools.check_release v0.2.0`.

Needs nothing but Python, so that a wrong tag is found before anything is set up.
"""

from __future__ import annotations

import ast
import re
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
_HEADING = re.compile(r"^## \[([^\]]+)\](?: - (.*))?$")


def version_of(root: Path) -> str:
    """The version in `layerstream/_version.py`, read without importing the package."""
    tree = ast.parse((root / "layerstream" / "_version.py").read_text())
    (value,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["__version__"]
    )
    return str(ast.literal_eval(value))


def sections_of(root: Path) -> list[tuple[str, str | None, str]]:
    """The changelog's parts from top to bottom: name, date if there is one, text."""
    found: list[tuple[str, str | None, list[str]]] = []
    for line in (root / "CHANGELOG.md").read_text().splitlines():
        if heading := _HEADING.match(line):
            found.append((heading[1], heading[2], []))
        elif found:
            found[-1][2].append(line)
    return [(name, day, "\n".join(lines).strip()) for name, day, lines in found]


def problems(root: Path, tag: str) -> list[str]:
    """What stands against releasing `root` under `tag`, each with what to do; nothing when all agree."""
    if not re.fullmatch(r"v\d+\.\d+\.\d+", tag):
        return [f"the tag {tag!r} is not of the form v1.2.3."]
    found = []
    version = tag[1:]
    if (told := version_of(root)) != version:
        found.append(f"layerstream/_version.py says {told}, the tag {version}. Set the one, or move the other.")
    sections = sections_of(root)
    unreleased, released = sections[:1], sections[1:]
    if [name for name, _, _ in unreleased] != ["Unreleased"]:
        found.append("CHANGELOG.md does not begin with `## [Unreleased]`. Put that heading on top.")
        unreleased, released = [], sections
    if any(text for _, _, text in unreleased):
        found.append(f"CHANGELOG.md has entries under Unreleased. Move them under `## [{version}] - YYYY-MM-DD`.")
    name, day, text = released[0] if released else (None, None, "")
    if name != version:
        heading = f"its latest release is {name}" if name else "it has no release"
        found.append(f"CHANGELOG.md has no entry for {version} ({heading}). Add `## [{version}] - YYYY-MM-DD`.")
    else:
        if not _is_date(day):
            found.append(f"CHANGELOG.md gives {version} no date (it says {day}). Write `## [{version}] - YYYY-MM-DD`.")
        if not text:
            found.append(f"CHANGELOG.md says nothing about {version}. Write what changed for users.")
    return found


def _is_date(text: str | None) -> bool:
    try:
        return date.fromisoformat(text or "").isoformat() == text
    except ValueError:
        return False


def main(arguments: list[str]) -> int:
    """Print what is wrong; 0 if nothing is, 1 if something, 2 for wrong arguments."""
    if len(arguments) != 1:
        print("usage: python -m tools.check_release TAG", file=sys.stderr)
        return 2
    found = problems(ROOT, arguments[0])
    for problem in found:
        print(problem, file=sys.stderr)
    if not found:
        print(f"{arguments[0]}: tag, version and changelog agree")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
