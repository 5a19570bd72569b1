"""One tiny pipeline of each family: resident, streamed, stopped in mid-step, streamed again, resident again.

`make gpu-test ARGS="-n 8"` shares the tests out over processes (92 s on an H100).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.host import page_locks
from layerstream.standins import TINY_PIPELINES, build_tiny, run_tiny
from tests.fakes import assert_restored, describe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*upcast_vae.*:FutureWarning"),
]

# Some models of diffusers keep tables that their forwards made in an lru_cache of the class.
TABLES_BYTES = 2**20


class StopError(Exception):
    """What interrupts a call in the middle of a step."""


@pytest.fixture(autouse=True)
def memory_comes_back() -> Iterator[None]:
    gc.collect()
    before = torch.cuda.memory_allocated()
    yield
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()  # cuBLAS keeps one per stream once it is used
    assert torch.cuda.memory_allocated() <= before + TABLES_BYTES
    assert not len(page_locks._REAL)


@contextmanager
def watched(modules: list[nn.Module], see: Callable[[nn.Module], None]) -> Iterator[None]:
    """Call `see` before each forward of a module that has weights of its own."""
    own = [m for part in modules for m in part.modules() if m._parameters]
    handles = [m.register_forward_pre_hook(lambda module, args: see(module)) for m in own]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("budget", ["min", "auto"])
@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_family(name: str, budget: str) -> None:
    try:
        pipe: Any = build_tiny(name, dtype=torch.bfloat16)
    except ImportError as exc:
        pytest.skip(str(exc))
    modules = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    num_calls = 0

    def count(module: nn.Module) -> None:
        nonlocal num_calls
        num_calls += 1

    pipe.to("cuda")
    with watched(modules, count):
        expected = run_tiny(pipe, name)
    pipe.to("cpu")
    before = [describe(m) for m in modules]
    left = num_calls // 2  # the middle of all is inside the denoiser

    def stop(module: nn.Module) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise StopError

    with layerstream.offload(pipe, vram_budget=budget) as streamer:
        assert pipe.device.type == "cuda"
        assert pipe._execution_device.type == "cuda"
        assert torch.equal(run_tiny(pipe, name), expected)
        with watched(modules, stop), pytest.raises(StopError):
            run_tiny(pipe, name)
        assert torch.equal(run_tiny(pipe, name), expected)
        assert torch.equal(run_tiny(pipe, name), expected)
        if budget == "min":
            assert streamer.stats().num_streamed_blocks > 0
    for module, was in zip(modules, before, strict=True):
        assert_restored(module, was)
    pipe.to("cuda")
    assert torch.equal(run_tiny(pipe, name), expected)
    pipe.to("cpu")
