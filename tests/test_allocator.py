"""Growing segments are turned on while somebody streams, never against the user, and off for the engine's buffers."""

from __future__ import annotations

import pytest

from layerstream.device.allocator import GrowingSegments


class Settings:
    """An allocator's settings, and all that was ever written to them."""

    def __init__(self, now: str | None) -> None:
        self.now = now
        self.written: list[str] = []

    def write(self, settings: str) -> None:
        self.now = settings
        self.written.append(settings)

    def segments(self) -> GrowingSegments:
        return GrowingSegments(lambda: self.now, self.write)


@pytest.mark.parametrize("before", ["", "max_split_size_mb:128"])
def test_on_from_the_first_owner_to_the_last(before: str) -> None:
    settings = Settings(before)
    growing = settings.segments()
    prefix = f"{before}," if before else ""
    for _ in range(2):
        growing.add("a")
        growing.add("b")
        assert growing.is_on
        growing.remove("a")
        growing.remove("a")
        assert settings.now == f"{prefix}expandable_segments:True"
        growing.remove("b")
        assert not growing.is_on
        assert settings.now == f"{prefix}expandable_segments:False"
    assert len(settings.written) == 4, "what we left behind ourselves is no decision of the user's"


def test_the_engines_buffers_are_cut_as_they_are() -> None:
    settings = Settings("")
    growing = settings.segments()
    with growing.off():
        assert settings.written == []
    growing.add("a")
    with pytest.raises(MemoryError), growing.off():
        assert settings.now == "expandable_segments:False"
        raise MemoryError
    assert settings.now == "expandable_segments:True"
    with growing.off():
        growing.remove("a")
    assert settings.now == "expandable_segments:False"


@pytest.mark.parametrize("decided", ["expandable_segments:False", "a:1,expandable_segments:True"])
def test_what_the_user_decided_stays(decided: str) -> None:
    settings = Settings(decided)
    growing = settings.segments()
    growing.add("a")
    with growing.off():
        pass
    growing.remove("a")
    assert settings.written == []
    assert not growing.is_on


def test_another_allocator_is_left_alone() -> None:
    settings = Settings(None)
    growing = settings.segments()
    growing.add("a")
    growing.remove("a")
    assert settings.written == []


def test_an_allocator_that_refuses_goes_on_as_it_was() -> None:
    def refuse(settings: str) -> None:
        raise RuntimeError("unrecognised option")

    growing = GrowingSegments(lambda: "", refuse)
    growing.add("a")
    with growing.off():
        assert not growing.is_on
    growing.remove("a")
