"""Warnings name the line of the user."""

from __future__ import annotations

import pytest
from torch import nn

import layerstream
from tests.fakes import adversary


@pytest.mark.parametrize("way", ["with", "start", "decorator"])
def test_a_warning_is_in_the_name_of_who_entered(way: str) -> None:
    model = nn.Linear(4, 4)
    streamer = layerstream.offload(model, vram_budget="min", device=adversary())
    with pytest.warns(layerstream.LayerstreamWarning, match="no block stacks found") as warned:
        if way == "with":
            with streamer:
                pass
        elif way == "start":
            streamer.start().close()
        else:
            streamer(lambda: None)()
    assert [w.filename for w in warned] == [__file__]
