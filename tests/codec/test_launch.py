"""Where there is no Triton, or none that works: an error that says so."""

from __future__ import annotations

import sys

import pytest
import torch

from layerstream import codec
from layerstream.codec import launch, reference
from layerstream.codec.format import GROUP_WORDS
from layerstream.errors import LayerstreamError
from tests.codec.data import make

CPU = torch.device("cpu")


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("layerstream.codec.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)


@pytest.mark.usefixtures("no_triton")
def test_without_triton_it_is_said() -> None:
    with pytest.raises(codec.CodecUnavailableError, match="need Triton, which cannot be imported"):
        codec.warm_up(CPU)
    packed = reference.encode(make("normal", GROUP_WORDS), 2, 2**40)
    assert packed is not None
    with pytest.raises(LayerstreamError, match="need Triton"):
        codec.prepare(*packed, torch.zeros(2 * GROUP_WORDS, dtype=torch.uint8))


@pytest.mark.usefixtures("no_triton")
def test_without_triton_the_cpu_packs_and_unpacks() -> None:
    words = make("normal", GROUP_WORDS)
    packed = codec.encode(words)
    assert packed is not None
    target = torch.zeros(2 * GROUP_WORDS, dtype=torch.uint8)
    codec.decode(*packed, target)
    assert torch.equal(target.view(torch.int16), words)


def unused(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    """Kernels that fail in place of these, or that do nothing."""

    class Kernels:
        def __getattr__(self, name: str) -> object:
            return self

        def __getitem__(self, grid: object) -> object:
            return self

        def __call__(self, *args: object, **kwargs: object) -> None:
            if error is not None:
                raise error

    monkeypatch.setattr(launch, "_kernels", Kernels)


def test_kernels_that_cannot_start_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    unused(monkeypatch, RuntimeError("ptxas fell over"))
    with pytest.raises(codec.CodecUnavailableError, match="cannot be started on cpu: ptxas fell over") as caught:
        codec.warm_up(CPU)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_kernels_that_give_wrong_words_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    unused(monkeypatch, None)
    monkeypatch.setattr(launch, "encode", reference.encode)
    with pytest.raises(codec.CodecUnavailableError, match="wrong words on cpu"):
        codec.warm_up(CPU)


def test_the_run_that_is_tried_is_one_that_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def encode(words: torch.Tensor, word_bytes: int, most_bytes: int) -> None:
        seen.append(reference.encode(words, word_bytes, most_bytes))

    unused(monkeypatch, None)
    monkeypatch.setattr(launch, "encode", encode)
    with pytest.raises(codec.CodecUnavailableError):
        codec.warm_up(CPU)
    (packed,) = seen
    assert packed is not None
    assert packed[1].num_exceptions > 0


def test_an_address_that_is_not_aligned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    unused(monkeypatch, None)
    packed = reference.encode(make("normal", GROUP_WORDS), 2, 2**40)
    assert packed is not None
    buffer = torch.zeros(2 * GROUP_WORDS + 64, dtype=torch.uint8)
    at = -buffer.data_ptr() % 16 + 8
    with pytest.raises(ValueError, match="not divisible by 16"):
        codec.prepare(*packed, buffer[at : at + 2 * GROUP_WORDS])
    with pytest.raises(ValueError, match="cannot be unpacked from"):
        codec.prepare(packed[0][:-256], packed[1], buffer[: 2 * GROUP_WORDS])
