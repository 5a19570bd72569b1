"""Loads over two GPUs' links, and one host copy for two processes, on real GPUs: compared with the resident model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import layerstream
from layerstream.host.home import SharedHome
from layerstream.standins import TINY_PIPELINES, build_tiny, run_tiny
from layerstream.transfer import helper, route
from tests.fakes import assert_restored, describe, twin
from tests.gpu.test_gpu_store import DEVICE, KEEPER, both_are_given_back, layers
from tests.rank_processes import ranks

__all__ = ["both_are_given_back"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs here"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*upcast_vae.*:FutureWarning"),
]


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_families(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (helper, route):
        monkeypatch.setattr(module, "LINK_PART_BYTES", 4096)  # so that what is tiny goes both ways
    try:
        pipe: Any = build_tiny(name, dtype=torch.bfloat16).to(DEVICE)
    except ImportError as exc:
        pytest.skip(str(exc))
    expected = [run_tiny(pipe, name, seed=seed) for seed in range(2)]
    pipe.to("cpu")
    with layerstream.offload(pipe, vram_budget="min", device=DEVICE, links=KEEPER):
        for seed in (0, 1, 0):
            assert torch.equal(run_tiny(pipe, name, seed=seed), expected[seed])
    pipe.to(DEVICE)
    assert torch.equal(run_tiny(pipe, name, seed=1), expected[1])


@pytest.mark.parametrize("packing", ["off", "ahead"])
@pytest.mark.parametrize(("device", "carrier"), [(DEVICE, KEEPER), (KEEPER, DEVICE)])
def test_either_way_round(device: str, carrier: str, packing: str) -> None:
    model = layers()
    x = torch.randn(512, 4096, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        expected = twin(model).to(device)(x)
        before = describe(model)
        with layerstream.offload(model, vram_budget="min", device=device, links=carrier, packing=packing) as streamer:
            for _ in range(30):
                assert torch.equal(model(x), expected)
            (one,) = streamer._streamer.homes._helpers  # type: ignore[union-attr]
            assert one.name == carrier
            loaded = streamer.stats().loaded_bytes
            assert 0.1 * loaded < one.carried_bytes < 0.6 * loaded, "a block is two parts, of 16 MiB and what is left"
        assert_restored(model, before)


# ---- what a rank does

here: dict[str, Any] = {}


def enter(device: str) -> int:
    torch.cuda.set_device(device)
    here["model"], here["device"] = layers(), device
    here["x"] = torch.randn(512, 4096, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        here["expected"] = twin(here["model"]).to(device)(here["x"])
    here["copy"] = twin(here["model"])
    here["streaming"] = layerstream.offload(here["model"], vram_budget="min", device=device, shared_as="layers").start()
    return sum(isinstance(u.home, SharedHome) for u in here["streaming"]._streamer._units.values())


def call() -> None:
    with torch.no_grad():
        for _ in range(10):
            assert torch.equal(here["model"](here["x"]), here["expected"])


def edit_and_call() -> None:
    with torch.no_grad():
        for each in (here["model"], here["copy"]):
            each.blocks[3].weight.mul_(2)
        assert torch.equal(here["model"](here["x"]), twin(here["copy"]).to(here["device"])(here["x"]))


def leave() -> None:
    """What is handed back has the same values, or those that the rank gave it."""
    here["streaming"].close()
    for mine, theirs in zip(here["model"].parameters(), here["copy"].parameters(), strict=True):
        assert mine.device.type == "cpu"
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("devices", [(DEVICE, KEEPER), (DEVICE, DEVICE)])
def test_two_processes_share_one_copy(devices: tuple[str, str]) -> None:
    with ranks(2) as group:
        for rank, device in zip(group, devices, strict=True):
            rank.start(enter, device)
        assert [rank.result() for rank in group] == [12, 12]
        for rank in group:
            rank.start(call)
        for rank in group:
            rank.result()
        group[1].do(edit_and_call)
        group[0].do(call)
        group[0].do(leave)
        group[1].do(leave)


def test_a_process_that_is_killed_leaves_the_other_running() -> None:
    with ranks(2) as group:
        for rank, device in zip(group, (DEVICE, KEEPER), strict=True):
            assert rank.do(enter, device) == 12
        group.pop(0).end()
        group[0].do(call)
        group[0].do(leave)
