"""Whatever strikes while weights are given back: what was begun can be finished, and nothing is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

import layerstream
from layerstream.pipeline.owners import ACTIVE
from layerstream.weights.binding import UnitBinding
from tests.fakes import adversary, assert_equal, assert_restored, describe, run, toy


@pytest.fixture(autouse=True)
def none_active() -> Iterator[None]:
    """A streamer that cannot be closed would fail every later test, too."""
    yield
    ACTIVE.clear()


@pytest.mark.filterwarnings("ignore::layerstream.LayerstreamWarning")  # what could not be done is said
@pytest.mark.parametrize("is_pause", [False, True])
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_error_while_a_unit_goes_home(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], at: int, is_pause: bool
) -> None:
    """An interrupt, or host memory that is refused for the small tensors, which get memory of their own again."""
    model = toy(num_blocks=6)
    before, expected = describe(model), run(model)
    device = adversary()
    streamer = layerstream.offload(model, vram_budget="min", device=device).start()
    assert_equal(run(model), expected)
    restore, count = UnitBinding.restore, 0

    def fail_once(binding: UnitBinding, value: Any) -> None:
        nonlocal count
        count += 1
        if count == at + 1:
            raise error
        restore(binding, value)

    monkeypatch.setattr(UnitBinding, "restore", fail_once)
    with contextlib.suppress(error):
        if is_pause:
            with streamer.paused():
                pass
        else:
            streamer.close()
    assert count > at
    streamer.close()
    assert not streamer.is_active
    assert_restored(model, before)
    assert_equal(run(model), expected)
    assert device.buffer_bytes == 0
    assert not device.registered
