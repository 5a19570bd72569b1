"""Units in another GPU's memory, on two real GPUs: each pipeline compared with the resident one, call after call."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import layerstream
from layerstream import codec
from layerstream.device.cuda import CudaDevice
from layerstream.engine import packing
from layerstream.errors import ArgumentError, StoreError
from layerstream.standins import TINY_PIPELINES, build_tiny, run_tiny
from tests.fakes import assert_restored, describe, twin
from tests.gpu.test_gpu_packing import BFloat16Pipe, wide
from tests.test_pairing import pairs_at_once

__all__ = ["pairs_at_once"]  # a fixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs here"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*upcast_vae.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*cannot be reached from"),
    pytest.mark.filterwarnings("ignore:.*are not in the memory of"),  # what is tied
]
DEVICE, KEEPER = "cuda:0", "cuda:1"
GIB = 2**30


@pytest.fixture(autouse=True)
def both_are_given_back() -> Iterator[None]:
    yield
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # of what was computed there
    for index in range(2):
        torch.cuda.synchronize(index)  # emptying caches waits for the current GPU only
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated(KEEPER) <= 2**24  # what a test has computed there
    assert torch.cuda.get_per_process_memory_fraction(KEEPER) == 1.0


@pytest.fixture(params=[True, False], ids=["peers", "apart"])
def reach(request: Any) -> Iterator[None]:
    """The two GPUs reach each other, or do not."""
    if request.param:
        yield
        return
    with mock.patch.object(CudaDevice, "reaches", return_value=False):
        yield


@pytest.mark.usefixtures("reach")
@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_families(name: str) -> None:
    try:
        pipe: Any = build_tiny(name, dtype=torch.bfloat16).to(DEVICE)
    except ImportError as exc:
        pytest.skip(str(exc))
    expected = [run_tiny(pipe, name, seed=seed) for seed in range(2)]
    pipe.to("cpu")
    with layerstream.offload(pipe, vram_budget="min", device=DEVICE, store=KEEPER) as streamer:
        for seed in (0, 1, 0):
            assert torch.equal(run_tiny(pipe, name, seed=seed), expected[seed])
        assert streamer.stats().num_stored_units > 0
    pipe.to(DEVICE)
    assert torch.equal(run_tiny(pipe, name, seed=1), expected[1])


@pytest.mark.usefixtures("pairs_at_once", "reach")
@pytest.mark.parametrize("budget", ["min", "auto"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_calls_edits_and_pauses(budget: str, is_packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LEAST_BYTES", 1)
    monkeypatch.setattr(codec, "LEAST_GAIN", -1.0)
    model = wide()
    resident, pipe = BFloat16Pipe(twin(model).to(DEVICE), DEVICE), BFloat16Pipe(model, DEVICE)
    options: dict[str, Any] = {"packing": "ahead" if is_packed else "off", "pairing": "auto"}
    with layerstream.offload(pipe, vram_budget=budget, device=DEVICE, store=KEEPER, **options) as streamer:
        for number in range(3):
            for seed in range(3):
                assert torch.equal(pipe(seed), resident(seed))
            assert streamer.stats().num_stored_units > 0
            pickle.dumps(model)
            for each in (model, resident.model):
                with torch.no_grad():
                    next(each.parameters()).mul_(1.5)
            assert torch.equal(pipe(7), resident(7))
            with streamer.paused():
                for each in (model, resident.model):
                    list(each.parameters())[-1].data[number] = 0.25
    for name, value in resident.model.state_dict().items():
        assert torch.equal(model.state_dict()[name].cpu(), value.cpu()), name


class Layers(nn.Module):
    """A stack of large linear layers."""

    def __init__(self, num_blocks: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(num_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.nn.functional.rms_norm(block(x), x.shape[-1:])
        return x


def layers() -> Layers:
    torch.manual_seed(0)
    return Layers(12, 4096).to(torch.bfloat16)


@pytest.mark.usefixtures("reach")
@pytest.mark.parametrize(("device", "keeper"), [(DEVICE, KEEPER), (KEEPER, DEVICE)])
def test_either_way_round(device: str, keeper: str) -> None:
    """Also where the GPU that computes is not the current one."""
    model = layers()
    x = torch.randn(512, 4096, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        expected = twin(model).to(device)(x)
        before = describe(model)
        allocated = torch.cuda.memory_allocated(keeper)
        with layerstream.offload(model, vram_budget="min", device=device, store=keeper) as streamer:
            for _ in range(8):
                assert torch.equal(model(x), expected)
            assert torch.cuda.memory_allocated(keeper) - allocated >= 12 * 4096 * 4096 * 2
            assert streamer.stats().pinned_bytes == 0
            assert keeper in str(streamer.report())
        assert_restored(model, before)
        assert torch.cuda.memory_allocated(keeper) == allocated
    del expected, x


def test_its_budget_is_held() -> None:
    model = layers()
    x = torch.randn(64, 4096, dtype=torch.bfloat16, device=DEVICE)
    with torch.no_grad():
        expected = twin(model).to(DEVICE)(x)
        store: Any = [KEEPER, "cpu"]
        with layerstream.offload(
            model, vram_budget="min", device=DEVICE, store=store, store_budget="200MiB"
        ) as streamer:
            for _ in range(4):
                assert torch.equal(model(x), expected)
            assert 0 < torch.cuda.memory_reserved(KEEPER) <= 200 * 2**20
            assert streamer.stats().pinned_bytes > 0
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(GIB, dtype=torch.uint8, device=KEEPER)
        before = describe(model)
        with (
            pytest.raises(StoreError, match=f"do not fit in the memory of {KEEPER}"),
            layerstream.offload(model, vram_budget="min", device=DEVICE, store=KEEPER, store_budget="200MiB"),
        ):
            pass
        assert_restored(model, before)
        with (
            pytest.raises(ArgumentError, match="is the GPU that the pipeline runs on"),
            layerstream.offload(model, vram_budget="min", device=DEVICE, store=0),
        ):
            pass


def test_weights_that_were_found_on_a_gpu_are_stored_and_handed_back_there() -> None:
    model = layers().to(DEVICE)
    x = torch.randn(64, 4096, dtype=torch.bfloat16, device=DEVICE)
    with torch.no_grad():
        expected = model(x)
        with layerstream.offload(model, vram_budget="min", device=DEVICE, store=KEEPER) as streamer:
            for _ in range(3):
                assert torch.equal(model(x), expected)
            assert streamer.stats().num_stored_units == 12
        assert {p.device for p in model.parameters()} == {torch.device(DEVICE)}
        assert torch.equal(model(x), expected)


def test_the_links_are_measured() -> None:
    model = layers()
    x = torch.randn(64, 4096, dtype=torch.bfloat16, device=DEVICE)
    store: Any = [KEEPER, "cpu"]
    with (
        torch.no_grad(),
        layerstream.offload(model, vram_budget="min", device=DEVICE, store=store, store_budget="200MiB") as streamer,
    ):
        for _ in range(3):
            model(x)
        links = streamer._streamer.links  # type: ignore[union-attr]
    assert set(links) == {"", KEEPER}
    if torch.cuda.can_device_access_peer(0, 1):
        assert links[KEEPER] > links[""] / 2
