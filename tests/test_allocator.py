"""Growing segments are turned on while somebody streams, never against the user, and off for the engine's buffers."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from layerstream.device import cuda
from layerstream.device.allocator import GrowingSegments
from layerstream.device.simulated import SimulatedDevice
from layerstream.host.keeper import Keeper
from layerstream.transfer.helper import Helper


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


def test_what_is_forbidden_is_off_for_good() -> None:
    settings = Settings("a:1")
    growing = settings.segments()
    assert not growing.may_have_grown
    growing.add("before")
    with growing.off():
        assert growing.forbid()
    assert settings.now == "a:1,expandable_segments:False"
    assert not growing.forbid(), "the second time there is nothing to be given back"
    growing.add("after")
    growing.remove("before")
    growing.remove("after")
    growing.add("later")
    assert not growing.is_on
    assert growing.may_have_grown
    assert settings.written[-1] == settings.now == "a:1,expandable_segments:False"


def test_what_was_never_on_is_nothing_to_be_given_back() -> None:
    growing = Settings("").segments()
    assert not growing.forbid()
    growing.add("a")
    assert not growing.may_have_grown


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_what_the_user_lets_grow_may_have_grown(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "expandable_segments:True")
    assert Settings("expandable_segments:True").segments().may_have_grown


@pytest.mark.parametrize(("current", "may_grow"), [(0, True), (1, False)])
def test_memory_grows_only_on_the_current_gpu(current: int, may_grow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another GPU current torch unmaps what queued kernels use."""
    device = object.__new__(cuda.CudaDevice)
    device.torch_device = torch.device("cuda", 0)
    grown: list[object] = []
    monkeypatch.setattr(cuda, "_GROWING", SimpleNamespace(add=grown.append, remove=grown.remove))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    device.grow_segments("owner", is_on=True)
    assert bool(grown) is may_grow


@pytest.mark.parametrize("has_peer", ["keeper", "helper"])
def test_a_keeper_or_helper_stops_growth_before_anything_is_copied(has_peer: str) -> None:
    told: list[str] = []
    target, one = SimulatedDevice(), SimulatedDevice(name="one")
    target.stop_growing = lambda: told.append("stop growing")  # type: ignore[method-assign]
    target.reaches = lambda other: bool(told.append("reaches"))  # type: ignore[method-assign]
    if has_peer == "keeper":
        Keeper(one, None, target)
    else:
        Helper(one, target)
    assert told == ["stop growing", "reaches"]


@pytest.mark.parametrize(("may_have_grown", "is_forbidden"), [(False, False), (True, False), (False, True)])
def test_all_gpus_are_waited_for_before_memory_goes_that_another_may_use(
    may_have_grown: bool, is_forbidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing = SimpleNamespace(may_have_grown=may_have_grown, is_forbidden=is_forbidden)
    monkeypatch.setattr(cuda, "_GROWING", growing)
    device = object.__new__(cuda.CudaDevice)
    device.torch_device = torch.device("cuda", 0)
    done: list[object] = []
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 2 - index)
    monkeypatch.setattr(torch.cuda, "synchronize", done.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    device.empty_cache()
    assert done == ([0, 1, "emptied"] if may_have_grown or is_forbidden else ["emptied"])
    done.clear()
    device.free(torch.empty(1, device="cpu"))
    assert done == ([0, 1] if is_forbidden else [])
