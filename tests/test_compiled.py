"""torch.compile and hooks: every way to compile, before and after the hooks come, on all torch versions.

A toy transformer is streamed the way the engine does it: before a block runs its parameters are bound to a slot's
memory under their plain class, afterwards they are `absent` (another class over a stride-0 NaN). A block that ran
without its hooks therefore raises or gives NaN. The backend counts graphs compiled and graphs run, so a call that
silently went without the compiler fails as well.
"""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

from layerstream.errors import CompiledWholeError, LayerstreamError
from layerstream.hooks import compiled, eager
from layerstream.hooks.compiled import (
    compile_safe,
    describe_compiled,
    exchange_for_block_compile,
    refuse_fullgraph,
    uncompiled,
)
from layerstream.hooks.dynamo_caches import drop_dynamo_caches
from layerstream.hooks.eager import keep_eager_around

_NUM_BLOCKS = 3
_WIDTH = 8
_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


class CountingBackend:
    """The "eager" backend of torch.compile that counts what it compiled and how often that ran."""

    def __init__(self) -> None:
        self.num_graphs = 0
        self.num_runs = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., Any]:
        self.num_graphs += 1

        def run(*args: object) -> Any:
            self.num_runs += 1
            return graph.forward(*args)

        return run

    @contextmanager
    def expect(self, *, graphs: int, runs: int) -> Iterator[None]:
        """Fail unless the body compiles and runs exactly so many graphs."""
        before = (self.num_graphs, self.num_runs)
        yield
        assert (self.num_graphs - before[0], self.num_runs - before[1]) == (graphs, runs)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.linear(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        self.ff = FeedForward()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ff(self.norm(x))


class Transformer(nn.Module):
    """Embedding, equal blocks in a loop, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(_WIDTH, _WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(_NUM_BLOCKS))
        self.head = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Unrolled(Transformer):
    """The same without a loop: dynamo can cut it at each block and compile the pieces in between."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](self.embed(x)) * 1.0
        x = self.blocks[1](x) * 1.0
        return self.head(self.blocks[2](x))


class Broken(Transformer):
    """The same with a graph break of the user's own, so that the blocks lie in the part after it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        torch._dynamo.graph_break()
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Reading(Transformer):
    """The same, and it looks at weights of its blocks from outside, as `hidden.to(self.proj.weight.dtype)` does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).to(self.blocks[0].ff.linear.weight.dtype)
        for block in self.blocks:
            x = block(x.to(block.norm.weight.dtype))
        return self.head(x.to(next(self.blocks.parameters()).dtype))


class Encoder(nn.Module):
    """Blocks one level deeper, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Reading()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.stack.blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stack(x.to(self.blocks[0].norm.weight.dtype))


class Inherited(Reading):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class WithoutGrad(Transformer):
    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def scaled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator on a forward, as `diffusers.utils.apply_lora_scale`."""

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return wrapper


class DecoratedBlock(Block):
    @scaled
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ff(self.norm(x))


class AbsentParameter(nn.Parameter):
    """Answers what the engine's would answer without loading; all else would load, here it fails."""

    @classmethod
    @compile_safe
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.dtype.__get__:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        raise AssertionError(f"{func} read a weight that is not here")


class Streaming:
    """Hooks and slots on `blocks` of `root`, in the order the engine is to use the functions under test."""

    def __init__(
        self, root: nn.Module, blocks: Sequence[nn.Module], *, exchange: bool = False, keep_eager: bool = False
    ) -> None:
        self.root, self.blocks, self.exchange, self.keep_eager = root, list(blocks), exchange, keep_eager
        self.num_acquired = self.num_released = self.num_calls = 0
        self._master = {p: p.data for block in blocks for p in block.parameters()}
        self._slots = [torch.empty(4096, dtype=torch.uint8) for _ in range(2)]
        self._handles: list[Any] = []
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Streaming:
        root = uncompiled(self.root)
        if self.exchange:
            self._undo.append(exchange_for_block_compile(self.root, self.blocks))
        if self.keep_eager:
            self._undo.append(keep_eager_around(self.root, self.blocks))
        acquire, release = compile_safe(self._acquire), compile_safe(self._release)
        for block in map(uncompiled, self.blocks):
            self._set_absent(block)
            self._handles.append(block.register_forward_pre_hook(acquire, prepend=True))
            self._handles.append(block.register_forward_hook(release, prepend=True, always_call=True))
        self._handles.append(root.register_forward_pre_hook(compile_safe(self._count), prepend=True))
        drop_dynamo_caches([root, *self.blocks])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter, data in self._master.items():
            parameter.__class__ = nn.Parameter
            parameter.data = data
        drop_dynamo_caches([self.root, *self.blocks])
        for undo in reversed(self._undo):
            undo()

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.num_acquired, self.num_released, self.num_calls

    def _count(self, module: nn.Module, args: object) -> None:
        self.num_calls += 1
        if not self.keep_eager:
            refuse_fullgraph(self.root, "transformer")

    def _acquire(self, block: nn.Module, args: object) -> None:
        slot, offset = self._slots[self.num_acquired % len(self._slots)], 0
        self.num_acquired += 1
        for parameter in block.parameters():
            master = self._master[parameter]
            num_bytes = master.numel() * master.element_size()
            view = slot[offset : offset + num_bytes].view(master.dtype).view(master.shape)
            view.copy_(master)
            parameter.__class__ = nn.Parameter
            parameter.data = view
            offset += -(-num_bytes // 256) * 256

    def _release(self, block: nn.Module, args: object, output: object) -> None:
        self.num_released += 1
        self._set_absent(block)

    def _set_absent(self, block: nn.Module) -> None:
        for parameter in block.parameters():
            parameter.data = torch.full((), float("nan")).expand(parameter.shape)
            parameter.__class__ = AbsentParameter


@pytest.fixture(autouse=True, scope="module")
def nothing_old_to_collect() -> Iterator[None]:
    """A collection after each test (see conftest.py) would walk all of torch and sympy, 0.2 s each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def clean_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()
    assert not eager._held


@pytest.fixture
def backend() -> CountingBackend:
    return CountingBackend()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, _WIDTH, generator=torch.Generator().manual_seed(1))


def make(kind: type[nn.Module] = Transformer) -> Any:
    torch.manual_seed(0)
    return kind().eval()


def compile_method(model: Any, **options: Any) -> Any:
    model.compile(**options)
    return model


def compile_module(model: Any, **options: Any) -> Any:
    return torch.compile(model, **options)


def compile_forward(model: Any, **options: Any) -> Any:
    model.forward = torch.compile(model.forward, **options)
    return model


def compile_function(model: Any, **options: Any) -> Any:
    return torch.compile(lambda x: model(x), **options)


def compile_outer(model: Any, **options: Any) -> Any:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.transformer(x)

    outer = Outer()
    outer.compile(**options)
    return outer


def compile_blocks(model: Any, **options: Any) -> Any:
    for block in model.blocks:
        block.compile(**options)
    return model


WHOLE = [compile_method, compile_module, compile_forward]
AROUND = [*WHOLE, compile_function, compile_outer]
ALL, HALF, ONE = slice(None), slice(None, None, 2), slice(2, 3)

# Not the full product: a case takes a second.
CASES = [
    *((compile_it, HALF, Transformer) for compile_it in AROUND),
    (compile_method, ONE, Transformer),
    (compile_module, ALL, Unrolled),
]


# --- what is compiled ---------------------------------------------------------------------------------------------


def test_uncompiled_finds_the_module_inside() -> None:
    model = make()
    assert uncompiled(model) is model
    assert uncompiled(torch.compile(model, backend="eager")) is model
    assert uncompiled(torch.compiler.disable(model)) is model
    model.compile(backend="eager")
    assert uncompiled(model) is model


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize(
    ("compile_it", "form"),
    [
        (compile_method, "component.compile()"),
        (compile_module, "torch.compile(component)"),
        (compile_forward, "component.forward = torch.compile(component.forward)"),
    ],
)
def test_describe_compiled(compile_it: Callable[..., Any], form: str, fullgraph: bool) -> None:
    whole = describe_compiled(compile_it(make(), backend="eager", fullgraph=fullgraph))
    assert whole is not None
    assert (whole.form, whole.is_fullgraph, whole.has_cuda_graphs) == (form, fullgraph, False)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_describe_compiled_in_the_class(fullgraph: bool, x: torch.Tensor, backend: CountingBackend) -> None:
    class Decorated(Transformer):
        forward = torch.compile(Transformer.forward, backend=backend, fullgraph=fullgraph)

    model = make(Decorated)
    whole = describe_compiled(model)
    assert whole is not None
    assert whole.is_fullgraph == fullgraph
    expected = make()(x)
    with backend.expect(graphs=1, runs=_NUM_BLOCKS):
        undo = exchange_for_block_compile(model, model.blocks)
        assert torch.equal(model(x), expected)
    undo()
    assert "forward" not in vars(model)
    with backend.expect(graphs=1, runs=1):
        assert torch.equal(model(x), expected)


def test_what_is_not_compiled_as_a_whole() -> None:
    assert describe_compiled(make()) is None
    assert describe_compiled(compile_blocks(make(), backend="eager")) is None
    assert describe_compiled(torch.compiler.disable(make())) is None
    assert describe_compiled(torch.compile(make(), disable=True)) is None
    assert describe_compiled(compile_method(make(), disable=True)) is None

    # accelerate copies the attributes of a compiled forward to its own function; that one is not compiled.
    model = make()
    model.forward = functools.wraps(torch.compile(model.forward, backend="eager"))(lambda x: x)
    assert describe_compiled(model) is None


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is:DeprecationWarning"
)  # torch importing its own inductor
def test_cuda_graphs_are_seen() -> None:
    assert describe_compiled(compile_method(make(), mode="reduce-overhead")).has_cuda_graphs  # type: ignore[union-attr]
    assert describe_compiled(compile_module(make(), backend="cudagraphs")).has_cuda_graphs  # type: ignore[union-attr]
    assert not describe_compiled(compile_method(make(), mode="default")).has_cuda_graphs  # type: ignore[union-attr]


def test_dynamo_is_not_imported_to_find_that_nothing_is_compiled() -> None:
    program = """
import sys
from torch import nn
from layerstream.hooks import compiled as c
from layerstream.hooks.dynamo_caches import drop_dynamo_caches
m = nn.Linear(2, 2)
assert c.uncompiled(m) is m and c.describe_compiled(m) is None and drop_dynamo_caches([m]) == 0
c.refuse_fullgraph(m, "m"); c.exchange_for_block_compile(m, [])()
assert "torch._dynamo" not in sys.modules
c.compile_safe(print)
assert "torch._dynamo" in sys.modules  # the check above can fail
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# --- streamed and compiled ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("some", [ALL, HALF, ONE])
@pytest.mark.parametrize("is_compiled_first", [True, False])
def test_blocks_compiled_by_themselves(
    is_compiled_first: bool, some: slice, fullgraph: bool, x: torch.Tensor, backend: CountingBackend
) -> None:
    """One graph for all equal blocks, hooked or not; none compiled again over passes, entries and exits."""
    model = make()
    expected = model(x)
    blocks = model.blocks[some]
    if is_compiled_first:
        compile_blocks(model, backend=backend, fullgraph=fullgraph)
        with backend.expect(graphs=1, runs=_NUM_BLOCKS):
            model(x)
    for attempt in range(2):
        with Streaming(model, blocks) as streaming:
            if not is_compiled_first and not attempt:
                compile_blocks(model, backend=backend, fullgraph=fullgraph)
            with backend.expect(graphs=0 if is_compiled_first or attempt else 1, runs=3 * _NUM_BLOCKS):
                for _ in range(3):
                    assert torch.equal(model(x), expected)
            assert streaming.counts == (3 * len(blocks), 3 * len(blocks), 3)
        with backend.expect(graphs=0, runs=_NUM_BLOCKS):
            assert torch.equal(model(x), expected)
        assert streaming.counts == (3 * len(blocks), 3 * len(blocks), 3)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_blocks_wrapped_one_by_one(x: torch.Tensor, backend: CountingBackend) -> None:
    model = make()
    expected = model(x)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend=backend)
    with Streaming(model, model.blocks) as streaming, backend.expect(graphs=1, runs=3 * _NUM_BLOCKS):
        for _ in range(3):
            assert torch.equal(model(x), expected)
    assert streaming.counts == (3 * _NUM_BLOCKS, 3 * _NUM_BLOCKS, 3)


def test_decorated_blocks_are_not_compiled_again(x: torch.Tensor, backend: CountingBackend) -> None:
    model = make()
    model.blocks = nn.ModuleList(DecoratedBlock() for _ in range(_NUM_BLOCKS))
    expected = model(x)
    compile_blocks(model, backend=backend)
    with backend.expect(graphs=1, runs=3 * _NUM_BLOCKS):
        for _ in range(3):
            with Streaming(model, model.blocks):
                assert torch.equal(model(x), expected)


def test_compile_repeated_blocks(x: torch.Tensor, backend: CountingBackend) -> None:
    diffusers = pytest.importorskip("diffusers")

    class Model(diffusers.ModelMixin, diffusers.ConfigMixin):  # type: ignore[misc, name-defined]
        _repeated_blocks = ("Block",)
        forward = Transformer.forward

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, _WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(_NUM_BLOCKS))

    model = make(Model)
    if not hasattr(model, "compile_repeated_blocks"):
        pytest.skip("diffusers is too old")
    expected = model(x)
    model.compile_repeated_blocks(backend=backend, fullgraph=True)
    with backend.expect(graphs=1, runs=4 * _NUM_BLOCKS):
        assert torch.equal(model(x), expected)
        with Streaming(model, model.blocks) as streaming:
            assert torch.equal(model(x), expected)
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert streaming.counts == (2 * _NUM_BLOCKS, 2 * _NUM_BLOCKS, 2)


@pytest.mark.parametrize(("compile_it", "some", "kind"), [*CASES, (compile_outer, ALL, Broken)])
def test_compiled_around_the_blocks_first(
    compile_it: Callable[..., Any], some: slice, kind: type[nn.Module], x: torch.Tensor, backend: CountingBackend
) -> None:
    """Compiled with the blocks inlined, then hooked: every hook runs. Afterwards none does, and all is one graph."""
    model = make(kind)
    expected = model(x)
    call = compile_it(model, backend=backend)
    pieces = 2 if kind is Broken else 1
    with backend.expect(graphs=pieces, runs=2 * pieces):
        for _ in range(2):
            assert torch.equal(call(x), expected)
    for _ in range(2):
        blocks = model.blocks[some]
        with Streaming(model, blocks) as streaming:
            for _ in range(3):
                assert torch.equal(call(x), expected)
            assert streaming.counts == (3 * len(blocks), 3 * len(blocks), 3)
        # Of `Broken`, the piece before the break holds no block, so its code may have been kept.
        kept = backend.num_graphs
        with backend.expect(graphs=1, runs=2 * pieces) if kind is not Broken else nullcontext():
            for _ in range(2):
                assert torch.equal(call(x), expected)
        assert 1 <= backend.num_graphs - kept <= pieces
        assert streaming.counts == (3 * len(blocks), 3 * len(blocks), 3)


@pytest.mark.parametrize(("compile_it", "some", "kind"), CASES)
def test_compiled_around_the_blocks_while_streaming(
    compile_it: Callable[..., Any], some: slice, kind: type[nn.Module], x: torch.Tensor, backend: CountingBackend
) -> None:
    """The component is cut at the hooks, blocks are compiled once for all, and on leaving it becomes one graph."""
    model = make(kind)
    expected = model(x)
    blocks = model.blocks[some]
    with Streaming(model, blocks) as streaming:
        call = compile_it(model, backend=backend)
        assert torch.equal(call(x), expected)
        with backend.expect(graphs=0, runs=backend.num_runs * 2):
            for _ in range(2):
                assert torch.equal(call(x), expected)
        assert streaming.counts == (3 * len(blocks), 3 * len(blocks), 3)
        if compile_it in WHOLE and kind is Transformer:
            assert (backend.num_graphs, backend.num_runs) == (1, 3 * _NUM_BLOCKS)
    with backend.expect(graphs=1, runs=2):
        for _ in range(2):
            assert torch.equal(call(x), expected)
    assert streaming.counts == (3 * len(blocks), 3 * len(blocks), 3)


# --- passed over --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compile_it", "fullgraph", "is_compiled_first", "kind"),
    [
        *((compile_it, True, True, Reading) for compile_it in WHOLE),
        *((compile_it, False, False, Reading) for compile_it in AROUND),
        (compile_outer, False, True, Reading),
        (compile_method, False, True, Encoder),
        (compile_module, True, False, Inherited),
        (compile_module, False, True, WithoutGrad),
    ],
)
def test_keep_eager_around(
    compile_it: Callable[..., Any],
    fullgraph: bool,
    is_compiled_first: bool,
    kind: type[nn.Module],
    x: torch.Tensor,
    backend: CountingBackend,
) -> None:
    """Blocks are compiled, nothing else is traced, and what was compiled for the whole is there again afterwards."""
    model = make(kind)
    expected = model(x)
    call = None
    if is_compiled_first:
        call = compile_it(model, backend=backend, fullgraph=fullgraph)
        with backend.expect(graphs=1, runs=1):
            assert torch.equal(call(x), expected)
    blocks = model.blocks[HALF]
    for attempt in range(2):
        with Streaming(model, blocks, keep_eager=True) as streaming:
            if call is None:
                call = compile_it(model, backend=backend, fullgraph=fullgraph)
            with backend.expect(graphs=1 - attempt, runs=3 * _NUM_BLOCKS):
                for _ in range(3):
                    assert torch.equal(call(x), expected)
            assert streaming.counts == (3 * len(blocks), 3 * len(blocks), 3)
        # A function around the component is not the component's, and 2.6 cannot pass over code and keep it.
        is_kept = compile_it in WHOLE and kind is not WithoutGrad and _TORCH >= (2, 7)
        with backend.expect(graphs=0 if is_kept and (is_compiled_first or attempt) else 1, runs=2):
            for _ in range(2):
                assert torch.equal(call(x), expected)
        assert streaming.counts == (3 * len(blocks), 3 * len(blocks), 3)


def test_tracing_around_absent_weights_is_what_it_avoids(x: torch.Tensor) -> None:
    """The fact behind it: dynamo reads far more of a weight than the code it traces does (here only a dtype)."""
    model = compile_method(make(Reading), backend="eager")
    streaming = Streaming(model, model.blocks)
    with streaming:
        if _TORCH < (2, 9):
            model(x)
        else:
            with pytest.raises(AssertionError, match="read a weight that is not here"):
                model(x)


def test_keep_eager_around_with_the_exchange(x: torch.Tensor, backend: CountingBackend) -> None:
    model = make(Reading)
    expected = model(x)
    call = compile_module(model, backend=backend)
    with backend.expect(graphs=1, runs=1):
        call(x)
    with Streaming(call, model.blocks, exchange=True, keep_eager=True), backend.expect(graphs=1, runs=_NUM_BLOCKS):
        assert torch.equal(call(x), expected)
    with backend.expect(graphs=0 if _TORCH >= (2, 7) else 1, runs=1):
        assert torch.equal(call(x), expected)


def test_keep_eager_around_is_shared_by_components_of_one_class(x: torch.Tensor, backend: CountingBackend) -> None:
    first, second = make(), make()
    for model in (first, second):
        model.compile(backend=backend)
    undo_first = keep_eager_around(first, first.blocks)
    undo_second = keep_eager_around(second, second.blocks)
    for undo in (undo_first, undo_first, lambda: None):  # twice is once
        with backend.expect(graphs=0 if backend.num_graphs else 1, runs=_NUM_BLOCKS):
            second(x)
        undo()
    undo_second()
    with backend.expect(graphs=1, runs=2):  # one code for both: they are equal modules to dynamo
        first(x), second(x)


def test_keep_eager_around_leaves_blocks_alone(x: torch.Tensor, backend: CountingBackend) -> None:
    class Recursive(nn.Module):
        def __init__(self, *inner: nn.Module) -> None:
            super().__init__()
            self.linear = nn.Linear(_WIDTH, _WIDTH)
            self.blocks = nn.ModuleList(inner)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.linear(x)
            for block in self.blocks:
                x = block(x)
            return x

    model = Recursive(Recursive(), Recursive())
    undo = keep_eager_around(model, model.blocks)
    compile_blocks(model, backend=backend)
    with backend.expect(graphs=1, runs=2):
        model(x)
    undo()
    keep_eager_around(model, [])()
    keep_eager_around(model, [model])()
    with backend.expect(graphs=0, runs=2):
        model(x)


# --- from the whole to its blocks, and back -----------------------------------------------------------------------


@pytest.mark.parametrize("some", [HALF])
@pytest.mark.parametrize("compile_it", WHOLE)
def test_exchange_while_streaming(
    compile_it: Callable[..., Any], some: slice, x: torch.Tensor, backend: CountingBackend
) -> None:
    model = make()
    expected = model(x)
    call = compile_it(model, backend=backend)
    with backend.expect(graphs=1, runs=1):
        assert torch.equal(call(x), expected)
    blocks = model.blocks[some]
    for attempt in range(2):
        with Streaming(call, blocks, exchange=True) as streaming:
            # Blocks that are not streamed are not compiled by themselves; the code of the others is found again.
            with backend.expect(graphs=1 - attempt, runs=3 * len(blocks)):
                for _ in range(3):
                    assert torch.equal(call(x), expected)
            assert streaming.counts == (3 * len(blocks), 3 * len(blocks), 3)
        with backend.expect(graphs=1, runs=2):
            for _ in range(2):
                assert torch.equal(call(x), expected)
        assert streaming.counts == (3 * len(blocks), 3 * len(blocks), 3)


@pytest.mark.parametrize("options", [{}, {"dynamic": False}, {"fullgraph": True}])
@pytest.mark.parametrize("compile_it", WHOLE)
def test_exchange_and_undo_compile_nothing_again(
    compile_it: Callable[..., Any], options: dict[str, Any], x: torch.Tensor, backend: CountingBackend
) -> None:
    model = make()
    expected = model(x)
    call = compile_it(model, backend=backend, **options)
    with backend.expect(graphs=1, runs=1):
        call(x)
    before = snapshot(call, model)
    undo = exchange_for_block_compile(call, model.blocks)
    assert snapshot(call, model) != before
    assert describe_compiled(call) is None
    for block in model.blocks:
        inherited = describe_compiled(block)
        assert inherited is not None
        assert inherited.is_fullgraph == options.get("fullgraph", False)
    with backend.expect(graphs=1, runs=2 * _NUM_BLOCKS):
        for _ in range(2):
            assert torch.equal(call(x), expected)
    for _ in range(2):  # a second undo does nothing
        undo()
        assert snapshot(call, model) == before
        with backend.expect(graphs=0, runs=1):
            assert torch.equal(call(x), expected)
    undo = exchange_for_block_compile(call, model.blocks)
    with backend.expect(graphs=0, runs=_NUM_BLOCKS):
        assert torch.equal(call(x), expected)
    undo()


def snapshot(call: nn.Module, model: nn.Module) -> list[dict[str, object]]:
    return [dict(vars(module)) for module in (call, model, *model.blocks)]  # type: ignore[union-attr]


def test_exchange_takes_both_when_compiled_twice(x: torch.Tensor, backend: CountingBackend) -> None:
    model = make()
    expected = model(x)
    call = torch.compile(compile_method(model, backend=backend), backend=backend)
    before = snapshot(call, model)
    undo = exchange_for_block_compile(call, model.blocks)
    with backend.expect(graphs=1, runs=_NUM_BLOCKS):
        assert torch.equal(call(x), expected)
    undo()
    assert snapshot(call, model) == before


def test_exchange_respects_what_is_compiled_already(x: torch.Tensor, backend: CountingBackend) -> None:
    model = compile_method(make(), backend=backend)
    own = CountingBackend()
    model.blocks[0].compile(backend=own)
    model.blocks[1] = torch.compile(model.blocks[1], backend=own)
    before = snapshot(model, model)
    undo = exchange_for_block_compile(model, model.blocks)
    with backend.expect(graphs=1, runs=_NUM_BLOCKS - 2), own.expect(graphs=1, runs=2):
        model(x)
    undo()
    assert snapshot(model, model) == before


def test_exchange_does_nothing_where_there_is_nothing_to_exchange() -> None:
    model = make()
    before = snapshot(model, model)
    exchange_for_block_compile(model, model.blocks)()
    assert snapshot(model, model) == before
    compile_method(model, backend="eager")
    before = snapshot(model, model)
    undo = exchange_for_block_compile(model, [model])  # streamed as one block: compiled per block already
    assert snapshot(model, model) == before
    undo()
    assert snapshot(model, model) == before


def test_exchange_leaves_what_the_user_compiled_in_between(x: torch.Tensor, backend: CountingBackend) -> None:
    model = compile_method(make(), backend="eager")
    undo = exchange_for_block_compile(model, model.blocks)
    model.compile(backend=backend)
    model.blocks[0].compile(backend=backend)
    theirs = model._compiled_call_impl, model.blocks[0]._compiled_call_impl
    undo()
    assert (model._compiled_call_impl, model.blocks[0]._compiled_call_impl) == theirs
    assert "_compiled_call_impl" not in vars(model.blocks[1])


@pytest.mark.parametrize("num_swaps", [0, 1, 3])
def test_exchange_restores_after_a_failure(num_swaps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compile_method(make(), backend="eager")
    before = snapshot(model, model)
    swap = compiled._Place.swap
    left = iter(range(num_swaps))

    def swap_until_interrupted(place: compiled._Place) -> Callable[[], None]:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return swap(place)

    monkeypatch.setattr(compiled._Place, "swap", swap_until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        exchange_for_block_compile(model, model.blocks)
    assert snapshot(model, model) == before


# --- dropping compiled code ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile_it", [compile_module, compile_function, compile_outer])
def test_hooks_are_noticed_only_after_dropping(
    compile_it: Callable[..., Any], x: torch.Tensor, backend: CountingBackend
) -> None:
    """The fact all of this is about, with hooks that leave the weights alone: first not seen, then not forgotten."""
    model = make()
    call = compile_it(model, backend=backend)
    call(x)
    num_calls = 0

    @compile_safe
    def count(module: nn.Module, args: object) -> None:
        nonlocal num_calls
        num_calls += 1

    handles = [block.register_forward_pre_hook(count) for block in model.blocks]
    call(x)
    assert num_calls == 0
    assert drop_dynamo_caches(model.blocks) == 1
    call(x)
    assert num_calls == _NUM_BLOCKS
    for handle in handles:
        handle.remove()
    drop_dynamo_caches(model.blocks)
    with backend.expect(graphs=1, runs=1):
        call(x)
    assert num_calls == _NUM_BLOCKS


def test_dropping_leaves_the_rest_alone(x: torch.Tensor, backend: CountingBackend) -> None:
    class OtherBlock(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - self.ff(self.norm(x))

    model, other = make(), make(Unrolled)
    other.blocks = nn.ModuleList(OtherBlock() for _ in range(_NUM_BLOCKS))
    function = torch.compile(lambda x, weight: nn.functional.silu(x) @ weight, backend=backend)
    block = make(Block)
    for module in (model, other, block):
        module.compile(backend=backend)

    def run_all() -> None:
        model(x), other(x), block(x), function(x, block.ff.linear.weight)

    with backend.expect(graphs=4, runs=8):
        run_all()
        run_all()
    assert drop_dynamo_caches(model.blocks) == 1
    with backend.expect(graphs=1, runs=4):
        run_all()
    assert drop_dynamo_caches([model]) == 0  # hooks of the root run outside its compiled forward
    assert drop_dynamo_caches([OtherBlock()]) == 1  # any module of the class
    assert (
        drop_dynamo_caches([model.blocks[0].ff]) == 2
    )  # in `model` (again) and in `block`; `other` is dropped already
    assert drop_dynamo_caches([]) == 0
    assert drop_dynamo_caches([nn.Conv2d(1, 1, 1)]) == 0


def test_dropping_finds_a_hooked_leaf(x: torch.Tensor, backend: CountingBackend) -> None:
    model = compile_method(make(), backend=backend)
    model(x)
    calls: list[nn.Module] = []
    handle = model.embed.register_forward_pre_hook(compile_safe(lambda module, args: calls.append(module)))
    assert drop_dynamo_caches([model.embed]) == 1
    model(x)
    assert calls == [model.embed]
    handle.remove()


def test_dropping_finds_a_function_named_forward(x: torch.Tensor, backend: CountingBackend) -> None:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self(x)

    model = make()
    call = torch.compile(forward, backend=backend)
    call(model, x)
    assert drop_dynamo_caches([model]) == 1


@pytest.mark.skipif(_TORCH < (2, 8), reason="torch has no guard filters")
@pytest.mark.parametrize("name", ["skip_guard_on_all_nn_modules_unsafe", "skip_guard_on_inbuilt_nn_modules_unsafe"])
def test_dropping_when_guards_on_modules_are_off(name: str, x: torch.Tensor, backend: CountingBackend) -> None:
    options = {"guard_filter_fn": getattr(torch.compiler, name)}
    model = make()
    call = torch.compile(lambda x: model(x), backend="eager", options=dict(options))
    call(x)
    assert drop_dynamo_caches(model.blocks) == 1
    call(x)
    assert drop_dynamo_caches([model.embed]) == 1


@pytest.mark.skipif(_TORCH < (2, 12), reason="torch has no isolated compiles")
def test_dropping_isolated_compiles(x: torch.Tensor, backend: CountingBackend) -> None:
    model = compile_method(make(), backend=backend, isolate_recompiles=True)
    model(x)
    assert drop_dynamo_caches(model.blocks) == 1


def test_a_torch_that_is_not_understood_is_reset(
    x: torch.Tensor, backend: CountingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compile_method(make(), backend=backend)
    model(x)
    monkeypatch.delattr(torch._C._dynamo.eval_frame, "_debug_get_cache_entry_list")
    assert drop_dynamo_caches(model.blocks) == 1
    with backend.expect(graphs=1, runs=1):
        model(x)


# --- fullgraph=True -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compile_it", "code"),
    [
        (compile_method, "transformer.compile(fullgraph=True)"),
        (compile_module, "torch.compile(transformer, fullgraph=True)"),
        (compile_forward, "transformer.forward = torch.compile(transformer.forward, fullgraph=True)"),
    ],
)
def test_fullgraph_is_refused_before_hooks(compile_it: Callable[..., Any], code: str, x: torch.Tensor) -> None:
    refuse_fullgraph(compile_it(make(), backend="eager"), "transformer")
    with pytest.raises(CompiledWholeError) as caught:
        refuse_fullgraph(compile_it(make(), backend="eager", fullgraph=True), "transformer")
    assert str(caught.value) == (
        f"`transformer` is compiled as a whole by `{code}`, which leaves no place to load its blocks one by one. "
        "Compile the blocks instead (`transformer.compile_repeated_blocks(fullgraph=True)`, or "
        "`block.compile(fullgraph=True)` for each), or leave out fullgraph=True while it is streamed."
    )


@pytest.mark.parametrize("is_compiled_first", [True, False])
@pytest.mark.parametrize("compile_it", WHOLE)
def test_fullgraph_is_refused_by_the_hook(
    compile_it: Callable[..., Any], is_compiled_first: bool, x: torch.Tensor, backend: CountingBackend
) -> None:
    """The component's own hook runs before dynamo sees its forward, so the error is ours; leaving, all works again."""
    model = make()
    expected = model(x)
    call = compile_it(model, backend=backend, fullgraph=True) if is_compiled_first else None
    with Streaming(model, model.blocks) as streaming:
        if call is None:  # (not `call or`: the truth of an OptimizedModule is its length, which raises)
            call = compile_it(model, backend=backend, fullgraph=True)
        with pytest.raises(LayerstreamError, match="`transformer` is compiled as a whole by"):
            call(x)
        assert streaming.num_acquired == 0
    with backend.expect(graphs=1, runs=2):
        for _ in range(2):
            assert torch.equal(call(x), expected)


def test_fullgraph_further_out_is_an_error_of_dynamo_that_names_us(x: torch.Tensor) -> None:
    model = make()
    call = compile_function(model, backend="eager", fullgraph=True)
    with Streaming(model, model.blocks), pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        call(x)
    if _TORCH >= (2, 8):
        assert "layerstream loads a block's weights in this hook" in str(caught.value)
    assert torch.equal(call(x), model(x))


# --- the hook -----------------------------------------------------------------------------------------------------


def test_a_safe_hook_is_ordinary_python(x: torch.Tensor, backend: CountingBackend) -> None:
    """It may do what cannot be traced, and change the arguments; nothing of it is compiled or guarded on."""
    seen: list[object] = []

    @compile_safe
    def hook(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        seen.append((sys._getframe().f_code.co_name, torch.compiler.is_compiling()))
        return (args[0] * float(len(seen)),)

    assert hook.__name__ == "hook"
    block = make(Block)
    expected = [block(x * float(factor)) for factor in (1, 2, 3)]
    block.compile(backend=backend, fullgraph=True)
    handle = block.register_forward_pre_hook(hook)
    with backend.expect(graphs=1, runs=3):
        assert all(torch.equal(block(x), each) for each in expected)
    assert seen == [("hook", False)] * 3
    handle.remove()
