"""Ranks of a process group as processes that a test tells what to do, one step at a time, and kills."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist

from layerstream.host.ranks import Entering, HostRanks
from layerstream.host.shared_pages import Address, SharedPages

MIB = 2**20
PATIENCE_S = 60.0  # of whoever waits for what should come at once, on a loaded machine

# Forked from a process that has imported torch, and has no threads: a rank is there in some 0.1 s.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["layerstream.host.ranks"])


class Rank:
    """One rank. What it does are functions of this module, which find in `here` what those before have left."""

    def __init__(self, rank: int, num_ranks: int, keeper: str) -> None:
        self.rank = rank
        self._connection, its = _PROCESSES.Pipe()
        self._process = _PROCESSES.Process(target=_serve, args=(its, rank, num_ranks, keeper), daemon=True)
        self._process.start()
        its.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def start(self, step: Callable[..., Any], *args: object) -> None:
        self._connection.send((step, args))

    def result(self) -> Any:
        """What the step that was started last has returned; raises what it has raised."""
        assert self._connection.poll(PATIENCE_S), f"rank {self.rank} does nothing"
        result = self._connection.recv()
        if isinstance(result, Exception):
            raise result
        return result

    def do(self, step: Callable[..., Any], *args: object) -> Any:
        self.start(step, *args)
        return self.result()

    def kill(self) -> None:
        self._process.kill()
        self._process.join(PATIENCE_S)

    def end(self) -> None:
        self.kill()
        self._process.close()
        self._connection.close()


@contextlib.contextmanager
def ranks(num_ranks: int, keeper: str | None = None) -> Iterator[list[Rank]]:
    """Ranks with a process group of gloo.

    Args:
        keeper: who keeps its store: "rank 0", the path of a file, or None: this process, as torchrun does.
    """
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started: list[Rank] = []
    try:
        for rank in range(num_ranks):
            started.append(Rank(rank, num_ranks, keeper or str(server.port)))
            if keeper == "rank 0" and rank == 0:
                keeper = started[0].result()
        for each in started:
            assert each.result() == "ready"
        yield started
    finally:
        for each in started:
            each.end()


def _serve(connection: Connection, rank: int, num_ranks: int, keeper: str) -> None:
    warnings.simplefilter("error")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store: dist.Store
    if keeper == "rank 0":
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        connection.send(str(store.port))
    elif keeper.isdecimal():
        store = dist.TCPStore("127.0.0.1", int(keeper), is_master=False)
    else:
        store = dist.FileStore(keeper, num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    here["ranks"] = HostRanks()
    connection.send("ready")
    while True:
        try:
            step, args = connection.recv()
        except EOFError:
            os._exit(0)
        try:
            result = step(*args)
        except Exception as exc:
            result = exc
        connection.send(result)


# ---- what a rank does

here: dict[str, Any] = {}


def make(num_bytes: int, value: int) -> Address:
    here["pages"] = pages = SharedPages.make(num_bytes)
    pages.cut(0, num_bytes).fill_(value)
    return pages.address


def join(address: Address) -> None:
    here["pages"] = SharedPages.open(address)


def write(offset: int, value: int) -> None:
    here["pages"].cut(offset, 1).fill_(value)


def read(offset: int, num_bytes: int) -> list[int]:
    """The least and the greatest of the bytes."""
    return [int(value) for value in here["pages"].cut(offset, num_bytes).aminmax()]


def edit(offset: int, value: int) -> int:
    """Write to the private pages; how much of them is the rank's own after that."""
    private = here["pages"].private()
    private.cut(offset, 1).fill_(value)
    return int(private.own_bytes(0, here["pages"].address.num_bytes))


def read_private(offset: int, num_bytes: int) -> list[int]:
    return [int(value) for value in here["pages"].private().cut(offset, num_bytes).aminmax()]


def close_fd() -> None:
    here["pages"].close_fd()


def memory_of(name: str) -> tuple[int, int]:
    """Bytes of shared pages that are resident in the rank, and its share of them (each page over all that have it)."""
    rss = pss = 0
    is_it = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_it = name in line
        elif is_it and line.startswith("Rss:"):
            rss += int(line.split()[1]) * 1024
        elif is_it and line.startswith("Pss:"):
            pss += int(line.split()[1]) * 1024
    return rss, pss


def enter(name: str = "pipe", contents: str = "3 units") -> bool:
    here["entering"] = here["ranks"].enter(name, contents)
    return bool(here["entering"].is_leader)


def elect() -> bool:
    return bool(here["entering"].elect())


def publish(num_bytes: int, value: int, key: str = "unit 0") -> Address:
    address = make(num_bytes, value)
    here["entering"].publish(key, address.to_bytes())
    return address


def fetch(timeout_s: float = PATIENCE_S, key: str = "unit 0") -> None:
    join(Address.from_bytes(here["entering"].fetch(key, timeout_s)))


def what_of_entering(attribute: str) -> Any:
    found = getattr(here["entering"], attribute)
    return found() if callable(found) else found


def stream(name: str, num_bytes: int) -> bool:
    """What an engine does when it enters: one unit, of one value; whether this rank has led."""
    entering: Entering = here["ranks"].enter(name, "1 unit")
    here["entering " + name] = entering
    if entering.is_leader:
        pages = SharedPages.make(num_bytes)
        pages.cut(0, num_bytes).fill_(len(name))
        entering.publish("unit 0", pages.address.to_bytes())
    else:
        pages = SharedPages.open(Address.from_bytes(entering.fetch("unit 0", PATIENCE_S)))
    here["pages " + name] = pages
    assert pages.cut(0, num_bytes).unique().tolist() == [len(name)]
    return entering.is_leader


def leave(name: str) -> None:
    here.pop("entering " + name).close()
    here.pop("pages " + name)


# ---- what is seen from outside


def who_has(name: str) -> list[int]:
    """Processes that have memory of this name mapped or open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if name in (process / "maps").read_text() or any(_is_of(name, fd) for fd in (process / "fd").iterdir()):
                found.append(int(process.name))
    return found


def _is_of(name: str, fd: Path) -> bool:
    with contextlib.suppress(OSError):  # it is closed by now, as the one is by which they are listed
        return name in str(fd.readlink())
    return False


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
