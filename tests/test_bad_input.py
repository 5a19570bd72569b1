"""Wrong arguments and wrong moments: a clear error each, and nothing changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from tests.fakes import adversary, assert_equal, assert_restored, describe, run, toy, toy_input, twin


def refused(pipe: Any, error: type[Exception], match: str, **options: Any) -> Exception:
    device = options.pop("device", None) or adversary()
    with pytest.raises(error, match=match) as caught:
        layerstream.offload(pipe, device=device, **options).start()
    if hasattr(device, "operations"):
        assert not device.buffer_bytes
        assert not device.registered
    return caught.value


@pytest.mark.parametrize("pipe", [3, "model.safetensors", object(), [nn.Linear(2, 2)]])
def test_not_a_pipeline(pipe: Any) -> None:
    refused(
        pipe, layerstream.PipelineError, "no diffusers pipeline .* no torch.nn.Module, no dict .* and no object with"
    )


@pytest.mark.parametrize(
    ("pipe", "match"),
    [
        ({}, "has no modules:"),
        ({"a": 3, "b": None}, r"has no modules \(it holds 'a': int, 'b': NoneType\)"),
        (toy().state_dict(), r"OrderedDict has no modules \(it holds 'embed.weight': Tensor, .*, \d+ more\): there"),
    ],
)
def test_a_dict_without_modules(pipe: Any, match: str) -> None:
    assert len(str(refused(pipe, layerstream.PipelineError, match))) < 400


def test_what_is_no_module_in_a_dict_is_passed_over() -> None:
    """As in `pipe.components`: tokenizers, schedulers, and what a pipeline does without."""
    model = toy()
    expected = run(twin(model))
    with layerstream.offload({"a": model, "b": None, "c": 3}, vram_budget="min", device=adversary()) as streamer:
        assert_equal(run(model), expected)
        assert {unit.component for unit in streamer.plan.units} == {"a"}


def test_nothing_streamable_is_whole_and_said_once() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    before, x = describe(model), torch.randn(2, 4)
    expected = model(x)
    device = adversary()
    with pytest.warns(
        layerstream.LayerstreamWarning, match=r"no block stacks found in `Sequential`.*register_adapter"
    ) as said:
        streamer = layerstream.offload(model, vram_budget="min", device=device).start()
    assert len(said) == 1
    with device.checking():
        assert torch.equal(model(x), expected)
    assert device.buffer_bytes > 0
    streamer.close()
    assert_restored(model, before)


def test_meta_tensors() -> None:
    model = toy()
    model.blocks[2].up = nn.Linear(16, 32, device="meta")
    refused(model, layerstream.PipelineError, r"Toy\.blocks\.2\.up\.weight` is on the meta device")


@pytest.mark.parametrize(
    ("budget", "match"),
    [
        (0, "0 is 0 bytes"),
        (-5, "-5 is -5 bytes"),
        ("0GiB", "'0GiB' is 0 bytes"),
        ("eight", "'eight' is not a size"),
        ("8 gigs", "not a size"),
        ("-1GiB", "not a size"),
        (1.5, "not float"),
        (True, "not bool"),
        (None, "not NoneType"),
        ("1PiB", "not a size"),
        (
            10_000,
            r"too small: while `Toy` runs, 2 slot\(s\) for `Toy\.blocks\.\d` .* Raise vram_budget to at least \d+",
        ),
        (2**41, r"2.0 TiB is more than the device has \(1.0 TiB\)"),
    ],
)
def test_budgets(budget: Any, match: str) -> None:
    model = toy()
    before = describe(model)
    refused(model, layerstream.BudgetError, match, vram_budget=budget, device=adversary(memory_bytes=2**40))
    assert_restored(model, before)


def test_the_least_budget_that_is_named_works_and_a_byte_less_does_not() -> None:
    model = toy()
    expected = run(twin(model))
    needed = refused(model, layerstream.BudgetError, "too small", vram_budget=1).least_bytes
    refused(model, layerstream.BudgetError, "too small", vram_budget=needed - 1)
    device = adversary()
    with layerstream.offload(model, vram_budget=needed, device=device):
        assert_equal(run(model), expected)
    assert device.peak_buffer_bytes <= needed


@pytest.mark.parametrize(
    ("device", "match"),
    [
        ("cuda:99", "does not exist"),
        ("warp", "is not a device"),
        ("w" * 400, r"device 'w{29}\.\.\. \(402 characters\) is not a device"),
        (10**30, "is not a device"),
        ("meta", "cannot be streamed to"),
        (99, "does not exist"),
    ],
)
def test_devices(device: Any, match: str) -> None:
    model = toy()
    before = describe(model)
    refused(model, layerstream.DeviceError, match, device=device)
    assert_restored(model, before)


def test_entering_twice_and_closing_twice() -> None:
    model = toy()
    before = describe(model)
    streamer = layerstream.offload(model, vram_budget="min", device=adversary())
    streamer.close()  # before starting: nothing to do
    with streamer:
        with pytest.raises(layerstream.StreamerStateError, match="active already"):
            streamer.start()
        refused(model, layerstream.AlreadyOffloadedError, "streamed by layerstream already .*active")
        refused({"part": model.blocks}, layerstream.AlreadyOffloadedError, "`part` is streamed by layerstream already")
        refused({"all": nn.ModuleList([model])}, layerstream.AlreadyOffloadedError, "streamed by layerstream already")
        assert streamer.is_active
        run(model)
    streamer.close()
    streamer.close()
    assert_restored(model, before)


def test_a_decorator_is_no_context() -> None:
    with pytest.raises(layerstream.StreamerStateError, match="is a decorator"):
        layerstream.offload(vram_budget="8GiB").start()
    with pytest.raises(layerstream.StreamerStateError, match="first argument"):
        layerstream.offload(lambda pipe: pipe)()
    with pytest.raises(layerstream.StreamerStateError, match="no stats yet"):
        layerstream.offload(toy()).stats()


@pytest.mark.parametrize("target", [5, None, "a prompt", [print], property(print), classmethod(print)])
@pytest.mark.parametrize("pipe", [None, toy()])
def test_decorating_what_cannot_be_called(pipe: Any, target: Any) -> None:
    with pytest.raises(
        layerstream.ArgumentError, match=r"^a LayerStreamer decorates a class or a function, not .*: .*offload\(pipe\)"
    ) as error:
        layerstream.offload(pipe, vram_budget="8GiB")(target)
    assert "\n" not in str(error.value)


class OfDiffusers:
    def __init__(self) -> None:
        self.components = {"net": toy()}

    def __call__(self, prompt: str) -> str:
        return prompt


class Held(nn.Module):
    """Can be called by its base."""

    components = MappingProxyType({"net": None})


@pytest.mark.parametrize("target", [toy(), {"net": toy()}, OfDiffusers(), nn.ModuleList([toy()])])
def test_decorating_a_pipeline(target: Any) -> None:
    match = r"^a LayerStreamer decorates .*, not .*: .* to stream a pipeline, `with layerstream.offload\(pipe\):`"
    with pytest.raises(layerstream.ArgumentError, match=match) as error:
        layerstream.offload(vram_budget="8GiB")(target)
    assert "\n" not in str(error.value)


def test_decorating_a_class_that_cannot_be_called() -> None:
    class Pipeline:
        def generate(self) -> None: ...

    before = dict(vars(Pipeline))
    for decorate in (layerstream.offload, layerstream.offload(vram_budget="8GiB")):
        with pytest.raises(
            layerstream.ArgumentError, match=r"^class Pipeline has no `__call__` .* Decorate its methods"
        ):
            decorate(Pipeline)
    assert dict(vars(Pipeline)) == before
    own = dict(vars(Held))
    assert layerstream.offload(Held) is Held
    assert "__call__" in vars(Held)
    assert "__call__" not in own


def test_offloaded_by_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = toy()
    accelerate.cpu_offload(model, torch.device("cpu"))
    refused(model, layerstream.AlreadyOffloadedError, r"offloaded by accelerate \(\w+Hook.*remove_all_hooks")
    accelerate.hooks.remove_hook_from_module(model, recurse=True)


def test_offloaded_by_diffusers() -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    model = toy()
    # As apply_group_offloading leaves it; older versions of that refuse to run without an accelerator.
    hooks.HookRegistry.check_if_exists_or_initialize(model.blocks[1]).register_hook(
        hooks.ModelHook(), "group_offloading"
    )
    refused(
        model, layerstream.AlreadyOffloadedError, r"`Toy\.blocks\.1` is offloaded by diffusers \(group_offloading\)"
    )


def test_spread_by_device_map() -> None:
    model = toy()
    model.hf_device_map = {"blocks": 0, "head": "cpu"}
    refused(model, layerstream.AlreadyOffloadedError, r"spread by device_map over \['0', 'cpu'\]")
    model.hf_device_map = {"": "cpu"}
    layerstream.offload(model, vram_budget="min", device=adversary()).start().close()


MOVES: list[Callable[[nn.Module], object]] = [
    lambda m: m.to("cuda"),
    lambda m: m.to("meta"),
    lambda m: m.cuda(),
    lambda m: m.to_empty(device="meta"),
]


@pytest.mark.parametrize("number", range(len(MOVES)))
def test_moving_while_active(number: int) -> None:
    model = toy()
    expected, before = run(twin(model)), describe(model)
    with layerstream.offload(model, vram_budget="min", device=adversary()):
        with pytest.raises(layerstream.MovedWhileStreamingError, match="`Toy` .* cannot be moved.*leave the offload"):
            MOVES[number](model)
        assert_equal(run(model), expected)
        model.eval().requires_grad_(True)
        assert_equal([o.detach() for o in run(model)], expected)
    assert_restored(model, before)
    model.to(torch.float64)
    assert model.blocks[0].up.weight.dtype == torch.float64


CASTS: list[Callable[[nn.Module], object]] = [
    lambda m: m.double(),
    lambda m: m.to(torch.float64),
    lambda m: nn.Sequential(m).to(torch.float64),
    lambda m: m.blocks[3].norm.weight is None or m.blocks[3].to(torch.float32),
]


@pytest.mark.parametrize("number", range(len(CASTS)))
def test_casting_while_active_is_what_it_is_on_a_resident_model(number: int) -> None:
    model = toy()
    resident = twin(model)
    CASTS[number](resident)
    for block in resident.blocks:
        block.down.to(torch.bfloat16)  # its forward wants that
    for block in resident.blocks:
        block.up.float(), block.norm.float()
    device = adversary()
    with layerstream.offload(model, vram_budget="min", device=device) as streamer:
        run(model, 1)
        CASTS[number](model)
        assert streamer.stats().num_relaid > 0
        names = {n: (t.dtype, t.device) for n, t in model.state_dict().items()}
    assert names == {n: (t.dtype, t.device) for n, t in model.state_dict().items()}
    assert device.buffer_bytes == 0


def test_moving_a_block_while_active() -> None:
    model = toy()
    expected = run(twin(model))
    with layerstream.offload(model, vram_budget="min", device=adversary()):
        with pytest.raises(layerstream.MovedWhileStreamingError, match="blocks.3"):
            model.blocks[3].to("meta")
        assert_equal(run(model), expected)


def test_a_component_replaced_while_active() -> None:
    parts = {"first": toy(), "second": toy(1)}
    with layerstream.offload(parts, vram_budget="min", device=adversary()) as streamer:
        run(parts["first"], 1)
        parts["second"] = toy(2)
        with pytest.raises(
            layerstream.StreamerStateError, match="`second` was replaced .* inside `with streamer.paused"
        ):
            run(parts["first"], 1, make_input=lambda n: toy_input(n)[:1])
        with streamer.paused():
            pass
        expected = run(twin(parts["second"]))
        assert_equal(run(parts["second"]), expected)


def test_an_embedding_larger_than_the_budget() -> None:
    model = nn.Sequential(nn.Embedding(1000, 16), nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)]))
    error = refused(
        model, layerstream.BudgetError, r"`Sequential\.0` alone 62\.5 KiB", vram_budget="8KiB", device=adversary()
    )
    assert error.needed_bytes > 64_000


def test_components_that_share_a_module() -> None:
    shared = toy()
    parts = {"first": shared, "second": nn.Sequential(shared.embed, nn.Linear(16, 4)), "third": shared.head}
    expected = [run(twin(part)) for part in (parts["first"], parts["second"])]
    before = describe(shared)
    device = adversary()
    with layerstream.offload(parts, vram_budget="min", device=device), device.checking():
        for _ in range(2):
            assert_equal(run(parts["first"]), expected[0])
            assert_equal(run(parts["second"]), expected[1])
    assert_restored(shared, before)


def test_auto_with_nothing_free() -> None:
    device = adversary(memory_bytes=2**20)
    with device.foreign(2**20):
        refused(toy(), layerstream.BudgetError, "vram_budget .* is too small", vram_budget="auto", device=device)


def test_a_larger_input_in_the_same_context_that_cannot_fit() -> None:
    model = toy()
    before, expected = describe(model), run(twin(model))
    device = adversary()
    with layerstream.offload(model, vram_budget="min", device=device) as streamer, device.checking():
        run(model)
        budget = streamer.stats().peak_reserved_bytes + 2**13
    large = torch.randn(4000, 4)
    with (
        pytest.raises(
            layerstream.BudgetError, match="in `Toy`.* It needs more than .*, which it had reached: vram_budget=.auto"
        ) as told,
        layerstream.offload(model, vram_budget=budget, device=device),
        device.checking(),
        torch.no_grad(),
    ):
        assert_equal(run(model), expected)
        model(large)
    assert told.value.needed_bytes is not None
    assert told.value.needed_bytes > budget
    assert_restored(model, before)
    assert device.buffer_bytes == 0
    assert_equal(run(model), expected)


def test_foreign_memory_that_eats_the_room_is_named() -> None:
    model = toy()
    device = adversary()
    with layerstream.offload(model, vram_budget="min", device=device) as streamer, device.checking():
        run(model)
        budget = streamer.stats().peak_reserved_bytes + 2**13
    with (
        pytest.raises(layerstream.BudgetError, match="activations and other tensors"),
        layerstream.offload(model, vram_budget=budget, device=device),
        device.checking(),
        torch.no_grad(),
    ):
        run(model)
        with device.foreign(2**13):
            model(torch.randn(3, 4))


def test_moving_a_pipeline_while_active() -> None:
    from layerstream.standins import build_tiny, run_tiny

    pipe = build_tiny("sd3")
    expected = run_tiny(pipe, "sd3")
    with layerstream.offload(pipe, vram_budget="min", device=adversary()):
        for move in (lambda: pipe.to("cuda"), lambda: pipe.transformer.to("cuda")):
            with pytest.raises(layerstream.MovedWhileStreamingError):
                move()
        # A component that does not stream may be cast, as some pipelines do inside a call.
        pipe.vae.to(torch.float64)
        pipe.vae.to(torch.float32)
        assert torch.equal(run_tiny(pipe, "sd3"), expected)
    assert torch.equal(run_tiny(pipe, "sd3"), expected)


def test_a_cast_that_stays_is_what_the_user_gets() -> None:
    model = nn.ModuleDict({"vae": nn.Linear(4, 4)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", layerstream.LayerstreamWarning)
        with layerstream.offload({"vae": model["vae"], "net": toy()}, vram_budget="min", device=adversary()):
            model["vae"].to(torch.float64)
    assert model["vae"].weight.dtype == torch.float64


@pytest.fixture
def clean_registry() -> Iterator[None]:
    from layerstream.model.adapters import registry

    before = dict(registry._REGISTERED)
    yield
    registry._REGISTERED.clear()
    registry._REGISTERED.update(before)


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"stacks": ["layers"]}, "stack `layers` does not exist .* blocks"),
        ({"stacks": ["head"]}, "without children"),
        ({"stacks": ["blocks", "blocks.0"]}, "overlap"),
        ({"stacks": ["", "blocks"]}, "overlap"),
        ({"stacks": ["blocks"], "resident": ["blocks.9"]}, "resident block `blocks.9` does not exist"),
        ({"stacks": ["blocks"], "entry_points": ["sample"]}, "has no method sample to enter by"),
        ({"parts": ["embed", "model"]}, "part `model` does not exist in `Toy`. Its children are: embed, blocks, head"),
    ],
)
def test_adapters_that_are_wrong(clean_registry: None, said: dict[str, Any], match: str) -> None:
    layerstream.register_adapter("Toy", layerstream.Adapter(**said))
    model = toy()
    before = describe(model)
    refused(model, layerstream.AdapterError, match)
    assert_restored(model, before)


@pytest.mark.parametrize("stacks", [[], ["blocks"]])
def test_what_an_adapter_does_not_name_is_in_the_base(clean_registry: None, stacks: list[str]) -> None:
    layerstream.register_adapter("Toy", layerstream.Adapter(stacks=stacks, resident=["blocks.1"]))
    model = toy()
    expected, before = run(model), describe(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", layerstream.LayerstreamWarning)  # of the one that names nothing
        with layerstream.offload(model, vram_budget="min", device=adversary()) as streamer:
            assert_equal(run(model), expected)
            assert streamer.stats().num_streamed_blocks == 5 * len(stacks)
    assert_restored(model, before)


@pytest.mark.parametrize("shared", ["weight", "layer", "block"])
def test_a_stack_whose_blocks_share_parameters(clean_registry: None, shared: str) -> None:
    layerstream.register_adapter("Toy", layerstream.Adapter(stacks=["blocks"]))
    model = toy()
    if shared == "weight":
        model.blocks[3].up.weight = model.blocks[1].up.weight
    elif shared == "layer":
        model.blocks[3].up = model.blocks[1].up
    else:
        model.blocks[3] = model.blocks[1]
    expected, before = run(model), describe(model)
    with layerstream.offload(model, vram_budget="min", device=adversary()) as streamer:
        assert_equal(run(model), expected)
        assert streamer.stats().num_streamed_blocks == (5 if shared == "block" else 6)
    assert_restored(model, before)


def refused_as_well_in_a_preview(pipe: Any, match: str) -> None:
    before = describe(pipe) if isinstance(pipe, nn.Module) else None
    errors = [refused(pipe, layerstream.PipelineError, match, vram_budget="min")]
    with pytest.raises(layerstream.PipelineError, match=match) as error:
        layerstream.plan(pipe, device="cpu")
    assert all(str(each) == str(error.value) and "\n" not in str(each) for each in errors)
    if before is not None:
        assert_restored(pipe, before)


@pytest.mark.parametrize("make", [nn.Module, nn.ModuleList, nn.Sequential, nn.ModuleDict, nn.ReLU])
def test_a_container_with_nothing_in_it(make: type[nn.Module]) -> None:
    name = make.__name__
    match = rf"^`{name}` \({name}\) has no parameters and no buffers: there are no weights to stream\.$"
    refused_as_well_in_a_preview(make(), match)


def test_modules_none_of_which_has_weights() -> None:
    match = r"^`act` \(ReLU\), `list` \(ModuleList\) have no parameters and no buffers"
    refused_as_well_in_a_preview({"act": nn.ReLU(), "list": nn.ModuleList([nn.ReLU()]), "none": None}, match)


def test_modules_some_of_which_have_weights() -> None:
    """Also buffers, which move as well as parameters do."""
    parts = {"act": nn.ReLU(), "norm": nn.BatchNorm1d(4, affine=False), "net": toy()}
    expected = run(parts["net"])
    with layerstream.offload(parts, vram_budget="min", device=adversary()):
        assert_equal(run(parts["net"]), expected)
    with (
        pytest.warns(layerstream.LayerstreamWarning, match="no block stacks found in"),
        layerstream.offload(parts["norm"], vram_budget="min", device=adversary()),
    ):
        pass


def test_parameters_that_have_no_shape_yet() -> None:
    model = toy()
    model.blocks[2].lazy = nn.LazyLinear(4)
    match = r"^`Toy\.blocks\.2\.lazy\.weight` has no shape yet \(UninitializedParameter\): .* Run the model once"
    with pytest.raises(layerstream.PipelineError, match=match):
        layerstream.offload({"Toy": model}, vram_budget="min", device=adversary()).start()
    with pytest.raises(layerstream.PipelineError, match=match):
        layerstream.plan(model, device="cpu")
    assert isinstance(model.blocks[2].lazy.weight, nn.UninitializedParameter)


class WithComponents:
    def __init__(self, components: Any) -> None:
        self.components = components


@pytest.mark.parametrize("components", [[toy()], (toy(),), [], None, 3, "transformer"])
def test_components_that_are_no_dict(components: Any) -> None:
    kind = type(components).__name__
    match = rf"^WithComponents has no modules: its `\.components` is a {kind}, and no dict of modules by name\.$"
    refused_as_well_in_a_preview(WithComponents(components), match)


def test_components_that_are_no_dict_beside_modules() -> None:
    """An ordinary class may have an attribute of that name; its modules are attributes."""
    pipe = WithComponents(["net"])
    pipe.net = toy()  # type: ignore[attr-defined]
    assert {unit.component for unit in layerstream.plan(pipe, device="cpu").units} == {"net"}


@pytest.mark.parametrize("error", [ValueError("vae is\nmissing"), AttributeError("vae is missing"), KeyError("vae")])
def test_components_that_raise(error: Exception) -> None:
    """As those of diffusers do, where an attribute that the pipeline was made with is gone."""

    class Pipeline:
        def __init__(self) -> None:
            self.net = toy()

        @property
        def components(self) -> dict[str, Any]:
            raise error

    match = rf"^the `\.components` of Pipeline cannot be read \({type(error).__name__}: .*vae.*\)\. Give .* a dict of"
    refused_as_well_in_a_preview(Pipeline(), match)
    assert layerstream.active(Pipeline()) is None


def test_an_object_whose_attributes_are_no_modules() -> None:
    class Pipeline:
        def __init__(self) -> None:
            self.model, self.tokenizer = None, "a tokenizer"

    refused(Pipeline(), layerstream.PipelineError, r"Pipeline has no modules \(it holds 'model': NoneType, 'tokenizer'")


@pytest.mark.parametrize("device", [1.5, True, object(), [], b"cpu", torch.float32, nn.Linear, toy()])
def test_what_is_no_device(device: Any) -> None:
    model = toy()
    before = describe(model)
    with pytest.raises(layerstream.DeviceError, match="is not a device") as error:
        layerstream.offload(model, vram_budget="min", device=device).start()
    assert len(str(error.value)) < 150
    assert "\n" not in str(error.value)
    assert_restored(model, before)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_a_scripted_module_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))
    with pytest.raises(layerstream.PipelineError, match=r"`net\.1` .* was compiled by torch\.jit"):
        layerstream.offload({"net": model}, vram_budget="min", device=adversary()).start()
    assert torch.isfinite(model(torch.ones(1, 4))).all()
