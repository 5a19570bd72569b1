"""A pytest plugin for `tools.versions`: of tests that run for each tiny pipeline, keep those of a few."""

from __future__ import annotations

import pytest

from layerstream.standins import TINY_PIPELINES
from tools.versions import PIPELINES

_LEFT_OUT = set(TINY_PIPELINES) - set(PIPELINES)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests whose parameters name another pipeline."""
    kept = [item for item in items if not _LEFT_OUT & set(_parameters(item))]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _parameters(item: pytest.Item) -> list[str]:
    callspec = getattr(item, "callspec", None)
    return [value for value in callspec.params.values() if isinstance(value, str)] if callspec else []
