"""Which ranks of a process group can share memory with this one, and what the one that leads tells the others.

Everything goes through the store that the group was initialised with, by reads and writes that never wait. There is no
collective, and nobody counts on anybody to come: whoever enters something first leads, and those who enter it while the
leader is there follow, in whatever order and however often each enters. Where the leader has ended or left, the next
who enters takes its place.

Who shares a host is not told by names. Ranks meet in the store under what makes it likely (one start of one kernel, one
space of process numbers, one user), and a rank follows once it has opened a page that the leader has made for it. This
page is also what shows that a leader is there still: it goes with its process, or when it leaves.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from layerstream.errors import ArgumentError, RankError
from layerstream.finalisers import Birthplace
from layerstream.host.shared_pages import Address, SharedPages

_ANSWER_S = 20.0  # that a store may take
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05  # between looks at the store, each a round trip of 35 µs on one host
_PREFIX = "layerstream/"  # of all keys
_NOTHING = "layerstream: nothing here"
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Claim:
    """What the rank that leads says of itself.

    Attributes:
        rank: in the process group.
        contents: what it enters with, in words: those who follow must enter with the same.
        page: shows that it is there.
    """

    rank: int
    contents: str
    page: Address

    @property
    def id(self) -> str:
        """Of no other entering, by any rank."""
        return self.page.name

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: bytes) -> Claim:
        fields = json.loads(text)
        return cls(fields["rank"], fields["contents"], Address(**fields["page"]))

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.page.pid})"


class HostRanks:
    """The ranks of a process group, to those of them that are on one host.

    Attributes:
        rank: of this process in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """
        Args:
            group: None: the default group.

        Raises:
            ArgumentError: there is none, or this process is not in it.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise ArgumentError(
                "the ranks of a host share weights by way of torch.distributed, whose process group is not "
                "initialised. Start the processes with `torchrun` or `accelerate launch`, and call "
                "`torch.distributed.init_process_group()` before streaming begins."
            )
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            raise ArgumentError("this process is no rank of the group that it should share weights with")
        self._store = _Store(_store_of(group))

    def enter(self, name: str, contents: str) -> Entering:
        """Lead, or follow who leads; does not wait.

        Args:
            name: of what is entered. Ranks that enter under other names have nothing to do with each other.
            contents: what it is, in words, with its numbers. Leader and followers must agree.

        Raises:
            RankError: the leader enters with other contents, or the store does not answer.
        """
        return Entering(self._store, self.rank, name, contents)


class Entering:
    """One time that ranks of this host enter something together.

    Attributes:
        leader: the rank that leads, perhaps this one.
        is_leader: this rank publishes, the others fetch.
        refused: why this rank leads by itself although another leads as well (its memory may not be opened); None: it
            does not.
    """

    def __init__(self, store: _Store, rank: int, name: str, contents: str) -> None:
        self._store = store
        self._rank = rank
        self._name, self._contents = name, contents
        self._birthplace = Birthplace()
        self._published: list[str] = []
        self._num_fetched = 0
        self._page: SharedPages | None = None  # of a leader
        self.refused: str | None
        self._claim = self._elect()

    @property
    def leader(self) -> int:
        return self._claim.rank

    @property
    def is_leader(self) -> bool:
        return self._page is not None

    def elect(self) -> bool:
        """Lead, or follow another, after the leader is gone; whether this rank leads.

        Raises:
            RankError: as `HostRanks.enter`.
        """
        if not self.is_leader:
            self._num_fetched = 0
            self._claim = self._elect()
        return self.is_leader

    def publish(self, key: str, payload: bytes) -> None:
        """Tell those who follow, also those who come later, until `close()`. For the leader; does not wait.

        Args:
            payload: at most a few KiB: a store may take no more than 8 MiB at once.
        """
        key = self._key(key)
        self._published.append(key)  # first: an interrupt may come between
        self._store.set(key, payload)

    def fetch(self, key: str, timeout_s: float) -> bytes:
        """What the leader has published, once it has.

        Raises:
            RankError: it has ended or left before (`is_gone`), which is seen at once; it has published nothing within
                `timeout_s`; or the store does not answer.
        """
        started, pause = time.monotonic(), _FIRST_PAUSE_S
        while True:
            # Looked at before what it published is: that may be the last it did.
            is_there = self._claim.page.fault() is None
            payload = self._store.read(self._key(key))
            if payload is not None:
                self._num_fetched += 1
                return payload
            waited = time.monotonic() - started
            if not is_there:
                raise RankError(
                    f"{self._claim} has ended, or stopped streaming, before it shared {key!r} of {self._name!r}; it "
                    f"was waited for {waited:.1f} s, and has shared {self._num_fetched} others. Enter again.",
                    rank=self.leader,
                    is_gone=True,
                )
            if waited >= timeout_s:
                raise RankError(
                    f"{self._claim} has not shared {key!r} of {self._name!r} within {timeout_s:g} s, after "
                    f"{self._num_fetched} others. It runs still: raise the timeout if it needs longer to load the "
                    "weights, or see what it waits for.",
                    rank=self.leader,
                )
            time.sleep(min(pause, timeout_s - waited))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def ranks(self) -> tuple[int, ...]:
        """The leader, and those who have followed it so far; also those who have ended since."""
        found = {self.leader}
        for position in range(1, self._store.add(self._key("followers"), 0) + 1):
            rank = self._store.read(self._key(f"follower {position}"))
            if rank is not None:
                found.add(int(rank))
        return tuple(sorted(found))

    def close(self) -> None:
        """This rank enters no more. A leader's keys go, and its place is free: those who fetch still hear that it left.

        What it shared stays, with those who have it. May be called again, and where the store is gone.
        """
        if self._page is None:
            return
        if not self._birthplace.is_here:  # the place, and the keys, are the parent's
            self._page = None
            return
        self._page.close_fd()  # first: that this rank has left is seen by it, whether the store answers or not
        try:
            self._store.replace(self._place, self._claim.to_text(), "")
            followers = [self._key(f"follower {n}") for n in range(1, self._store.add(self._key("followers"), 0) + 1)]
            for key in [*self._published, *followers, self._key("followers")]:
                self._store.delete(key)
        except RankError:
            pass  # its keys went with it, or it does not answer
        self._page = None  # last: whoever is interrupted runs this again

    def _elect(self) -> Claim:
        self.refused = None
        page = SharedPages.make(1)
        mine = Claim(self._rank, self._contents, page.address)
        expected = ""
        while True:
            found = self._store.replace(self._place, expected, mine.to_text())
            if found == mine.to_text().encode():
                self._page = page
                return mine
            if found in (b"", expected.encode()):
                expected = ""  # whoever led has left meanwhile; the second is what a store says where there is no key
                continue
            claim = Claim.from_text(found)
            try:
                SharedPages.open(claim.page)
            except RankError as exc:
                if not exc.is_gone:
                    self.refused = f"{claim} leads, and {exc}"
                    self._page = page
                    return mine
                expected = found.decode()  # its place is taken, unless somebody else is faster
                continue
            if claim.contents != self._contents:
                raise RankError(
                    f"rank {self._rank} enters {self._name!r} with {self._contents}, and {claim}, which leads on this "
                    f"host, with {claim.contents}. Load the same checkpoint in all ranks, edit it in none before "
                    "streaming begins, and give pipelines that differ other names.",
                    rank=claim.rank,
                )
            self._claim = claim
            position = self._store.add(self._key("followers"), 1)
            self._store.set(self._key(f"follower {position}"), str(self._rank).encode())
            return claim

    @property
    def _place(self) -> str:
        return f"{_host()}/{self._name}"

    def _key(self, key: str) -> str:
        return f"{self._claim.id}/{key}"


class _Store:
    """A group's store, by what never waits: a wait inside it would hold up the store's other users in this process.

    Where the one who keeps it has stopped, or has been killed in the middle of a write to a file, torch waits all the
    same, and cannot be interrupted: it is asked in another thread, and given up.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._is_silent = False
        self._birthplace = Birthplace()

    def set(self, key: str, payload: bytes) -> None:
        self._ask(lambda store: store.set(_PREFIX + key, payload))

    def read(self, key: str) -> bytes | None:
        # A get would wait for a key that has just been deleted. This gives what there is, and changes nothing.
        found = self.replace(key, _NOTHING, _NOTHING)
        return None if found == _NOTHING.encode() else found

    def replace(self, key: str, expected: str, wanted: str) -> bytes:
        """Set a key that has the value that is expected; "": or that is not there.

        Returns: what it has then; of a key that is not there, and was not set, what was expected.
        """
        return self._ask(lambda store: bytes(store.compare_set(_PREFIX + key, expected, wanted)))

    def add(self, key: str, amount: int) -> int:
        return self._ask(lambda store: int(store.add(_PREFIX + key, amount)))

    def delete(self, key: str) -> None:
        self._ask(lambda store: store.delete_key(_PREFIX + key))

    def _ask(self, question: Callable[[Any], _Result]) -> _Result:
        answers: queue.SimpleQueue[tuple[_Result | None, Exception | None]] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put((question(self._store), None))
            except Exception as exc:
                answers.put((None, exc))

        if not self._birthplace.is_here:  # it would write between what its parent writes to the same socket
            raise RankError(
                "this process was forked from a rank, and is none: it shares no weights. Start it with the 'spawn' "
                "method, and initialise a process group in it."
            )
        error: Exception | None = None
        if not self._is_silent:
            threading.Thread(target=ask, name="layerstream-store", daemon=True).start()
            try:
                answer, error = answers.get(timeout=_ANSWER_S)
            except queue.Empty:
                self._is_silent = True
        if self._is_silent:
            error = RuntimeError(f"nothing within {_ANSWER_S:.0f} s")
        if error is None:
            return answer  # type: ignore[return-value]
        if not isinstance(error, RuntimeError):
            raise error
        raise RankError(
            f"the store of the process group does not answer ({error}). The process that keeps it has ended: rank 0, "
            "or torchrun; or one was killed while it wrote to a file store. Ranks that stream go on; to share weights "
            "again, start all of them anew, with another file."
        ) from error


def _store_of(group: dist.ProcessGroup | None) -> Any:
    from torch.distributed import distributed_c10d

    # Private, and to be had in no other way: torch's own symmetric memory takes it from here.
    find = getattr(distributed_c10d, "_get_process_group_store", None)
    store = find(group if group is not None else dist.group.WORLD) if find is not None else None
    if store is None:
        raise ArgumentError(
            "the process group has no store that its ranks could find each other by, or this version of torch does not "
            "show it. Initialise the group with gloo or nccl, or let each rank keep weights of its own."
        )
    return store


def _host() -> str:
    """What ranks have in common that may be able to open each other's memory."""
    try:
        boot, space = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), Path("/proc/self/ns/pid").readlink()
    except OSError:
        return f"{os.uname().nodename}/{os.getuid()}"
    return f"{boot}/{space.name}/{os.getuid()}"
