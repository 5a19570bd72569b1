"""Two processes, each with a GPU and the same pipeline, and one copy of the weights in host memory for both.

The one that is measured shares first; the other runs passes on the next GPU all the while, and says at the end how
fast, and whether its outputs were equal.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import statistics
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import layerstream
from benchmarks import cases, weights
from benchmarks.methods.base import Method, MissingPeerError, Setup
from benchmarks.methods.ours import tell_of
from benchmarks.records import Record
from layerstream.device.simulated import SimulatedDevice

_NAME = "replicas"
_NUM_RANKS = 2
_NUM_WARM_UPS = 12
_SECONDS = 240.0  # for the other to load its weights and warm up


def _apply(setup: Setup) -> None:
    if setup.device.type == "cuda" and torch.cuda.device_count() < _NUM_RANKS:
        raise MissingPeerError("there is one GPU here, and two replicas need two")
    assert setup.folder is not None
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    setup.undo.callback(lambda kept: None, server)
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    work = setup.work
    given = (work.case, work.form, work.scale, str(setup.folder), setup.vram_budget, setup.device.type)
    other = context.Process(target=_run_other, args=(its, server.port, *given), daemon=True)
    other.start()
    setup.undo.callback(other.kill)
    its.close()
    _join(server.port, 0)
    setup.undo.callback(dist.destroy_process_group)
    streamer = setup.undo.enter_context(_offloaded(work.target, setup.vram_budget, setup.device))
    mine.send("share")
    if not mine.poll(_SECONDS):
        raise TimeoutError(f"the other replica was not ready after {_SECONDS:.0f} s")
    assert mine.recv() == "ready"

    def tell() -> Record:
        both = {"pss_bytes": [_pss_bytes()]}  # while both stream
        mine.send("tell")
        its_record: Record = mine.recv()
        both["pss_bytes"].append(its_record.pop("pss_bytes"))
        return {**tell_of(streamer), **its_record, **both}

    setup.tell = tell


def _offloaded(target: Any, vram_budget: int | str | None, device: torch.device) -> layerstream.LayerStreamer:
    found: Any = SimulatedDevice() if device.type == "cpu" else device
    streamer: layerstream.LayerStreamer = layerstream.offload(
        target, vram_budget=vram_budget or "auto", device=found, shared_as=_NAME
    )
    return streamer


def _join(port: int, rank: int) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=_SECONDS))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=_NUM_RANKS)


def _run_other(
    connection: Connection, port: int, case: str, form: Any, scale: Any, folder: str, budget: Any, kind: str
) -> None:
    """The other replica, from beginning to end."""
    device = torch.device("cpu")
    if kind == "cuda":
        device = torch.device("cuda", 1)
        torch.cuda.set_device(device)
    is_read = weights.is_stored(Path(folder) / "weights")
    work = cases.build(case, form, scale, is_filled=not is_read)
    if is_read:
        weights.give(work.modules, Path(folder) / "weights", is_mapped=False)
    _join(port, 1)
    assert connection.recv() == "share"
    with torch.inference_mode(), contextlib.suppress(EOFError), _offloaded(work.target, budget, device) as streamer:
        turns = work.turns(device)
        times: list[float] = []
        outputs: dict[int, torch.Tensor] = {}
        number = 0
        while not connection.poll():
            started = time.perf_counter()
            for position, (name, given) in enumerate(turns):
                outputs[position] = work.modules[name](**given)[0]
            if kind == "cuda":
                torch.cuda.synchronize()
            number += len(turns)
            if number == -(-_NUM_WARM_UPS // len(turns)) * len(turns):
                connection.send("ready")
            elif number > _NUM_WARM_UPS:
                times.append(1e3 * (time.perf_counter() - started) / len(turns))
        connection.recv()
        expected = torch.load(Path(folder) / "expected_denoiser.pt")
        is_equal = all(torch.equal(output.cpu(), expected[f"pass {n}"][0]) for n, output in outputs.items())
        connection.send(
            {
                "replica_ms_per_pass": round(statistics.median(times), 3) if times else None,
                "replica_equal": is_equal,
                "replica_num_shared_units": streamer.stats().num_shared_units,
                "pss_bytes": _pss_bytes(),
            }
        )
        connection.poll(_SECONDS)  # both stream until the first one leaves


def _pss_bytes() -> int:
    """Host memory of this process, of which it has what it shares with others in equal parts."""
    found = re.search(r"^Pss: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


REPLICAS = Method("replicas", _apply, ("denoiser",), num_warm_ups=8, takes_budget=True)
