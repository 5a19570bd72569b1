"""`torch.compile` before and during streaming: equal outputs, counted graphs, and back to the whole afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from tests.fakes import adversary, assert_equal, assert_restored, describe

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.scale = nn.Parameter(torch.rand(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x))) * self.scale


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 16)
        self.blocks = nn.ModuleList(Plain() for _ in range(5))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.to(self.blocks[0].up.weight.dtype))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Counter:
    """A backend that compiles nothing and counts the graphs it was given."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def __call__(self, module: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(len(module.graph.nodes))
        return module.forward


def make() -> tuple[Model, list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(0)
    model = Model().eval()
    inputs = [torch.randn(2, 4) for _ in range(3)]
    with torch.no_grad():
        return model, inputs, [model(x) for x in inputs]


def outputs(model: nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(x) for x in inputs]


@pytest.mark.parametrize("share", ["all", "some"])
@pytest.mark.parametrize("when", ["before and run", "before", "during"])
@pytest.mark.parametrize("is_fullgraph", [False, True])
def test_blocks_compiled_one_by_one(share: str, when: str, is_fullgraph: bool) -> None:
    model, inputs, expected = make()
    counter = Counter()

    def compile_blocks() -> None:
        for block in model.blocks:
            block.compile(backend=counter, fullgraph=is_fullgraph)

    if when != "during":
        compile_blocks()
    if when == "before and run":
        assert_equal(outputs(model, inputs), expected)
        assert len(counter.graphs) == 1
    device = adversary()
    budget: int | str = "min" if share == "all" else 18_000
    with layerstream.offload(model, vram_budget=budget, device=device) as streamer:
        if when == "during":
            compile_blocks()
        before = streamer.stats().num_loads
        assert_equal(outputs(model, inputs), expected)
        assert_equal(outputs(model, inputs), expected)
        assert streamer.stats().num_loads > before
        assert (streamer.stats().num_resident_blocks > 0) is (share == "some")
        assert streamer.stats().num_streamed_blocks > 0
    assert_equal(outputs(model, inputs), expected)
    assert len(counter.graphs) == 1  # one for all blocks, before, during and after


@pytest.mark.parametrize("form", ["method", "function"])
def test_whole_compiled_before(form: str) -> None:
    model, inputs, expected = make()
    counter = Counter()
    whole: nn.Module = model
    if form == "method":
        model.compile(backend=counter)
    else:
        whole = torch.compile(model, backend=counter)
    assert_equal(outputs(whole, inputs), expected)
    assert len(counter.graphs) == 1
    before = describe(model)
    with pytest.warns(layerstream.LayerstreamWarning, match="compiled as a whole.*one by one") as said:
        streamer = layerstream.offload({"net": whole}, vram_budget="min", device=adversary()).start()
    assert len(said) == 1
    loads = streamer.stats().num_loads
    assert_equal(outputs(whole, inputs), expected)
    assert_equal(outputs(whole, inputs), expected)
    assert streamer.stats().num_loads >= loads + 5 * 5
    during = len(counter.graphs)
    assert 2 <= during <= 4
    streamer.close()
    assert_restored(model, before)
    assert_equal(outputs(whole, inputs), expected)
    assert len(counter.graphs) <= during + 1


def test_whole_compiled_during() -> None:
    model, inputs, expected = make()
    counter = Counter()
    with layerstream.offload(model, vram_budget="min", device=adversary()) as streamer:
        whole = torch.compile(model, backend=counter)
        assert_equal(outputs(whole, inputs), expected)
        loads = streamer.stats().num_loads
        assert_equal(outputs(whole, inputs), expected)
        assert streamer.stats().num_loads == loads + 3 * 5
        assert counter.graphs
    assert_equal(outputs(whole, inputs), expected)
    again = Counter()
    assert_equal(outputs(torch.compile(model, backend=again), inputs), expected)
    assert len(again.graphs) == 1  # as a whole


@pytest.mark.parametrize("form", ["method", "function"])
def test_fullgraph_on_the_whole_is_refused(form: str) -> None:
    model, inputs, expected = make()
    whole: nn.Module = model
    if form == "method":
        model.compile(backend="eager", fullgraph=True)
    else:
        whole = torch.compile(model, backend="eager", fullgraph=True)
    before = describe(model)
    device = adversary()
    with pytest.raises(layerstream.CompiledWholeError, match="`net` is compiled as a whole by .*fullgraph=True"):
        layerstream.offload({"net": whole}, vram_budget="min", device=device).start()
    assert_restored(model, before)
    assert not device.operations
    assert_equal(outputs(whole, inputs), expected)


def test_fullgraph_on_the_whole_during() -> None:
    model, inputs, expected = make()
    with layerstream.offload({"net": model}, vram_budget="min", device=adversary()):
        whole = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(layerstream.CompiledWholeError, match="`net` is compiled as a whole"):
            outputs(whole, inputs)
        assert_equal(outputs(model, inputs), expected)


def test_a_function_around_the_model() -> None:
    model, inputs, expected = make()
    counter = Counter()
    compiled = torch.compile(lambda x: model(x) * 2, backend=counter)
    assert_equal(outputs(compiled, inputs), [e * 2 for e in expected])
    with layerstream.offload(model, vram_budget="min", device=adversary()) as streamer:
        for _ in range(2):
            assert_equal(outputs(compiled, inputs), [e * 2 for e in expected])
        assert streamer.stats().num_loads >= 6 * 5
    assert_equal(outputs(compiled, inputs), [e * 2 for e in expected])


def test_five_cycles_do_not_compile_again() -> None:
    model, inputs, expected = make()
    counter = Counter()
    for block in model.blocks:
        block.compile(backend=counter)
    for _ in range(5):
        with layerstream.offload(model, vram_budget="min", device=adversary()):
            assert_equal(outputs(model, inputs), expected)
    assert len(counter.graphs) == 1


def test_repeated_blocks_of_a_diffusers_model() -> None:
    from layerstream.standins import build_tiny, run_tiny

    pipe = build_tiny("flux")
    expected = run_tiny(pipe, "flux")
    counter = Counter()
    pipe.transformer.compile_repeated_blocks(backend=counter)
    assert torch.equal(run_tiny(pipe, "flux"), expected)
    graphs = len(counter.graphs)
    with layerstream.offload(pipe, vram_budget="min", device=adversary()):
        assert torch.equal(run_tiny(pipe, "flux"), expected)
        assert torch.equal(run_tiny(pipe, "flux"), expected)
    assert torch.equal(run_tiny(pipe, "flux"), expected)
    assert len(counter.graphs) == graphs
