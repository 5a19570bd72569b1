"""Host memory that ranks share, and how they find each other, with ranks that are processes and get killed."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from layerstream.errors import ArgumentError, HostMemoryError, LayerstreamError
from layerstream.host import shared_pages
from layerstream.host.memory import PAGE_BYTES
from layerstream.host.ranks import Entering, HostRanks, _Store
from layerstream.host.shared_pages import Address, RankError, SharedPages
from tests import rank_processes as steps
from tests.rank_processes import MIB, PATIENCE_S, Rank, ranks, wait_until, who_has

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="shared pages are Linux's")


@pytest.fixture(autouse=True)
def nothing_in_dev_shm() -> Iterator[None]:
    yield
    assert not [path for path in Path("/dev/shm").iterdir() if "layerstream" in path.name]


@pytest.fixture
def two() -> Iterator[list[Rank]]:
    with ranks(2) as started:
        yield started


@pytest.fixture
def three() -> Iterator[list[Rank]]:
    with ranks(3) as started:
        yield started


def open_fds() -> int:
    gc.collect()  # of errors that were raised, and the frames that they hold
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


# ---- shared pages, in one process


def test_opened_pages_are_the_same_memory() -> None:
    pages = SharedPages.make(3 * PAGE_BYTES - 1)
    again = SharedPages.open(Address.from_bytes(pages.address.to_bytes()))
    assert pages.range != again.range
    assert pages.range[1] - pages.range[0] == pages.address.num_bytes == 3 * PAGE_BYTES
    assert pages.cut(0, 3 * PAGE_BYTES).count_nonzero() == 0
    tensor = pages.cut(PAGE_BYTES, 10)
    assert tensor.data_ptr() == pages.range[0] + PAGE_BYTES
    tensor.fill_(7)
    assert again.cut(PAGE_BYTES, 11).tolist() == [7] * 10 + [0]


def test_memory_lives_as_long_as_what_was_cut_from_it() -> None:
    before = open_fds()
    pages = SharedPages.make(2 * PAGE_BYTES)
    name = pages.address.name
    assert open_fds() == before + 1
    tensor, edited = pages.cut(0, 4), pages.private().cut(PAGE_BYTES, 4)
    tensor.fill_(5)
    del pages
    assert open_fds() == before
    assert tensor.tolist() == [5] * 4
    assert who_has(name) == [os.getpid()]
    del tensor
    assert edited.tolist() == [0] * 4
    del edited
    gc.collect()
    assert who_has(name) == []


def test_memory_is_never_resized() -> None:
    pages = SharedPages.make(2 * PAGE_BYTES)
    for size in (PAGE_BYTES, 3 * PAGE_BYTES):
        with pytest.raises(PermissionError):
            os.truncate(pages.address.path, size)


def test_nobody_joins_after_the_descriptor_is_closed() -> None:
    before = open_fds()
    pages = SharedPages.make(PAGE_BYTES)
    other = SharedPages.open(pages.address)
    pages.cut(0, 1).fill_(3)
    for each in (pages, other, pages):
        each.close_fd()
    assert open_fds() == before
    with pytest.raises(RankError, match=f"of process {os.getpid()} is gone") as caught:
        SharedPages.open(pages.address)
    assert caught.value.is_gone
    assert [each.private().cut(0, 1).item() for each in (pages, other)] == [3, 3]


def test_a_page_that_is_written_to_becomes_the_process_s_own() -> None:
    num_pages = 100
    pages = SharedPages.make(num_pages * PAGE_BYTES)
    pages.cut(0, num_pages * PAGE_BYTES).fill_(1)
    private = pages.private()
    assert private is pages.private()
    whole = private.cut(0, num_pages * PAGE_BYTES)
    assert private.own_bytes(0, num_pages * PAGE_BYTES) == 0
    assert whole.unique().tolist() == [1]
    assert private.own_bytes(0, num_pages * PAGE_BYTES) == 0  # reading takes nothing
    whole[7 * PAGE_BYTES - 1 : 7 * PAGE_BYTES + 1] = 2  # two pages
    assert private.own_bytes(0, num_pages * PAGE_BYTES) == 2 * PAGE_BYTES
    assert private.own_bytes(6 * PAGE_BYTES + 9, 1) == PAGE_BYTES
    assert private.own_bytes(8 * PAGE_BYTES, 92 * PAGE_BYTES) == 0
    assert private.own_bytes(0, 0) == 0
    assert pages.cut(0, num_pages * PAGE_BYTES).unique().tolist() == [1]


def test_where_the_system_tells_nothing_all_is_the_process_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    private = SharedPages.make(3 * PAGE_BYTES).private()
    monkeypatch.setattr(shared_pages, "Path", lambda path: Path("/proc/self/no-such-file"))
    assert private.own_bytes(1, PAGE_BYTES) == 2 * PAGE_BYTES


# ---- addresses that lead to something else


@pytest.mark.parametrize(
    "change",
    [
        {"pid": os.getppid()},
        {"pid": 2**22 - 1},
        {"fd": 0},
        {"fd": 10**6},
        {"inode": 1},
        {"device": 0},
        {"num_bytes": 2 * PAGE_BYTES},
        {"name": "layerstream-of-another-time"},
    ],
    ids=str,
)
def test_nothing_else_is_taken_for_the_memory(change: dict[str, int]) -> None:
    pages = SharedPages.make(PAGE_BYTES)
    before = open_fds()
    with pytest.raises(LayerstreamError, match="4.0 KiB of shared memory|8.0 KiB of shared memory"):
        SharedPages.open(dataclasses.replace(pages.address, **change))
    assert open_fds() == before


def test_a_number_that_stands_for_another_file_by_now() -> None:
    """Other shared pages of the same size, and a pipe, the opening of which would wait for somebody to write to it."""
    pages = SharedPages.make(PAGE_BYTES)
    address, other = pages.address, SharedPages.make(PAGE_BYTES)
    reading, writing = os.pipe()
    pages.close_fd()
    for taken in (other.address.fd, reading):
        os.dup2(taken, address.fd)
        with pytest.raises(RankError, match="is gone"):
            SharedPages.open(address)
        os.close(address.fd)
    os.close(reading)
    os.close(writing)


def test_who_may_not_look_is_told_from_who_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has ended, and that its parent has not looked after, lets nobody look at its files either."""
    pages = SharedPages.make(PAGE_BYTES)

    def refuse(self: Address, found: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Address, "_is_this", refuse)
    fault = pages.address.fault()
    assert fault is not None
    assert not fault.is_gone
    assert "cannot be opened: Permission denied. Run all ranks of a host as one user" in str(fault)
    ended = subprocess.Popen(["true"])
    wait_until(lambda: ") Z " in Path(f"/proc/{ended.pid}/stat").read_text())
    monkeypatch.setattr(Address, "path", Path("/proc/self"))
    fault = dataclasses.replace(pages.address, pid=ended.pid).fault()
    assert fault is not None
    assert fault.is_gone
    ended.wait()


def test_memory_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_fds()
    with pytest.raises(HostMemoryError) as caught:
        SharedPages.make(2**60)
    assert caught.value.needed_bytes == 2**60
    del caught
    assert open_fds() == before
    monkeypatch.setattr(shared_pages, "_libc", object)
    with pytest.raises(HostMemoryError, match="4.0 KiB that processes can share: the C library has no memfd_create"):
        SharedPages.make(1)


# ---- several processes


def test_others_see_what_the_maker_has_written(three: list[Rank]) -> None:
    maker, *others = three
    address = maker.do(steps.make, 8 * MIB, 5)
    for other in others:
        other.do(steps.join, address)
        assert other.do(steps.read, 0, 8 * MIB) == [5, 5]
    maker.do(steps.write, MIB, 6)
    assert [other.do(steps.read, 0, 8 * MIB) for other in others] == [[5, 6]] * 2


def test_memory_is_taken_once(three: list[Rank]) -> None:
    num_bytes = 64 * MIB
    maker, *others = three
    address = maker.do(steps.make, num_bytes, 5)
    for other in others:
        other.do(steps.join, address)
    for each in three:
        assert each.do(steps.read, 0, num_bytes) == [5, 5]
        assert each.do(steps.read_private, 0, num_bytes) == [5, 5]
    found = [each.do(steps.memory_of, address.name) for each in three]
    assert [rss for rss, _ in found] == [2 * num_bytes] * 3  # mapped twice in each
    # Each page over the six mappings that have it, whose sum the kernel rounds down a little.
    assert sum(pss for _, pss in found) == pytest.approx(num_bytes, rel=0.01)
    assert sorted(who_has(address.name)) == sorted(each.pid for each in three)


def test_edits_are_a_rank_s_own(three: list[Rank]) -> None:
    maker, *others = three
    address = maker.do(steps.make, 2 * MIB, 5)
    for other in others:
        other.do(steps.join, address)
    for value, each in enumerate(three):
        assert each.do(steps.edit, MIB, value) == PAGE_BYTES
        assert each.do(steps.edit, 0, value) == 2 * PAGE_BYTES
    for value, each in enumerate(three):
        assert each.do(steps.read_private, 0, 1) == [value, value]
        assert each.do(steps.read_private, 1, MIB) == [value, 5]
        assert each.do(steps.read, 0, 2 * MIB) == [5, 5]


def test_the_memory_outlives_its_maker_and_goes_with_the_last(three: list[Rank]) -> None:
    maker, second, third = three
    address = maker.do(steps.make, 4 * MIB, 5)
    second.do(steps.join, address)
    maker.kill()
    assert second.do(steps.read, 0, 4 * MIB) == [5, 5]
    assert second.do(steps.edit, 0, 6) == PAGE_BYTES
    with pytest.raises(RankError, match=f"process {maker.pid} is gone: that process has ended") as caught:
        third.do(steps.join, address)
    assert caught.value.is_gone
    assert who_has(address.name) == [second.pid]
    second.kill()
    assert who_has(address.name) == []


# ---- ranks that enter together


def leave(rank: Rank) -> None:
    rank.do(steps.what_of_entering, "close")


def test_without_a_process_group() -> None:
    assert not dist.is_initialized()
    with pytest.raises(ArgumentError, match=r"`torchrun` or `accelerate launch`, and call `torch\.distributed\.init"):
        HostRanks()


@pytest.mark.parametrize("keeper", ["rank 0", "file", None], ids=str)
def test_the_first_leads_and_the_others_follow(tmp_path: Path, keeper: str | None) -> None:
    with ranks(3, str(tmp_path / "store") if keeper == "file" else keeper) as (first, second, third):
        assert second.do(steps.enter)
        third.start(steps.stream, "other", MIB)  # has nothing to do with it
        assert third.result()
        for rank in (first, third):
            assert not rank.do(steps.enter)
            rank.start(steps.fetch)  # which comes before there is anything
        address = second.do(steps.publish, MIB, 4)
        for rank in (first, third):
            rank.result()
            assert rank.do(steps.read, 0, MIB) == [4, 4]
            assert rank.do(steps.what_of_entering, "leader") == 1
        assert second.do(steps.what_of_entering, "ranks") == (0, 1, 2)
        assert sorted(who_has(address.name)) == sorted(rank.pid for rank in (first, second, third))


def test_keys_go_when_the_leader_leaves() -> None:
    with ranks(2) as (first, second):
        before = first.do(num_keys)
        for _ in range(3):
            assert first.do(steps.stream, "pipe", MIB)
            assert not second.do(steps.stream, "pipe", MIB)
            assert second.do(num_keys) > before + 3
            for rank in (second, first):
                rank.do(steps.leave, "pipe")
            assert second.do(num_keys) == before + 1  # the place, which is empty


def num_keys() -> int:
    return int(steps.here["ranks"]._store._ask(lambda store: store.num_keys()))


def test_ranks_may_enter_in_any_order_and_as_often_as_they_like(two: list[Rank]) -> None:
    first, second = two
    assert first.do(steps.stream, "a", MIB)
    assert second.do(steps.stream, "bb", MIB)
    assert not first.do(steps.stream, "bb", MIB)
    assert not second.do(steps.stream, "a", MIB)
    first.do(steps.leave, "a")
    assert first.do(steps.stream, "a", MIB)  # leads anew, while the other has what it shared before
    second.do(steps.leave, "a")
    assert not second.do(steps.stream, "a", MIB)


@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_leader_that_leaves_while_another_rank_looks_at_it(is_deleted: bool) -> None:
    store = dist.HashStore()
    leader = Entering(_Store(store), 0, "pipe", "3 units")

    class Racing:
        """A store in which the leader leaves as soon as its place was looked at."""

        def compare_set(self, key: str, expected: str, wanted: str) -> bytes:
            found = bytes(store.compare_set(key, expected, wanted))
            leader.close()
            if is_deleted:
                store.delete_key(key)
            return found

    assert leader.is_leader
    assert Entering(_Store(Racing()), 1, "pipe", "3 units").is_leader
    assert not leader.is_leader


def test_a_rank_that_comes_late(three: list[Rank]) -> None:
    first, second, third = three
    assert first.do(steps.stream, "pipe", MIB)
    assert not second.do(steps.stream, "pipe", MIB)
    second.do(steps.leave, "pipe")
    assert not third.do(steps.stream, "pipe", MIB)
    for rank in (first, third):
        rank.do(steps.leave, "pipe")
    assert third.do(steps.stream, "pipe", MIB)
    assert not first.do(steps.stream, "pipe", MIB)


def test_ranks_that_enter_with_other_contents(two: list[Rank]) -> None:
    first, second = two
    assert first.do(steps.enter, "pipe", "57 units of 23.8 GiB")
    with pytest.raises(RankError) as caught:
        second.do(steps.enter, "pipe", "60 units of 25.0 GiB")
    assert str(caught.value) == (
        "rank 1 enters 'pipe' with 60 units of 25.0 GiB, and rank 0 (process "
        f"{first.pid}), which leads on this host, with 57 units of 23.8 GiB. Load the same checkpoint in all ranks, "
        "edit it in none before streaming begins, and give pipelines that differ other names."
    )
    assert (caught.value.rank, caught.value.is_gone) == (0, False)


def test_a_leader_that_shares_nothing(two: list[Rank]) -> None:
    first, second = two
    assert first.do(steps.enter)
    assert not second.do(steps.enter)
    first.do(steps.publish, MIB, 4)
    second.do(steps.fetch)
    with pytest.raises(RankError) as caught:
        second.do(steps.fetch, 0.3, "unit 1")
    assert str(caught.value) == (
        f"rank 0 (process {first.pid}) has not shared 'unit 1' of 'pipe' within 0.3 s, after 1 others. It runs still: "
        "raise the timeout if it needs longer to load the weights, or see what it waits for."
    )
    assert (caught.value.rank, caught.value.is_gone) == (0, False)


@pytest.mark.parametrize("end", [Rank.kill, leave])
def test_a_leader_that_ends_before_it_shares(three: list[Rank], end: Callable[[Rank], None]) -> None:
    """Those who wait hear of it long before their time is up, and one of them leads."""
    first, second, third = three
    assert first.do(steps.enter)
    for rank in (second, third):
        assert not rank.do(steps.enter)
        rank.start(steps.fetch, 10 * PATIENCE_S)
    time.sleep(0.2)
    end(first)
    for rank in (second, third):
        with pytest.raises(RankError, match=r"has ended, or stopped streaming, before it shared 'unit 0'") as caught:
            rank.result()
        assert (caught.value.rank, caught.value.is_gone) == (0, True)
    leader, follower = at_once([second, third], steps.elect)
    leader.do(steps.publish, MIB, 4)
    follower.do(steps.fetch)
    assert follower.do(steps.read, 0, MIB) == [4, 4]
    assert follower.do(steps.what_of_entering, "leader") == leader.rank


def at_once(started: list[Rank], step: Callable[[], bool]) -> list[Rank]:
    """Let ranks enter at the same time. Returns: the one that leads first, and those that follow."""
    for rank in started:
        rank.start(step)
    leads = {rank.rank: rank.result() for rank in started}
    assert sum(leads.values()) == 1
    return sorted(started, key=lambda rank: not leads[rank.rank])


def test_one_leads_of_those_who_enter_at_once(three: list[Rank]) -> None:
    for value in range(20):
        leader, *others = at_once(three, steps.enter)
        leader.do(steps.publish, PAGE_BYTES, value)
        for other in others:
            other.do(steps.fetch)
            assert other.do(steps.read, 0, PAGE_BYTES) == [value, value]
        leave(leader)


def test_a_leader_that_is_killed_before_others_open(three: list[Rank]) -> None:
    first, second, third = three
    assert first.do(steps.enter)
    assert not second.do(steps.enter)
    address = first.do(steps.publish, MIB, 4)
    first.kill()
    with pytest.raises(RankError, match=r"1\.0 MiB of shared memory .* is gone") as caught:
        second.do(steps.fetch)
    assert caught.value.is_gone
    assert who_has(address.name) == []
    assert third.do(steps.enter)
    assert not second.do(steps.elect)


def test_a_leader_that_is_killed_once_all_have_opened(three: list[Rank]) -> None:
    first, second, third = three
    assert first.do(steps.stream, "pipe", MIB)
    assert not second.do(steps.stream, "pipe", MIB)
    first.kill()
    assert third.do(steps.stream, "pipe", MIB)  # its own, since nobody leads who could tell of the other
    second.do(steps.leave, "pipe")
    assert not second.do(steps.stream, "pipe", MIB)


def test_a_follower_that_is_killed(three: list[Rank]) -> None:
    first, second, third = three
    assert first.do(steps.enter)
    assert not second.do(steps.enter)
    second.start(steps.fetch, 10 * PATIENCE_S)
    second.kill()
    address = first.do(steps.publish, MIB, 4)
    assert not third.do(steps.enter)
    third.do(steps.fetch)
    assert sorted(who_has(address.name)) == sorted([first.pid, third.pid])
    leave(first)


def test_the_rank_that_keeps_the_store_is_killed() -> None:
    with ranks(2, "rank 0") as (first, second):
        assert first.do(steps.stream, "pipe", MIB)
        assert not second.do(steps.stream, "pipe", MIB)
        assert second.do(steps.stream, "mine", MIB)
        first.kill()
        with pytest.raises(RankError, match=r"the store of the process group does not answer .* rank 0, or torchrun"):
            second.do(steps.enter)
        second.do(steps.leave, "mine")
        second.do(steps.leave, "pipe")


def test_a_rank_whose_memory_may_not_be_opened_leads_by_itself(two: list[Rank]) -> None:
    first, second = two
    assert first.do(steps.enter)
    second.do(refuse_all)
    assert second.do(steps.enter)
    assert second.do(steps.what_of_entering, "leader") == 1
    assert "rank 0 (process" in second.do(steps.what_of_entering, "refused")
    leave(second)
    assert first.do(steps.what_of_entering, "refused") is None


def refuse_all() -> None:
    def fault(self: Address) -> RankError | None:
        return None if self.pid == os.getpid() else RankError("may not be opened")

    Address.fault = fault  # type: ignore[method-assign]
