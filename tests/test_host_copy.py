"""One copy of the weights in host memory for several ranks: real processes, equal, restored, whoever is killed when."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.errors import ArgumentError, RankError
from layerstream.host import memory
from layerstream.host.home import SharedHome
from layerstream.standins import build_tiny, run_tiny
from tests.fakes import adversary, assert_equal, assert_restored, describe, run, toy, twin
from tests.rank_processes import MIB, Rank, ranks
from tests.test_packing import EDITS, Layers, Pipe, engine_of

here: dict[str, Any] = {}


# ---- what a rank does


def enter(name: str = "toy", seed: int = 0, width: int = 0, budget: int | str = "min") -> int:
    """Begin to stream; returns how many units it shares."""
    torch.manual_seed(seed)
    model: nn.Module = Layers(32, width) if width else toy()
    for number, parameter in enumerate(model.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1000 * seed + number))
    here["resident"], here["pipe"] = (None if width else Pipe(twin(model))), Pipe(model)
    here["device"] = adversary(copies="random", seed=os.getpid())
    here["streaming"] = layerstream.offload(
        here["pipe"], vram_budget=budget, device=here["device"], shared_as=name
    ).start()
    gc.collect()
    return num_shared()


def num_shared() -> int:
    count = sum(isinstance(u.home, SharedHome) for u in engine_of(here["streaming"])._units.values())
    assert here["streaming"].stats().num_shared_units == count
    return count


def call(times: int = 2) -> None:
    with here["device"].checking():
        for _ in range(times):
            assert_equal(here["pipe"](), here["resident"]())


def edit(number: int) -> int:
    for each in (here["pipe"], here["resident"]):
        EDITS[number](each.model)
    call(3)
    return num_shared()


def pause() -> int:
    with here["streaming"].paused():
        for each in (here["pipe"], here["resident"]):
            each.model.blocks[1].scale.data.mul_(2)
    call()
    return num_shared()


def report() -> str:
    return str(here["streaming"].report())


def leave() -> None:
    here["streaming"].close()
    assert not here["device"].registered
    assert not here["device"].buffer_bytes
    for name, value in here["resident"].model.state_dict().items():
        assert torch.equal(here["pipe"].model.state_dict()[name], value), name
    assert_equal(here["pipe"](), here["resident"]())


def write_all() -> None:
    """Of a pipeline that streams no longer."""
    with torch.no_grad():
        for each in (here["pipe"], here["resident"]):
            for parameter in each.model.parameters():
                parameter.mul_(1.25)
    assert_equal(here["pipe"](), here["resident"]())


def own_bytes() -> int:
    """Host memory that this process has for itself."""
    gc.collect()
    memory.trim_heap()
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(re.search(rf"^{name}: +(\d+) kB", text, re.M)[1]) for name in ("Private_Dirty",)) * 1024  # type: ignore[index]


def pipeline(name: str) -> int:
    pipe: Any = build_tiny(name)
    expected = [run_tiny(pipe, name, seed=seed) for seed in range(2)]
    with layerstream.offload(pipe, vram_budget="min", device=adversary(copies="random"), shared_as=name) as streaming:
        for seed in (0, 1, 0):
            assert torch.equal(run_tiny(pipe, name, seed=seed), expected[seed])
        count = streaming.stats().num_shared_units
    assert torch.equal(run_tiny(pipe, name, seed=1), expected[1])
    return count


# ---- what ranks do together


def in_turn(group: list[Rank], *step: Any) -> list[Any]:
    return [rank.do(*step) for rank in group]


def at_once(group: list[Rank], *step: Any) -> list[Any]:
    for rank in group:
        rank.start(*step)
    return [rank.result() for rank in group]


def warm_up(group: list[Rank]) -> None:
    """What the first streaming of a process takes is taken."""
    at_once(group, enter, "to warm up")
    at_once(group, call)
    at_once(group, leave)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_equal_and_restored(num_ranks: int) -> None:
    with ranks(num_ranks) as group:
        assert at_once(group, enter) == [7] * num_ranks
        at_once(group, call)
        told = f"in host memory that is shared as 'toy'; by rank {', '.join(map(str, range(num_ranks)))} so far"
        assert all(told in text for text in in_turn(group, report))
        in_turn(group, leave)
        at_once(group, enter, "again")
        at_once(group, call)
        in_turn(reversed(group), leave)  # type: ignore[arg-type]


def test_the_weights_are_there_once() -> None:
    width = 1024  # 128 MiB in 32 layers
    with ranks(3) as group:
        warm_up(group)
        before = at_once(group, own_bytes)
        assert at_once(group, enter, "wide", 0, width) == [32] * 3
        after = at_once(group, own_bytes)
        assert all(now - then < 32 * MIB for now, then in zip(after, before, strict=True)), (before, after)


def test_what_a_rank_edits_becomes_its_own() -> None:
    with ranks(2) as group:
        at_once(group, enter)
        for number in range(len(EDITS)):
            shared = group[0].do(edit, number)
            assert shared < 7
            group[1].do(call)
        assert group[1].do(num_shared) == 7
        in_turn(group, leave)
        group[0].do(write_all)
        group[1].do(write_all)


def test_a_pause_keeps_what_is_the_same() -> None:
    with ranks(2) as group:
        at_once(group, enter)
        assert group[0].do(pause) == 6
        group[1].do(call)
        assert group[0].do(pause) == 6
        in_turn(group, leave)
        assert at_once(group, enter, "again") == [7, 7]
        assert group[1].do(pause) == 6


def test_what_is_handed_back_is_shared_until_it_is_written_to() -> None:
    width = 1024
    with ranks(2) as group:
        warm_up(group)
        before = group[1].do(own_bytes)
        at_once(group, enter, "wide", 0, width)
        for rank in group:
            rank.do(close)
        assert group[1].do(own_bytes) - before < 32 * MIB


def close() -> None:
    here["streaming"].close()


def test_entering_again_copies_nothing_twice() -> None:
    with ranks(2) as group:
        at_once(group, enter)
        at_once(group, call)
        for _ in range(3):
            in_turn(group, again)
            at_once(group, call)
        in_turn(group, leave)


def again() -> int:
    here["streaming"].close()
    here["streaming"].start()
    return num_shared()


@pytest.mark.parametrize("name", ["sd3", "longcat", "wan22"])
def test_pipelines(name: str) -> None:
    with ranks(2) as group:
        counts = at_once(group, pipeline, name)
        assert counts[0] == counts[1] > 5


# ---- who ends


@pytest.mark.parametrize("is_leader", [True, False])
def test_a_rank_that_is_killed_leaves_the_others_running(is_leader: bool) -> None:
    with ranks(3) as group:
        in_turn(group, enter)
        group.pop(0 if is_leader else 1).end()
        at_once(group, call)
        in_turn(group, edit, 0)
        in_turn(group, leave)
        assert at_once(group, enter) == [7, 7]
        at_once(group, call)


def test_a_leader_that_leaves_first_takes_nothing_along() -> None:
    with ranks(2) as group:
        in_turn(group, enter)
        group[0].do(leave)
        group[1].do(call)
        assert group[0].do(enter) == 7, "another copy: nobody leads any more"
        at_once(group, call)
        in_turn(group, leave)


# ---- what does not go together


def test_ranks_with_other_weights_are_told() -> None:
    with ranks(2) as group:
        group[0].do(enter, "toy", 0)
        with pytest.raises(RankError, match=r"none of its 7 units in `model` has the same weights"):
            group[1].do(enter, "toy", 1)
        assert group[1].do(enter, "other", 1) == 7
        at_once(group, call)


def test_ranks_with_other_shapes_are_told() -> None:
    with ranks(2) as group:
        group[0].do(enter, "toy")
        with pytest.raises(RankError, match="enters 'toy/model' with 32 units of"):
            group[1].do(enter, "toy", 0, 64)
        group[0].do(call)


def test_without_a_process_group() -> None:
    model = toy()
    before = describe(model)
    with (
        pytest.raises(ArgumentError, match="whose process group is not initialised"),
        layerstream.offload(model, vram_budget="min", device=adversary(), shared_as="toy"),
    ):
        pass
    assert_restored(model, before)
    with torch.no_grad():
        run(model, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"shared_as": ""},
        {"shared_as": 1},
        {"shared_as": "a", "packing": "ahead"},
        {"shared_as": "a", "store": "cuda:1"},
    ],
)
def test_names_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="shared_as"):
        layerstream.offload(toy(), **options)
