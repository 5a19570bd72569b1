"""`torch.compile` before and during streaming: equal outputs, counted graphs, and back to the whole afterwards."""

from __future__ import annotations

import copy
import functools
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


# ---- functions around blocks that were compiled


class Sampling(Model):
    def sample(self, x: torch.Tensor) -> torch.Tensor:
        return Model.forward(self, x)


def one_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="eager")


class CompiledInInit(Sampling):
    def __init__(self) -> None:
        super().__init__()
        self.sample = one_graph(self.sample)  # type: ignore[method-assign]


class KeepsAFunction(Sampling):
    def __init__(self) -> None:
        super().__init__()
        self.step = one_graph(Sampling.sample)

    def sample(self, x: torch.Tensor) -> torch.Tensor:
        return self.step(self, x)


@pytest.mark.parametrize(("cls", "name"), [(CompiledInInit, "sample"), (KeepsAFunction, "step")])
def test_functions_that_an_object_had_compiled_run_as_written(cls: type[Sampling], name: str) -> None:
    torch.manual_seed(0)
    model = cls()
    with torch.no_grad():
        expected, before, own = model.sample(torch.ones(2, 4)), describe(model), vars(model)[name]
        with (
            pytest.warns(layerstream.LayerstreamWarning, match=f"`{name}` of .* were given to torch.compile"),
            layerstream.offload(model, vram_budget="min", device=adversary()) as streamer,
        ):
            for _ in range(2):
                assert torch.equal(model.sample(torch.ones(2, 4)), expected)
            assert streamer.stats().num_loads
            assert vars(copy.copy(model))[name] is own
            assert vars(copy.deepcopy(model))[name] is own
        assert vars(model)[name] is own
        assert_restored(model, before)
        assert torch.equal(model.sample(torch.ones(2, 4)), expected)


class Bound:
    """A descriptor of somebody's own; what it compiled cannot be told from what it does with that."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = one_graph(function)

    def __get__(self, owner: Any, cls: type | None = None) -> Callable[..., Any]:
        return functools.partial(self.function, owner)


class Called:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = one_graph(function)

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class InADescriptor(Sampling):
    sample = Bound(Sampling.sample)  # type: ignore[assignment]


class InAPartialMethod(Sampling):
    sample = functools.partialmethod(one_graph(Sampling.sample))  # type: ignore[assignment]


class InAnObject(Sampling):
    def __init__(self) -> None:
        super().__init__()
        self.sample = Called(self.sample)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("cls", "kind"), [(InADescriptor, "Bound"), (InAPartialMethod, "partialmethod"), (InAnObject, "Called")]
)
def test_what_holds_a_compiled_function_is_named_where_it_does_not_run(cls: type[Sampling], kind: str) -> None:
    model = cls()
    with torch.no_grad():
        expected, before = Sampling.sample(model, torch.ones(2, 4)), describe(model)
        with layerstream.offload(model, vram_budget="min", device=adversary()):
            with pytest.raises(layerstream.CompiledWholeError) as error:
                model.sample(torch.ones(2, 4))
            assert torch.equal(model(torch.ones(2, 4)), expected)
        assert_restored(model, before)
    assert str(error.value) == (
        f"`sample` of `{cls.__name__}` ({kind}) holds a function that was given to torch.compile with fullgraph=True, "
        "and does not run in one graph while blocks stream. Compile the blocks instead (`block.compile()` on each), "
        f"drop fullgraph=True, or leave `{cls.__name__}` out of what is given to offload()."
    )
    assert error.value.__cause__ is not None


def test_what_was_kept_from_the_compiler_is_left_alone() -> None:
    class Disabled(Sampling):
        sample = torch.compiler.disable(Sampling.sample)  # type: ignore[assignment]

    model = Disabled()
    with torch.no_grad():
        expected = model.sample(torch.ones(2, 4))
        with layerstream.offload(model, vram_budget="min", device=adversary()):
            assert "sample" not in vars(model)
            assert torch.equal(model.sample(torch.ones(2, 4)), expected)
