"""Tiny pipelines with pairing on: equal, and paired as docs/pairing.md says."""

from __future__ import annotations

import pytest

from layerstream.standins import TINY_PIPELINES
from tools import pairing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*upcast_vae.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_each_is_equal_and_on_the_page(name: str) -> None:
    try:
        rows = pairing.rows_of(name)
    except ImportError as exc:
        pytest.skip(str(exc))  # a pipeline that the installed diffusers does not have yet
    page = pairing.PAGE.read_text()
    for row in rows:
        assert str(row) in page, "run `make pairing-table`"
