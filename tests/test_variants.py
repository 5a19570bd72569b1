"""The sweep over pipeline classes: each streamed equal to resident, at the least and at a middle budget, and restored.

`make slow` runs it all. LAYERSTREAM_SHARD=k/n runs every n-th class from the k-th on (k from 1 to n), so that several
machines can share it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

import layerstream
from layerstream.standins.repository.tiny.variants import NOT_SWEPT, VARIANTS, build_variant, run_variant
from tests.fakes import adversary, assert_restored, describe
from tests.test_pipelines import modules, weights_bytes

# Old pipelines bring many warnings of diffusers, transformers and numpy. Ours are still errors; the last filter wins.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::layerstream.errors.LayerstreamWarning"),
]


def shard(names: Sequence[str], which: str | None) -> list[str]:
    """Those of `names` that are swept here; "2/3" is the second, fifth, eighth and so on."""
    number, count = map(int, which.split("/")) if which else (1, 1)
    if not 1 <= number <= count:
        raise ValueError(f"LAYERSTREAM_SHARD={which} is no k/n with k from 1 to n")
    return list(names[number - 1 :: count])


def assert_equal(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    assert len(outputs) == len(expected)
    for output, want in zip(outputs, expected, strict=True):
        assert torch.equal(output, want)


def states(pipe: Any) -> dict[str, dict[str, Any]]:
    return {name: describe(module) for name, module in modules(pipe).items()}


def assert_all_restored(pipe: Any, before: Mapping[str, Mapping[str, Any]], own: Mapping[str, set[str]]) -> None:
    """As `assert_restored`, but tensors in `own` may be other objects of the same values."""
    for component, module in modules(pipe).items():
        now = describe(module)
        was = {
            name: (now[name][0], value[1]) if name in own[component] else value
            for name, value in before[component].items()
        }
        assert_restored(module, was)


@pytest.mark.slow
@pytest.mark.parametrize("name", shard(VARIANTS, os.environ.get("LAYERSTREAM_SHARD")))
def test_streamed_as_resident(name: str) -> None:
    pipe = build_variant(name)
    expected = run_variant(pipe, name)  # first: transformers keeps notes on its modules from the first call on
    assert all(tensor.isfinite().all() for tensor in expected)
    assert any(len(tensor.unique()) >= min(8, tensor.numel()) for tensor in expected), "an output that says nothing"
    first = states(pipe)
    assert_equal(run_variant(pipe, name), expected)
    before = states(pipe)
    # Weights that the pipeline itself replaces in each call, as StableUnCLIPPipeline those of its normaliser.
    own = {c: {n for n, value in now.items() if value[0] != first[c][n][0]} for c, now in before.items()}
    budget: int | str = "min"
    for copies in ("late", "random"):
        device = adversary(copies=copies)
        with layerstream.offload(pipe, vram_budget=budget, device=device) as streamer, device.checking():
            assert_equal(run_variant(pipe, name), expected)
            stats = streamer.stats()
            engine = streamer._streamer
            assert engine is not None
            assert any(unit.spec.is_block for unit in engine._units.values()), "no stack was found"
            assert stats.num_loads > 0
        assert_all_restored(pipe, before, own)
        assert device.buffer_bytes == 0
        assert not device.registered
        # Between what the least takes and what all weights take, activations included.
        budget = stats.peak_reserved_bytes + weights_bytes(pipe) // 4 + 2**15
    assert_equal(run_variant(pipe, name), expected)


def test_every_class_is_swept_or_says_why_not() -> None:
    pytest.importorskip("diffusers")
    assert len(set(VARIANTS)) == len(VARIANTS)
    assert not set(VARIANTS) & set(NOT_SWEPT)
    assert all(reason and not reason.endswith(".") for reason in NOT_SWEPT.values())


def test_shards_are_everything_once() -> None:
    shards = [shard(VARIANTS, f"{number}/3") for number in (1, 2, 3)]
    assert sorted(name for names in shards for name in names) == sorted(VARIANTS)
    assert shard(VARIANTS, None) == list(VARIANTS)
    with pytest.raises(ValueError, match="LAYERSTREAM_SHARD=4/3"):
        shard(VARIANTS, "4/3")
