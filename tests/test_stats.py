"""Counters are plain numbers, and each of them is counted somewhere."""

from __future__ import annotations

import ast
import json
from dataclasses import fields
from pathlib import Path

import layerstream
from layerstream.stats import Stats

PACKAGE = Path(layerstream.__file__).parent


def written_names() -> set[str]:
    """Attributes that code of the package assigns or adds to, and what `Stats` is made with."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign | ast.AugAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {target.attr for target in targets if isinstance(target, ast.Attribute)}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Stats":
                found |= {keyword.arg for keyword in node.keywords if keyword.arg is not None}
    return found


def test_nothing_is_offered_that_nothing_counts() -> None:
    assert {field.name for field in fields(Stats)} - written_names() == set()


def test_counters_are_plain_numbers() -> None:
    values = Stats(num_loads=3, stall_ms=1.5).as_dict()
    assert json.loads(json.dumps(values)) == values
    assert (values["num_loads"], values["stall_ms"]) == (3, 1.5)
    assert {type(value) for value in values.values()} == {int, float}
