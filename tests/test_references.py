"""Whether anybody else looks at a tensor's memory, whatever versions and torch.compile do to the counts of Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from layerstream.weights import references
from layerstream.weights.references import is_held


def made() -> torch.Tensor:
    return torch.zeros(8)


HOLDERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a view": lambda tensor: tensor[2:],
    "an alias": lambda tensor: tensor.data,
    "an array": lambda tensor: pytest.importorskip("numpy").asarray(tensor),
    "the storage": lambda tensor: tensor.untyped_storage(),
}


@pytest.fixture(params=["before", "after"])
def torch_compile(request: pytest.FixtureRequest) -> None:
    """Torch.compile's frame evaluation, once on, changes the references of a call."""
    if request.param == "after":
        torch.compile(lambda x: x + 1, backend="eager")(made())


@pytest.mark.usefixtures("torch_compile")
def test_nobody_holds_a_new_tensor() -> None:
    tensor = made()
    for _ in range(3):
        assert not is_held(tensor, num_own=1)
    view = tensor[1:]
    assert not is_held(view, num_own=2)
    assert not is_held(tensor.data, num_own=3)


@pytest.mark.usefixtures("torch_compile")
@pytest.mark.parametrize("holder", HOLDERS)
def test_whoever_looks_at_it_is_seen_until_it_goes(holder: str) -> None:
    tensor = made()
    held = HOLDERS[holder](tensor)
    assert is_held(tensor, num_own=1)
    del held
    assert not is_held(tensor, num_own=1)


def test_where_torch_does_not_tell_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "use_count_of", lambda cdata: -1)
    assert is_held(made(), num_own=1)
