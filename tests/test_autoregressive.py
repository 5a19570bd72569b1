"""The autoregressive systems, and lone language models, on the harshest device: equal, restored, and settled."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.blocks import ALIGNMENT_BYTES
from layerstream.device.simulated import SimulatedDevice
from layerstream.standins import AUTOREGRESSIVE, build_autoregressive, run_autoregressive
from tests.fakes import adversary, assert_restored, describe

pytest.importorskip("diffusers", reason="the VAEs of the stand-ins are those of diffusers")
transformers = pytest.importorskip(
    "transformers", reason="the language models of the stand-ins are transformers models"
)

BUDGETS = ("min", "middle", "auto")
# Where an exception strikes, and at which of the module's calls.
PLACES: dict[str, dict[str, int]] = {
    "nextstep_a": {
        "model.layers.2.mlp": 4,
        "model.image_head.net.res_blocks.1": 7,
        "model.image_in_projector": 3,
        "model.image_out_projector": 3,
        "vae.decoder": 1,
    },
    "nextstep_b": {
        "model.layers.2.mlp": 4,
        "model.image_head.net.final_layer": 7,
        "model.image_in_projector": 3,
        "model.image_out_projector": 3,
        "vae.decoder.conv_out": 1,
    },
    "mammoth": {
        "llm_model.model.language_model.layers.3": 5,
        "llm_model.gen_head": 4,
        "gen_transformer.time_caption_embed.image_embedder": 2,
        "gen_transformer.layers.2": 3,
        "gen_vae.decoder": 1,
    },
}

Parts = dict[str, nn.Module]


def built(name: str, **options: Any) -> Any:
    try:
        return build_autoregressive(name, **options)
    except ImportError as error:
        pytest.skip(str(error))


def parts_of(pipe: Any) -> Parts:
    return {"": pipe} if isinstance(pipe, nn.Module) else {"model.": pipe.model, "vae.": pipe.vae}


def module_of(pipe: Any, path: str) -> nn.Module:
    prefix = next(p for p in parts_of(pipe) if path.startswith(p))
    return parts_of(pipe)[prefix].get_submodule(path.removeprefix(prefix))


def budget_of(pipe: Any, budget: str) -> int | str:
    """For "middle", what is between the least and all weights."""
    if budget != "middle":
        return budget
    plan = layerstream.plan(pipe, vram_budget="min", device=adversary())
    return (plan.least_bytes + sum(unit.num_bytes for unit in plan.units)) // 2


def described(pipe: Any) -> list[dict[str, Any]]:
    return [describe(part) for part in parts_of(pipe).values()]


def assert_all_restored(pipe: Any, before: Sequence[dict[str, Any]]) -> None:
    for part, was in zip(parts_of(pipe).values(), before, strict=True):
        assert_restored(part, was)


def loads_of(streamer: layerstream.LayerStreamer, call: Callable[[], Any], calls: int) -> list[int]:
    counts = [streamer.stats().num_loads]
    for _ in range(calls):
        call()
        counts.append(streamer.stats().num_loads)
    return [after - before for before, after in pairwise(counts)]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_three_calls_are_equal_and_all_is_restored(name: str, budget: str) -> None:
    pipe = built(name)
    expected = run_autoregressive(pipe, name)  # the first run leaves marks of transformers on modules
    before = described(pipe)
    device = adversary()
    # Where memory is counted, what such small weights leave is too little for what images take.
    checking = contextlib.nullcontext() if budget == "middle" else device.checking()
    with layerstream.offload(pipe, vram_budget=budget_of(pipe, budget), device=device) as streamer, checking:
        for _ in range(3):
            assert torch.equal(run_autoregressive(pipe, name), expected)
        stats = streamer.stats()
    assert stats.num_touch_loads == 0
    assert stats.num_loads > 0
    assert_all_restored(pipe, before)
    assert torch.equal(run_autoregressive(pipe, name), expected)
    assert not device.registered


@pytest.mark.parametrize("budget", ["min", "middle"])
@pytest.mark.parametrize(("name", "place"), [(name, place) for name in PLACES for place in PLACES[name]])
def test_an_exception_in_any_part(name: str, place: str, budget: str) -> None:
    pipe = built(name)
    expected = run_autoregressive(pipe, name)
    before = described(pipe)
    count = 0

    def stop(*args: object) -> None:
        nonlocal count
        count += 1
        if count == PLACES[name][place]:
            raise KeyError(place)

    with layerstream.offload(pipe, vram_budget=budget_of(pipe, budget), device=adversary()):
        for number in range(2):  # while nothing is measured, and afterwards
            count = 0
            handle = module_of(pipe, place).register_forward_pre_hook(stop)
            with pytest.raises(KeyError, match=place):
                run_autoregressive(pipe, name)
            handle.remove()
            assert torch.equal(run_autoregressive(pipe, name), expected), number
    assert_all_restored(pipe, before)
    assert torch.equal(run_autoregressive(pipe, name), expected)


def test_an_exception_in_the_scheduler_leaves_the_block() -> None:
    pipe = built("mammoth")
    expected = run_autoregressive(pipe, "mammoth")
    before = described(pipe)
    times = pipe.gen_transport.times

    def stop(count: int) -> list[float]:
        raise KeyError("times")

    with (
        pytest.raises(KeyError, match="times"),
        layerstream.offload(pipe, vram_budget="min", device=adversary()),
    ):
        pipe.gen_transport.times = stop
        run_autoregressive(pipe, "mammoth")
    pipe.gen_transport.times = times
    assert_all_restored(pipe, before)
    assert torch.equal(run_autoregressive(pipe, "mammoth"), expected)


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_where_everything_fits_the_fifth_call_loads_nothing(name: str) -> None:
    pipe = built(name)
    with layerstream.offload(pipe, vram_budget="auto", device=adversary()) as streamer:
        num_units = len(streamer.plan.units)
        first, second, third, fourth, fifth = loads_of(streamer, lambda: run_autoregressive(pipe, name), 5)
    assert first <= 10 * num_units
    assert second + third + fourth <= 4 * num_units
    assert fifth == 0


def sketch(model: Any) -> torch.Tensor:
    """The codes that the language model of MammothModa2 writes after a prompt: 49 tokens."""
    ids = torch.arange(1, 9)[None]
    torch.manual_seed(0)
    with torch.inference_mode():
        written = model.generate(ids, torch.ones_like(ids), ar_height=7, ar_width=6, sampling=sampling())
    return written.input_ids


def sampling() -> Any:
    from layerstream.standins.repository.autoregressive.mammoth.sampling import Sampling

    return Sampling()


def bytes_per_token(model: Any, budget: int | str, calls: int) -> tuple[list[int], layerstream.LayerStreamer]:
    """What each of the last call's tokens loads, with the model's text part streamed by itself."""
    part = model.llm_model.model.language_model
    expected, loaded = sketch(model), list[int]()

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            loaded.append(streamer.stats().loaded_bytes)

    handle = model.llm_model.register_forward_pre_hook(begin, with_kwargs=True)
    # Its link is so slow that copies bound a pass.
    with layerstream.offload(part, vram_budget=budget, device=SimulatedDevice(link_gb_per_s=1e-3)) as streamer:
        for _ in range(calls):
            loaded.clear()
            assert torch.equal(sketch(model), expected)
    handle.remove()
    return [after - before for before, after in pairwise(loaded)], streamer


@pytest.mark.parametrize("kib", [170, 230, 290])
def test_a_token_of_an_image_loads_no_expert_for_text(kib: int) -> None:
    model = built("mammoth")
    loaded, streamer = bytes_per_token(model, kib * 2**10, 4)
    (phase,) = streamer.plan.phases
    unused = [u for u in streamer.plan.units if u.name.endswith(".mlp")]  # of layers that have experts
    used = [u for u in streamer.plan.units if u.is_block and u not in unused]
    assert len(unused) == 4
    assert len(used) == 2 + 2 * 4
    streamed = [u.num_bytes for u in used if u.index not in phase.resident]
    padding = 2 * ALIGNMENT_BYTES * len(streamed)  # behind the norms of queries and keys, which is not copied
    assert all(sum(streamed) - padding <= each <= sum(streamed) for each in loaded[8:]), "no more than it uses"
    resident = {u.index for u in used} & phase.resident
    assert resident, "the room of what is not used is of use to the rest"
    if len(resident) < len(used):
        assert not phase.resident & {u.index for u in unused}
    assert streamer.stats().num_touch_loads == 0


def test_experts_for_text_stay_where_there_is_room_for_them() -> None:
    model = built("mammoth")
    # All is 319 KiB, of which 256 are used by each token.
    _, streamer = bytes_per_token(model, 312 * 2**10, 4)
    (phase,) = streamer.plan.phases
    unused = {u.index for u in streamer.plan.units if u.name.endswith(".mlp")}
    assert 1 <= len(unused & phase.resident) < 4
    assert streamer.stats().peak_reserved_bytes <= 312 * 2**10


class Bagel(nn.Module):
    """Layers with an expert for text and one for images, both of which a pass for images runs, on their own tokens."""

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.self_attn, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
            self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            self.mlp_moe_gen = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

        def forward(self, x: torch.Tensor, num_text: int) -> torch.Tensor:
            x = self.norm(x + self.self_attn(x.mean(dim=1, keepdim=True)))
            if num_text == x.shape[1]:
                return x + self.mlp(x)
            return x + torch.cat([self.mlp(x[:, :num_text]), self.mlp_moe_gen(x[:, num_text:])], dim=1)

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(width) for _ in range(4))

    def forward(self, x: torch.Tensor, num_text: int) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, num_text)
        return x


@pytest.mark.parametrize("budget", BUDGETS)
def test_passes_that_run_one_expert_and_both(budget: str) -> None:
    torch.manual_seed(0)
    model, x = Bagel().eval(), torch.randn(1, 6, 64)
    calls = [6] * 12 + [2] * 12 + [6, 2, 6]
    with torch.inference_mode():
        expected = {count: model(x, count) for count in (2, 6)}
        before = describe(model)
        with layerstream.offload(model, vram_budget=budget_of(model, budget), device=adversary()) as streamer:
            assert sum(unit.is_block for unit in streamer.plan.units) == 3 * 4
            for count in 2 * calls:
                assert torch.equal(model(x, count), expected[count])
            assert streamer.stats().num_touch_loads == 0
    assert_restored(model, before)


def test_compiled_functions_around_blocks_run_as_written_and_equal(fresh_dynamo: None) -> None:
    eager = built("nextstep_a")
    expected = run_autoregressive(eager, "nextstep_a")
    pipe = built("nextstep_a", compiled=True, backend="eager")
    short = {"hw": (32, 32), "num_sampling_steps": 2}
    resident = run_autoregressive(pipe, "nextstep_a", **short)
    before = described(pipe)
    for budget in ("min", "auto"):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", layerstream.LayerstreamWarning)
            with layerstream.offload(pipe, vram_budget=budget_of(pipe, budget), device=adversary()):
                for _ in range(2):
                    assert torch.equal(run_autoregressive(pipe, "nextstep_a"), expected)
        told = [str(w.message) for w in said if issubclass(w.category, layerstream.LayerstreamWarning)]
        assert len(told) == 1, told
        assert "`forward_model`" in told[0]
        assert "torch.compile" in told[0]
        assert_all_restored(pipe, before)
    assert torch.equal(run_autoregressive(pipe, "nextstep_a", **short), resident)


def test_a_loop_longer_than_any_seen() -> None:
    pipe = built("nextstep_b")
    short, long = {"hw": (16, 16)}, {"hw": (64, 64)}
    expected = [run_autoregressive(pipe, "nextstep_b", **call) for call in (short, long)]
    with layerstream.offload(pipe, vram_budget=budget_of(pipe, "middle"), device=adversary()) as streamer:
        for call, output in zip((short, short, long, long, short), (0, 0, 1, 1, 0), strict=True):
            assert torch.equal(run_autoregressive(pipe, "nextstep_b", **call), expected[output])
        assert streamer.stats().num_touch_loads == 0


# ---- lone language models, and GLM-Image


def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval()


def written(model: Any, length: int = 4, count: int = 30) -> torch.Tensor:
    ids = torch.arange(5, 5 + length)[None]
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_lone_language_model_settles(budget: str) -> None:
    model = tiny_llama()
    expected = written(model)
    before = describe(model)
    with layerstream.offload(model, vram_budget=budget_of(model, budget), device=adversary()) as streamer:
        loads = loads_of(streamer, lambda: torch.testing.assert_close(written(model), expected, rtol=0, atol=0), 5)
        demand = streamer.stats().num_demand_loads
        written(model)
        assert streamer.stats().num_demand_loads == demand
    assert loads[2] == loads[3] == loads[4]
    if budget == "auto":
        assert loads[4] == 0
        assert loads[0] <= 10 * len(streamer.plan.units)
    assert_restored(model, before)


def test_prompts_and_loops_of_other_lengths() -> None:
    model = tiny_llama()
    calls = [(4, 5), (4, 5), (40, 5), (4, 60), (60, 60), (4, 5)]
    expected = [written(model, *call) for call in calls]
    with layerstream.offload(model, vram_budget=budget_of(model, "middle"), device=adversary()):
        for _ in range(2):
            for call, ids in zip(calls, expected, strict=True):
                assert torch.equal(written(model, *call), ids), call


@pytest.mark.parametrize("budget", BUDGETS)
def test_glm_image_with_a_longer_prompt_and_a_longer_loop(budget: str) -> None:
    from layerstream.standins import build_tiny, run_tiny

    try:
        pipe = build_tiny("glm_image")
    except ImportError as error:
        pytest.skip(str(error))
    calls: list[dict[str, Any]] = [
        {},
        {"prompt": "a red fox in the snow beside a frozen lake, " * 4},
        {"height": 64},
        {},
    ]
    expected = [run_tiny(pipe, "glm_image", **call) for call in calls]
    names = [name for name, module in pipe.components.items() if isinstance(module, nn.Module)]
    before = {name: describe(getattr(pipe, name)) for name in names}
    with layerstream.offload(pipe, vram_budget=budget_of(pipe, budget), device=adversary()):
        for call, image in zip(calls, expected, strict=True):
            assert torch.equal(run_tiny(pipe, "glm_image", **call), image), call
    for name in names:
        assert_restored(getattr(pipe, name), before[name])
