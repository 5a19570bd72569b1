"""One copy of the weights in host memory for several ranks: real processes, equal, restored, whoever is killed when."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import re
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.errors import ArgumentError, RankError
from layerstream.host import memory
from layerstream.host.home import SharedHome
from layerstream.host.ranks import HostRanks
from layerstream.standins import build_tiny, run_tiny
from tests.fakes import adversary, assert_equal, assert_restored, describe, passes_in_a_child, run, toy, twin
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


def num_resident() -> int:
    return int(here["streaming"].stats().num_resident_blocks)


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
    warnings.filterwarnings("ignore", "rank . shares")  # an embedding is tied
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


def fork() -> None:
    """A child that leaves, and one that only ends."""

    def leaves() -> None:
        assert "shared as 'toy'" in report()
        here["streaming"].close()
        with pytest.raises(RankError, match="forked from a rank, and is none"):
            here["ranks of this"].enter("toy", "something")

    def drops() -> None:
        here.clear()
        gc.collect()

    here["ranks of this"] = HostRanks()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert passes_in_a_child(leaves)
        assert passes_in_a_child(drops)
    assert any("in memory that ranks share" in str(one.message) for one in said)
    assert here["device"].registered


@pytest.mark.parametrize("is_leader", [True, False])
def test_a_forked_child_leaves_for_nobody(is_leader: bool) -> None:
    with ranks(3) as group:
        in_turn(group[:2], enter)
        group[0 if is_leader else 1].do(fork)
        at_once(group[:2], call)
        assert group[2].do(enter) == 7, "the leader leads still"
        assert "by rank 0, 1, 2 so far" in group[2].do(report)
        at_once(group, call)
        in_turn(group, leave)


def test_ranks_with_unlike_budgets() -> None:
    with ranks(3) as group:
        for rank, budget in zip(group, ("min", 46_000, "auto"), strict=True):
            rank.start(enter, "toy", 0, 0, budget)
        assert [rank.result() for rank in group] == [7, 7, 7]
        at_once(group, call)
        assert in_turn(group, edit, 0) == [6, 6, 6]
        assert len(set(in_turn(group, num_resident))) > 1
        in_turn(group, leave)


# ---- what does not go together


def test_ranks_with_other_weights_are_told() -> None:
    with ranks(2) as group:
        group[0].do(enter, "toy", 0)
        with pytest.raises(RankError, match=r"none of its 7 units has the same weights"):
            group[1].do(enter, "toy", 1)
        assert group[1].do(enter, "other", 1) == 7
        at_once(group, call)


def test_ranks_with_other_shapes_are_told() -> None:
    with ranks(2) as group:
        group[0].do(enter, "toy")
        with pytest.raises(RankError, match="enters 'toy/model' with 32 units of"):
            group[1].do(enter, "toy", 0, 64)
        group[0].do(call)


def enter_tampered() -> int:
    """As `enter`, with a weight that other ranks have not."""
    torch.manual_seed(0)
    model = toy()
    for number, parameter in enumerate(model.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    model.blocks[2].scale.data.add_(1)
    here["resident"], here["pipe"] = Pipe(twin(model)), Pipe(model)
    here["device"] = adversary(copies="random")
    told = r"rank 1 shares 6 of 7 blocks, .* of 53\.5 KiB, as 'toy'\. .*: 1 have other weights than .*, and 0 are tied"
    with pytest.warns(UserWarning, match=told):
        here["streaming"] = layerstream.offload(
            here["pipe"], vram_budget="min", device=here["device"], shared_as="toy"
        ).start()
    return num_shared()


def test_a_rank_with_some_other_weights_shares_the_rest() -> None:
    with ranks(2) as group:
        assert group[0].do(enter) == 7
        assert group[1].do(enter_tampered) == 6
        at_once(group, call)
        in_turn(group, leave)


def enter_two(seed: int) -> tuple[int, str]:
    """A component that is alike in all ranks, and, in a pause, one that is not."""
    here["pipe"], here["resident"] = None, None
    torch.manual_seed(0)
    parts = {"first": toy()}
    holder = type("Holder", (), {})()
    holder.components = parts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        streaming = layerstream.offload(holder, vram_budget="min", device=adversary(), shared_as="two").start()
        torch.manual_seed(seed)
        with streaming.paused():
            parts["second"] = Layers(2 + seed, 16)
        with torch.no_grad():
            parts["second"](torch.randn(1, 16))
        count, told = streaming.stats().num_shared_units, str(streaming.report())
    here["kept"] = streaming
    return count, told


def test_a_component_that_comes_later_and_differs_is_a_ranks_own() -> None:
    with ranks(2) as group:
        first, _ = group[0].do(enter_two, 1)
        second, _ = group[1].do(enter_two, 2)
        assert (first, second) == (10, 7)


def enter_empty() -> int:
    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(0, 4))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no blocks
        streaming = layerstream.offload(Nothing(), vram_budget="min", device=adversary(), shared_as="nothing").start()
    with contextlib.closing(streaming):
        return streaming.stats().num_shared_units


def test_weights_without_bytes() -> None:
    with ranks(1) as group:
        assert group[0].do(enter_empty) == 0


def shmem() -> int:
    text = Path("/proc/meminfo").read_text()
    return int(re.search(r"^Shmem: +(\d+) kB", text, re.M)[1]) * 1024  # type: ignore[index]


def enter_held(width: int) -> int:
    """All but one unit is held by somebody."""
    model = Layers(32, width)
    here["held"] = [block.weight.data[:1] for block in list(model.blocks)[1:]]
    with pytest.warns(UserWarning, match=r"shares 1 of 32 blocks, .*: 0 have other weights .*, and 31 are tied, held"):
        here["streaming"] = layerstream.offload(model, vram_budget="min", device=adversary(), shared_as="held").start()
    return here["streaming"].stats().num_shared_units


def test_what_cannot_be_shared_takes_no_shared_memory() -> None:
    before = shmem()
    with ranks(2) as group:
        torch.manual_seed(0)
        assert group[0].do(enter_held, 1024) == 1
        with contextlib.suppress(RankError):  # other random weights: what counts is what it takes
            group[1].do(enter_held, 1024)
        assert shmem() - before < 64 * MIB


def silent_store() -> float:
    """Enter where the store's keeper has stopped."""
    started = time.monotonic()
    try:
        enter()
    except RankError:
        return time.monotonic() - started
    return -1.0


def answers_within(seconds: float) -> None:
    module = importlib.import_module("layerstream.host.ranks")
    module._ANSWER_S = seconds


def test_a_torn_file_store_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with ranks(2, str(path)) as group:
        assert group[0].do(enter) == 7
        in_turn(group, answers_within, 1.0)
        with path.open("ab") as file:
            file.write((20).to_bytes(8, "little"))  # what a rank writes first, that is killed then
        assert 0 < group[1].do(silent_store) < 30
        group[0].do(call)
        assert "shared as 'toy'" in group[0].do(report)
        group[0].do(leave)


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
