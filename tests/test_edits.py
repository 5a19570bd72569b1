"""Edits of weights between calls take effect and stay, however they are made, as on a resident model."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import pickle
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import layerstream
from layerstream.engine import attaching
from layerstream.engine import edits as module_of_edits
from layerstream.standins import build_tiny, run_tiny
from layerstream.weights.absent import is_absent
from tests.fakes import OneModel, Toy, adversary, assert_equal, run, toy, toy_input, twin

BUDGETS: dict[str, int | str] = {"streamed": "min", "everything fits": 10**8, "some stay": 60_000}
Edit = Callable[[Toy], object]


def rows(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, tensor[:2].numel()).reshape(tensor[:2].shape)


def _each(edit: Callable[[torch.Tensor], object]) -> Edit:
    """One weight of a block, one of the base, and a buffer."""

    def apply(model: Toy) -> None:
        for tensor in (model.blocks[1].up.weight, model.blocks[4].scale, model.head.weight, model.blocks[2].mask):
            edit(tensor)

    return apply


def add(t: torch.Tensor) -> torch.Tensor:
    return t.add_(1) if t.is_floating_point() else t.logical_not_()


def by_row(t: torch.Tensor) -> None:
    t.data[0] = t.data[-1].clone()
    t.data[1:2].copy_(t.data[-1:].clone())


def by_numpy(t: torch.Tensor) -> None:
    array = t.detach().numpy()
    array[...] = np.roll(array, 1)


def by_pointing(t: torch.Tensor) -> None:
    t.data = add(t.data.clone())


def by_counted(t: torch.Tensor) -> None:
    with torch.no_grad():
        add(t)


def by_addition(t: torch.Tensor) -> None:
    if t.is_floating_point():
        t.data += 0.5
    else:
        t.data ^= True


def by_storage(t: torch.Tensor) -> None:
    flat = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage(), t.storage_offset(), t.size(), t.stride())
    add(flat)


def by_dlpack(t: torch.Tensor) -> None:
    add(torch.from_dlpack(t.detach()))


def by_set(t: torch.Tensor) -> None:
    with torch.no_grad():
        t.set_(add(t.data.clone()))


def by_set_unread(t: torch.Tensor) -> None:
    with torch.no_grad():
        t.set_(torch.full(t.shape, 0.5, dtype=t.dtype))


def by_swap(t: torch.Tensor) -> None:
    other = torch.full(t.shape, t.numel() % 7 / 8, dtype=t.dtype)
    torch.utils.swap_tensors(t, nn.Parameter(other, requires_grad=t.requires_grad) if t.requires_grad else other)


def by_other_strides(t: torch.Tensor) -> None:
    order = range(t.ndim)
    strides = torch.empty(t.shape[::-1], device="meta").permute(*reversed(order)).stride()
    other = torch.empty_strided(t.shape, strides, dtype=t.dtype)
    t.data = add(other.copy_(t.data))


def exchange(model: Toy) -> None:
    for name in ("up", "down"):
        a, b, c = (getattr(model.blocks[i], name).weight for i in (0, 3, 4))
        a.data, b.data, c.data = b.data, c.data, a.data


EDITS: dict[str, Edit] = {
    "weight.data.copy_": _each(lambda t: t.data.copy_(add(t.data.clone()))),
    "weight.data += delta": _each(by_addition),
    "weight.data[i] = row": _each(by_row),
    "a view of weight.detach()": _each(lambda t: add(t.detach().view(-1)[: t.numel() // 2])),
    "numpy": _each(by_numpy),
    "weight.data = other": _each(by_pointing),
    "weight.add_ under no_grad": _each(by_counted),
    "its storage": _each(by_storage),
    "dlpack": _each(lambda t: by_dlpack(t) if t.dtype is not torch.bool else by_counted(t)),
    "weight.set_(other)": _each(by_set),
    "weight.set_(other), which was not read": _each(by_set_unread),
    "swap_tensors": _each(by_swap),
    "weight.data = other, of other strides": _each(by_other_strides),
    "three weights' data exchanged": exchange,
    "every weight of the model": lambda m: [p.data.mul_(1.5) for p in m.parameters() if p.numel()],
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_between_calls_takes_effect_and_stays(name: str, budget: str) -> None:
    resident, model = toy(), toy()
    before = run(resident)
    edit = EDITS[name]
    device = adversary()
    with layerstream.offload(model, vram_budget=BUDGETS[budget], device=device) as streamer, device.checking():
        for _ in range(3):
            assert_equal(run(model), run(resident))
        for model_of in (resident, model):
            edit(model_of)
        for _ in range(2):
            assert_equal(run(model), run(resident))
        for model_of in (resident, model):
            edit(model_of)  # nothing runs between this one and leaving
        assert streamer.stats().num_written_back > 0
    for (path, mine), (_, its) in zip(model.named_parameters(), resident.named_parameters(), strict=True):
        assert torch.equal(mine, its), path
    for (path, mine), (_, its) in zip(model.named_buffers(), resident.named_buffers(), strict=True):
        assert torch.equal(mine, its), path
    assert_equal(run(model), run(resident))
    assert not torch.equal(run(model)[0], before[0])


@pytest.mark.parametrize("budget", BUDGETS)
def test_reading_changes_nothing(budget: str) -> None:
    model = toy()
    expected = run(twin(model))
    with layerstream.offload(model, vram_budget=BUDGETS[budget], device=adversary()) as streamer:
        for _ in range(3):
            run(model)
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.detach().clone()
                repr(tensor.data)
            assert_equal(run(model), expected)
        assert streamer.stats().num_written_back == 0


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "kind", ["data", "view", "numpy", "state_dict", "numpy of a state_dict", "data of a state_dict"]
)
def test_what_was_read_once_is_written_to_much_later(kind: str, budget: str) -> None:
    """Calls in between: the unit has left the memory that is written to."""

    def get(model: Toy) -> Any:
        name = "blocks.3.up.weight"
        tensor = model.state_dict()[name] if "state_dict" in kind else model.get_parameter(name)
        if kind == "view":
            return tensor.detach()[1:]
        if kind.startswith("numpy"):
            return tensor.detach().numpy()
        return tensor if kind == "state_dict" else tensor.data

    resident, model = toy(), toy()
    with layerstream.offload(model, vram_budget=BUDGETS[budget], device=adversary()):
        kept = [get(each) for each in (model, resident)]
        for number in range(4):
            assert_equal(run(model), run(resident))
            assert_equal(run(model), run(resident))
            for each in kept:
                each[0] = number
        assert torch.equal(torch.as_tensor(kept[0]), torch.as_tensor(kept[1]))
    assert_equal(run(model), run(resident))
    assert torch.equal(model.blocks[3].up.weight, resident.blocks[3].up.weight)


def test_what_is_kept_sees_what_a_forward_writes() -> None:
    """As a view of a resident weight does; and it does not bring back what was there before."""
    resident, model = toy(writes_buffer=True), toy(writes_buffer=True)
    with layerstream.offload(model, vram_budget="min", device=adversary()):
        kept = [each.blocks[1].count.data for each in (model, resident)]
        for _ in range(3):
            assert_equal(run(model), run(resident))
            run(model.blocks[0], make_input=lambda n: torch.ones(2, 16))
            run(resident.blocks[0], make_input=lambda n: torch.ones(2, 16))
        assert torch.equal(*kept)
        kept[0] += 10
        kept[1] += 10
        assert_equal(run(model), run(resident))
    assert float(model.blocks[1].count) == float(resident.blocks[1].count)


@pytest.mark.parametrize("kind", ["data", "state_dict"])
def test_what_is_kept_stays_tied_through_a_pause(kind: str) -> None:
    resident, model = toy(), toy()
    state = {name: torch.full_like(t, 0.25) for name, t in resident.state_dict().items() if "blocks.3" in name}

    def get(each: Toy) -> torch.Tensor:
        return each.state_dict()["blocks.3.scale"] if kind == "state_dict" else each.blocks[3].scale.data

    with layerstream.offload(model, vram_budget="min", device=adversary()):
        kept = [get(each) for each in (model, resident)]
        run(model)
        kept[0][0], kept[1][0] = 7, 7
        for each in (model, resident):
            each.load_state_dict(state, strict=False)
        assert_equal(run(model), run(resident))
        kept[0][1], kept[1][1] = 9, 9
        assert_equal(run(model), run(resident))
    assert torch.equal(model.blocks[3].scale, resident.blocks[3].scale)


def test_an_edit_in_a_callback_between_two_passes_takes_effect() -> None:
    """Inside a pipeline's call, between two calls of its components."""
    from layerstream.standins import build_tiny, run_tiny

    def edit(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        for block in pipe.transformer.transformer_blocks:
            block.attn.to_q.weight.data.mul_(1.5)
        return kwargs

    resident, pipe = build_tiny("sd3"), build_tiny("sd3")
    plain = run_tiny(resident, "sd3")
    expected = run_tiny(resident, "sd3", callback_on_step_end=edit)
    assert not torch.equal(plain, expected)
    with layerstream.offload(pipe, vram_budget="min", device=adversary()):
        assert torch.equal(run_tiny(pipe, "sd3", callback_on_step_end=edit), expected)
        assert torch.equal(run_tiny(pipe, "sd3"), run_tiny(resident, "sd3"))
    assert torch.equal(run_tiny(pipe, "sd3"), run_tiny(resident, "sd3"))


def test_an_edit_of_what_a_hook_kept_inside_a_forward() -> None:
    resident, model = toy(), toy()
    kept: dict[Toy, torch.Tensor] = {}
    with layerstream.offload(model, vram_budget="min", device=adversary()):
        for each in (model, resident):
            hook = each.blocks[2].up.register_forward_hook(
                lambda m, a, o, each=each: kept.update({each: m.weight.data})
            )
            run(each)
            hook.remove()
        run(model), run(resident)
        for view in kept.values():
            view.zero_()
        assert_equal(run(model), run(resident))
    assert not model.blocks[2].up.weight.any()


def test_tied_weights_stay_tied_when_one_is_edited() -> None:
    def tied() -> Toy:
        model = toy()
        model.blocks[4].up.weight = model.blocks[1].up.weight
        model.blocks[5].scale = nn.Parameter(model.blocks[2].scale.data)
        return model

    resident, model = tied(), tied()
    with layerstream.offload(model, vram_budget="min", device=adversary()):
        for each in (resident, model):
            each.blocks[4].up.weight.data[0] = 3.0
            each.blocks[5].scale.data[1] = 5.0
        assert_equal(run(model), run(resident))
    assert model.blocks[4].up.weight is model.blocks[1].up.weight
    assert float(model.blocks[2].scale.detach()[1]) == float(model.blocks[5].scale.detach()[1]) == 5.0


def test_a_layer_merged_into_all_blocks_one_after_the_other() -> None:
    """As tutorials merge LoRA weights; many more units than there are slots."""
    resident, model = toy(num_blocks=12), toy(num_blocks=12)
    generator = torch.Generator().manual_seed(0)
    with layerstream.offload(model, vram_budget="min", device=adversary()) as streamer:
        run(model)
        for mine, its in zip(model.blocks, resident.blocks, strict=True):
            delta = torch.randn(mine.up.weight.shape, generator=generator)
            for block in (mine, its):
                block.up.weight.data += delta
        assert_equal(run(model), run(resident))
        assert streamer.stats().num_written_back == 12
        assert_equal(run(model), run(resident))
        assert streamer.stats().num_written_back == 12
    for mine, its in zip(model.parameters(), resident.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_weights_are_guarded_while_no_call_runs_and_plain_while_one_does() -> None:
    model = toy()
    inside: list[bool] = []
    model.blocks[3].register_forward_hook(lambda *a: inside.append(any(map(is_absent, model.parameters()))))
    with layerstream.offload(model, vram_budget=10**8, device=adversary()):
        for _ in range(4):
            run(model)
        assert inside[-1] is False
        assert all(map(is_absent, [*model.parameters(), *model.buffers()]))
        assert model.blocks[0].up.weight.shape == (32, 16)
        assert all(map(is_absent, model.parameters())), "shapes are answered"


def test_nothing_is_remembered_of_what_nobody_holds() -> None:
    model = toy()
    with layerstream.offload(model, vram_budget="min", device=adversary()) as streamer:
        edits = streamer._streamer.edits
        kept = [p.data for p in model.parameters()]
        state = model.state_dict()
        run(model)
        assert edits._kept
        assert edits._entries
        kept.clear()
        state.clear()
        gc.collect()
        run(model)
        assert not edits


def test_large_ones_are_compared_once_a_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of_edits, "_SMALL_BYTES", 0)
    resident, model = toy(), toy()
    with layerstream.offload(model, vram_budget="min", device=adversary()):
        kept = [each.blocks[3].scale.data for each in (model, resident)]
        with pytest.warns(layerstream.LayerstreamWarning, match="64 B of tensors .* are still held") as told:
            run(model)
        for number in range(3):
            for each in kept:
                each[0] = number
            assert_equal(run(model), run(resident))
        assert len(told) == 1
    assert_equal(run(model), run(resident))


@pytest.mark.parametrize("budget", BUDGETS)
def test_an_edit_that_changes_the_shape_takes_effect(budget: str) -> None:
    resident, model = toy(), toy()
    with layerstream.offload(model, vram_budget=BUDGETS[budget], device=adversary()):
        run(model)
        model.blocks[1].scale.data = torch.zeros(3)
        with pytest.raises(RuntimeError, match="size of tensor a"):  # what a resident model says
            run(model)
        for each in (resident, model):
            each.blocks[1].scale.data = torch.full((1,), 0.5)
        assert_equal(run(model), run(resident))
    assert model.blocks[1].scale.shape == (1,)
    assert_equal(run(model), run(resident))


@pytest.mark.parametrize("budget", ["min", 10**8, 120_000])
@pytest.mark.parametrize("kind", ["data", "state_dict", "state_dict, copied back"])
def test_averaged_weights_put_in_and_taken_out_again(kind: str, budget: int | str) -> None:
    """What was saved of the weights is theirs no longer once they are pointed at others: it must stay as it was."""
    resident, model = toy(), toy()
    expected = run(resident)
    with layerstream.offload(model, vram_budget=budget, device=adversary()):
        run(model)
        for each in (resident, model):
            saved = {n: p.data for n, p in each.named_parameters()} if kind == "data" else each.state_dict()
            for p in each.parameters():
                p.data = p.data * 1.1
            run(each)
            run(each)
            for n, p in each.named_parameters():
                if kind == "state_dict, copied back":
                    p.data.copy_(saved[n])
                else:
                    p.data = saved[n]
        for _ in range(2):
            assert_equal(run(model), expected)
    assert_equal(run(model), expected)


@pytest.mark.parametrize("budget", BUDGETS)
def test_weights_cast_one_by_one_through_their_data(budget: str) -> None:
    resident, model = toy(), toy()
    with layerstream.offload(model, vram_budget=BUDGETS[budget], device=adversary()):
        run(model)
        for each in (resident, model):
            casts = [p for p in each.parameters() if p.dtype is torch.float32]
            for p in casts:
                p.data = p.data.double().mul_(1.1)
            for p in casts:
                p.data = p.data.float()
        for _ in range(2):
            assert_equal(run(model), run(resident))
        for p in model.parameters():
            p.data = p.data.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("budget", BUDGETS)
def test_statistics_of_a_batch_norm_in_training_mode(budget: str) -> None:
    """The running mean is written by an operator that counts no version."""
    resident, model = toy(), toy()
    for each in (resident, model):
        each.blocks[1].norm = nn.BatchNorm1d(16)  # in training mode

    with layerstream.offload(model, vram_budget=BUDGETS[budget], device=adversary()):
        for _ in range(3):
            assert_equal(run(model), run(resident))
        for each in (resident, model):
            each.eval()
        assert_equal(run(model), run(resident))
        for each in (resident, model):
            each.train()
        assert_equal(run(model), run(resident))
    assert torch.equal(model.blocks[1].norm.running_mean, resident.blocks[1].norm.running_mean)
    assert torch.equal(model.blocks[1].norm.running_var, resident.blocks[1].norm.running_var)


# ---- what another component's pause, or the order of letting go, must not lose


def test_an_edit_survives_the_pause_of_another_component() -> None:
    pipe, other = build_tiny("sd15"), build_tiny("sd15")
    with layerstream.offload(pipe, vram_budget="min", device=adversary()):
        run_tiny(pipe, "sd15")
        for each in (pipe, other):
            each.unet.conv_in.weight.data.mul_(1.3)
            each.vae.to(torch.bfloat16)
            each.vae.to(torch.float32)
        wanted = run_tiny(other, "sd15")
        assert torch.equal(run_tiny(pipe, "sd15"), wanted)
    assert torch.equal(run_tiny(pipe, "sd15"), wanted)


@pytest.mark.parametrize("budget", ["min", "auto"])
def test_an_edit_through_views_that_are_gone_before_the_next_call(budget: str) -> None:
    """All weights are looked at together, so that most have left their slots when they are written."""
    pipe, other = build_tiny("sd3"), build_tiny("sd3")
    with layerstream.offload(pipe, vram_budget=budget, device=adversary()):
        run_tiny(pipe, "sd3")
        for each in (pipe, other):
            torch._foreach_mul_([p.data for p in each.transformer.parameters()], 1.02)
        wanted = run_tiny(other, "sd3")
        assert torch.equal(run_tiny(pipe, "sd3"), wanted)
    assert torch.equal(run_tiny(pipe, "sd3"), wanted)


def test_back_to_the_contiguous_format() -> None:
    pipe, other = build_tiny("sd15"), build_tiny("sd15")
    with layerstream.offload(pipe, vram_budget="min", device=adversary()):
        for memory_format in (torch.channels_last, torch.contiguous_format):
            for each in (pipe, other):
                each.unet.to(memory_format=memory_format)
            wanted = run_tiny(other, "sd15")
            assert torch.equal(run_tiny(pipe, "sd15"), wanted)
    strides = [[p.stride() for p in each.unet.parameters()] for each in (pipe, other)]
    assert strides[0] == strides[1]


def test_a_component_of_a_dict_that_comes_back() -> None:
    pipe = build_tiny("sd3")
    wanted = run_tiny(pipe, "sd3")
    modules = {name: m for name, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    with layerstream.offload(modules, vram_budget="min", device=adversary()) as streamer:
        run_tiny(pipe, "sd3")
        encoder = modules.pop("text_encoder")
        run_tiny(pipe, "sd3")
        modules["text_encoder"] = encoder
        assert torch.equal(run_tiny(pipe, "sd3"), wanted)
        assert "text_encoder" in {unit.component for unit in streamer.plan.units}
    assert torch.equal(run_tiny(pipe, "sd3"), wanted)


@pytest.mark.parametrize("copies", ["late", "random"])
def test_a_kept_view_of_a_unit_that_is_being_loaded_again(copies: Any) -> None:
    """The memory is its own slot's: it is compared only once the load is over."""
    model, device = toy(num_blocks=4), adversary(copies=copies)
    resident = twin(model)
    kept: list[torch.Tensor] = []
    with layerstream.offload(model, vram_budget="auto", device=device), device.checking(), torch.no_grad():
        for each in (model, resident):
            each.order = [0]  # passes do not use block 1
            run(each, 2)

            def keep(*args: object, each: Toy = each) -> None:
                kept.append(each.blocks[1].scale.detach())

            handle = each.blocks[0].register_forward_hook(keep)
            run(each, 1)
            handle.remove()
            each.blocks[1].scale.mul_(1.5)
            run(each, 2)
            each.order = [0, 1, 2, 3]
        assert_equal(run(model, 1), run(resident, 1))
    assert torch.equal(model.blocks[1].scale, resident.blocks[1].scale)


@pytest.mark.parametrize("budget", ["min", "auto"])
def test_a_block_called_by_itself_whose_component_is_laid_out_anew(budget: str) -> None:
    model = toy()
    resident = twin(model)
    with layerstream.offload(model, vram_budget=budget, device=adversary()), torch.no_grad():
        run(model, 1)
        run(resident, 1)
        for each in (model, resident):
            weight = each.blocks[3].up.weight
            weight.data = weight.data.t().contiguous().t()
        x = torch.ones(2, 16)
        for _ in range(2):
            assert torch.equal(model.blocks[3](x), resident.blocks[3](x))
        assert_equal(run(model, 2), run(resident, 2))


def test_views_kept_without_gradients_after_a_graph_is_gone() -> None:
    """What a dead graph had looked at a slot allows no view in its place."""
    model = toy()
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    with layerstream.offload(model, vram_budget="min", device=adversary()):
        output = model(toy_input())
        del output

        def keep(block: Any, args: object, output: object) -> None:
            kept.append((block.scale.detach(), block.scale.detach().clone()))

        handles = [block.register_forward_hook(keep) for block in model.blocks]
        with torch.no_grad():
            model(toy_input())
            for handle in handles:
                handle.remove()
            model(toy_input())
            model(toy_input())
    assert len(kept) == len(model.blocks)
    for view, value in kept:
        assert torch.equal(view, value)


@pytest.mark.parametrize("budget", ["min", 45_000])
def test_a_weight_of_a_block_on_another_stream_read_on_this_one(budget: int | str) -> None:
    """The next load waits for that read, too."""
    model, device = toy(), adversary()
    resident, side = twin(model), device.new_stream()

    def forward(each: Toy, *, is_apart: bool) -> torch.Tensor:
        x = each.embed(torch.ones(2, 4))
        for number, block in enumerate(each.blocks):
            if is_apart and number == 3:
                with device.use_stream(side):
                    x = block(x)
                x = x + block.scale
            else:
                x = block(x)
        return each.head(x)

    model.forward, resident.forward = (  # type: ignore[method-assign, assignment]
        functools.partial(forward, each) for each in (model, resident)
    )
    with layerstream.offload(model, vram_budget=budget, device=device), device.checking(), torch.no_grad():
        for is_apart in [*[False] * 10, *[True] * 4]:
            assert torch.equal(model(is_apart=is_apart), resident(is_apart=is_apart))


def test_calls_beside_pauses_in_another_thread() -> None:
    """A call that began in a pause runs to its end before hooks are on again."""
    model = toy()
    resident, wrong = twin(model), list[str]()
    with torch.no_grad():
        wanted = [resident(toy_input(number)) for number in range(4)]

    def call() -> None:
        for number in range(8):
            try:
                with torch.no_grad():
                    output = model(toy_input(number % 4))
                if not torch.equal(output, wanted[number % 4]):
                    wrong.append("another output")
            except Exception as error:
                wrong.append(repr(error))

    def read() -> None:
        for _ in range(6):
            model.state_dict()

    for _ in range(3):
        with layerstream.offload(model, vram_budget="min", device=adversary()):
            for _ in range(8):
                with torch.no_grad():
                    model(toy_input())
            threads = [threading.Thread(target=target) for target in (call, call, read)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert not wrong


@pytest.mark.parametrize("ends", [True, False])
def test_a_call_that_begins_while_weights_go_home(ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without hooks it would wait to read weights that it finds absent, and the pause, before it resumes, for its end;
    with them it waits until the pause, or streaming, is over."""
    model = toy()
    expected = run(twin(model), passes=1)
    threads: list[threading.Thread] = []
    outputs: list[Any] = []
    bring_home = attaching.Attaching._bring_home

    def begin_a_call(self: attaching.Attaching, attachments: Any) -> None:
        if not threads:
            threads.append(threading.Thread(target=lambda: outputs.append(run(model, passes=1)), daemon=True))
            threads[0].start()
            while not is_at_gate(threads[0]):
                time.sleep(0.001)
        bring_home(self, attachments)

    monkeypatch.setattr(attaching.Attaching, "_bring_home", begin_a_call)
    with layerstream.offload(model, vram_budget="min", device=adversary(), call_timeout=20) as streamer:
        run(model)
        if ends:
            streamer.close()
        else:
            with streamer.paused():
                pass
        threads[0].join(20)
        assert outputs, "it hangs"
        assert_equal(outputs[0], expected)
        assert_equal(run(model, passes=1), expected)


def is_at_gate(thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and not frame.f_code.co_filename.endswith("gate.py"):
        frame = frame.f_back
    return frame is not None


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", ["data", "detach"])
@pytest.mark.parametrize("when", ["after a pause", "in a pause", "after state_dict()"])
def test_what_was_read_is_written_to_although_nothing_ran_since(when: str, kind: str, budget: str) -> None:
    """A pause takes the memory away that a view looks at."""
    resident, model = toy(), toy()
    with layerstream.offload(model, vram_budget=BUDGETS[budget], device=adversary()) as streamer:
        for num_passes in (0, 1, 7):
            run(model, num_passes), run(resident, num_passes)
            kept = [
                getattr(each.blocks[number].up.weight, kind)
                if kind == "data"
                else each.blocks[number].up.weight.detach()
                for each in (resident, model)
                for number in (0, 2, 5)
            ]
            with streamer.paused() if when == "in a pause" else contextlib.nullcontext(), torch.no_grad():
                if when == "after a pause":
                    with streamer.paused():
                        pass
                elif when == "after state_dict()":
                    model.state_dict()
                for view in kept:
                    view.add_(0.5)
            assert_equal(run(model, 1), run(resident, 1))
    assert_equal(run(model, 1), run(resident, 1))


@pytest.mark.parametrize("ends", [True, False])
def test_a_pause_of_one_component_hides_no_edits_of_another(ends: bool) -> None:
    pipes = resident, pipe = [{"a": toy(1), "b": toy(2)} for _ in range(2)]
    with layerstream.offload(pipe, vram_budget=10**8, device=adversary()):
        for _ in range(3):
            for name in ("a", "b"):
                assert_equal(run(pipe[name], 1), run(resident[name], 1))
        pipe["b"].embed.double()
        pipe["b"].embed.float()
        for each in pipes:
            each["a"].blocks[3].scale.data.mul_(2)
        if not ends:
            run(pipe["b"], 1)
            assert_equal(run(pipe["a"]), run(resident["a"]))
    assert_equal(run(pipe["a"]), run(resident["a"]))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("shape", [(16,), (1,)])
def test_a_weight_set_to_another_is_pickled_as_that(shape: tuple[int, ...], budget: str) -> None:
    model = toy()
    with layerstream.offload(model, vram_budget=BUDGETS[budget], device=adversary()):
        for num_passes in (0, 1, 8):
            run(model, num_passes)
            with torch.no_grad():
                model.blocks[3].scale.set_(torch.full(shape, 0.5 + num_passes))
            copied = pickle.loads(pickle.dumps(model))
            assert_equal(run(copied, 1), run(model, 1))
            assert torch.equal(copied.blocks[3].scale, torch.full(shape, 0.5 + num_passes))


@pytest.mark.parametrize("budget", ["min", 10**8])
def test_readers_on_another_stream_are_waited_for(budget: int | str) -> None:
    """A hook keeps a weight, whose slot is then left to it; another thread reads one between calls."""
    model, expected = toy(), run(toy())
    device, kept = adversary(), list[torch.Tensor]()
    hook = model.blocks[2].register_forward_hook(lambda module, args, output: kept.append(module.scale.data))
    found: list[Any] = []

    def read(number: int) -> None:
        try:
            with device.checking(), torch.no_grad():
                found.append((model.blocks[number].scale * 1).clone())
        except BaseException as error:
            found.append(error)

    with layerstream.offload(model, vram_budget=budget, device=device), device.checking(), torch.no_grad():
        for number in range(6):
            run(model, 2)
            with device.use_stream(device.new_stream()):
                assert_equal(run(model), expected)
            thread = threading.Thread(target=read, args=(number,))
            thread.start()
            thread.join()
            assert torch.equal(found[-1], toy().blocks[number].scale)
            kept.clear()
        hook.remove()


# ---- what was taken before entering


class Wide(nn.Module):
    """Weights of 1.1 MiB stay where they are; of a few bytes they are gathered."""

    def __init__(self, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(size, size) for _ in range(5))
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x

    def input(self, seed: int) -> torch.Tensor:
        return torch.randn(2, self.size, generator=torch.Generator().manual_seed(seed))


def by_entry(model: Wide) -> Callable[[], object]:
    state = model.state_dict()
    return lambda: [state[f"blocks.{n}.weight"].add_(0.1) for n in (0, 3, 4)]


def by_data(model: Wide) -> Callable[[], object]:
    kept = model.blocks[0].weight.data
    return lambda: kept.mul_(1.5)


def by_view(model: Wide) -> Callable[[], object]:
    kept = model.blocks[4].weight.detach()[1:]
    return lambda: kept.fill_(0.25).add_(kept.sum())


def by_array(model: Wide) -> Callable[[], object]:
    kept = [model.blocks[0].weight.detach().numpy(), model.blocks[2].bias.detach().numpy()]
    return lambda: [np.copyto(each, np.roll(each, 1) + 0.5) for each in kept]


@pytest.mark.parametrize("budget", ["min", 10**8])
@pytest.mark.parametrize("copies", ["late", "at_once"])
@pytest.mark.parametrize("size", [8, 530])
@pytest.mark.parametrize("take", [by_entry, by_data, by_view, by_array])
def test_what_was_taken_before_entering_is_written_to(
    take: Callable[[Wide], Callable[[], object]], size: int, copies: Any, budget: int | str
) -> None:
    models = resident, model = Wide(size), Wide(size)
    edits = [take(each) for each in models]

    def check() -> None:
        assert_equal(run(model, make_input=model.input), run(resident, make_input=model.input))

    def edit() -> None:
        for each in edits:
            each()

    with layerstream.offload(model, vram_budget=budget, device=adversary(copies=copies)) as streamer:
        for _ in range(3):
            edit()  # before the first call: the device has nothing of it yet
            check()
            check()
        with torch.no_grad():  # and both ways in turn
            for each in models:
                each.blocks[0].weight.mul_(0.5)
        check()
        edit()
        check()
        with streamer.paused():
            edit()
        check()
        edit()
        check()
        edit()
    check()
    edit()
    check()


@pytest.mark.parametrize("budget", ["min", 10**8])
def test_a_weight_that_was_held_and_is_no_weight_any_more(budget: int | str) -> None:
    """A pause attaches what is there then: of the parameter that was exchanged nothing is remembered."""
    resident, model = toy(), toy()
    kept = [each.blocks[3].scale.detach().numpy() for each in (resident, model)]
    with layerstream.offload(model, vram_budget=budget, device=adversary()) as streamer:
        assert_equal(run(model), run(resident))
        for each in (resident, model):
            each.blocks[3].scale = nn.Parameter(torch.full((16,), 0.5))
        with streamer.paused():
            pass
        assert_equal(run(model), run(resident))
        assert not any(
            bound.name.endswith("3.scale") for h in streamer._streamer.edits._held.values() for bound in h.bounds
        )
        model.state_dict()
        assert_equal(run(model), run(resident))
    del kept
    assert_equal(run(model), run(resident))


@pytest.mark.parametrize("budget", ["min", 10**8])
def test_what_an_interrupted_call_has_written_stays_although_it_is_held(budget: int | str) -> None:
    """An interrupt skips the hooks that would have told of the call's end."""
    models = resident, model = toy(), toy()
    kept = [each.state_dict() for each in models]

    def write(module: nn.Module, args: object) -> None:
        with torch.no_grad():
            module.scale.mul_(2)  # type: ignore[operator, union-attr]

    def interrupt(module: nn.Module, args: object) -> None:
        raise KeyboardInterrupt

    with layerstream.offload(model, vram_budget=budget, device=adversary()):
        assert_equal(run(model), run(resident))
        for each in models:
            hooks = [
                each.blocks[2].register_forward_pre_hook(write),
                each.blocks[4].register_forward_pre_hook(interrupt),
            ]
            with contextlib.suppress(KeyboardInterrupt):
                run(each)
            for hook in hooks:
                hook.remove()
        assert_equal(run(model), run(resident))
    del kept
    assert_equal(run(model), run(resident))


@pytest.mark.parametrize("budget", ["min", 60_000])
@pytest.mark.parametrize("copies", ["at_once", "late"])
def test_a_state_dict_that_is_dropped_is_compared_no_more(copies: Any, budget: int | str) -> None:
    """Loads that are prepared after it was given look at the same memory."""
    model = toy()
    resident = twin(model)
    with layerstream.offload(model, vram_budget=budget, device=adversary(copies=copies)) as streaming:
        state = model.state_dict()
        for _ in range(3):
            assert_equal(run(model, 2), run(resident, 2))
        assert streaming._streamer is not None
        edits = streaming._streamer.edits
        assert edits._entries
        array = state["blocks.2.up.weight"].numpy()
        del state
        gc.collect()
        assert_equal(run(model, 2), run(resident, 2))
        assert len(edits._entries) == 1, "of which somebody has an array"
        del array
        gc.collect()
        assert_equal(run(model, 2), run(resident, 2))
        assert not edits._entries


def test_a_state_dict_from_before_costs_no_loads() -> None:
    loads = []
    for is_held in (True, False):
        model = Wide(530)
        state = model.state_dict() if is_held else None
        with layerstream.offload(model, vram_budget=6 * 2**20, device=adversary()) as streamer:
            for _ in range(4):
                run(model, make_input=model.input)
            loads.append((streamer.stats().num_loads, streamer.stats().num_written_back))
        del state
    assert loads[0] == loads[1]


@pytest.mark.parametrize("budget", ["min", 10**8])
def test_statistics_that_a_forward_writes_stay_although_they_were_taken_before(budget: int | str) -> None:
    """Neither counted writes nor those of batch norms, which no version counts, are taken for edits of the array."""
    models = [_Counting(), _Counting()]
    kept = [(m.state_dict(), m.blocks[1].norm.running_mean.numpy(), m.blocks[2].steps.numpy()) for m in models]
    resident, model = models
    with layerstream.offload(model, vram_budget=budget, device=adversary()):
        for _ in range(3):
            assert_equal(run(model), run(resident))
        for state, _, _ in kept:
            state["blocks.1.steps"].add_(5)
        assert_equal(run(model), run(resident))
    for (name, mine), its in zip(model.state_dict().items(), resident.state_dict().values(), strict=True):
        assert torch.equal(mine, its), name


class _CountingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return self.norm(x) + self.steps.sum()


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_CountingBlock() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("kind", ["detach", "numpy", "state_dict"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_weight_read_after_a_write_to_what_was_kept_of_it(kind: str, budget: str) -> None:
    """No call runs between the write and the read, which alone would have brought the one home."""

    def kept(model: Toy) -> torch.Tensor:
        weight = model.blocks[4].scale
        if kind == "numpy":
            return torch.from_numpy(weight.detach().numpy())
        return weight.detach() if kind == "detach" else model.state_dict()["blocks.4.scale"]

    resident, model = toy(), toy()
    with layerstream.offload(model, vram_budget=BUDGETS[budget], device=adversary()):
        for _ in range(2):
            assert_equal(run(model), run(resident))
        views = [kept(each) for each in (resident, model)]
        assert_equal(run(model), run(resident))  # whose weights go elsewhere
        for _ in range(2):
            for view in views:
                view.add_(0.5)
            assert torch.equal(model.blocks[4].scale.detach(), resident.blocks[4].scale.detach())
            assert_equal(run(model), run(resident))
    assert_alike(model, resident)


@pytest.mark.parametrize("kind", ["data", "detach", "state_dict"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_what_a_cast_has_left_is_no_longer_the_weight(kind: str, budget: str) -> None:
    """`layer.double().float()` gives a weight memory of its own, and what was read of it before is not that."""

    def kept(model: Toy) -> torch.Tensor:
        weight = model.blocks[1].up.weight
        if kind == "state_dict":
            return model.state_dict()["blocks.1.up.weight"]
        return weight.data if kind == "data" else weight.detach()

    resident, model = toy(), toy()
    with layerstream.offload(model, vram_budget=BUDGETS[budget], device=adversary()):
        assert_equal(run(model), run(resident))
        views = [kept(each) for each in (resident, model)]
        for each in (resident, model):
            each.blocks[1].up.double().float()
        for view in views:
            view.add_(0.5)
        assert_equal(run(model), run(resident))
    assert_alike(model, resident)


@pytest.mark.parametrize("has_entries", [False, True])
@pytest.mark.parametrize("place", ["tied by its data", "of a block", "of the base"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_view_that_a_hook_kept_is_written_to_between_calls(place: str, has_entries: bool, budget: str) -> None:
    """Inside a call weights are plain, so that nobody is told of it."""

    def made() -> tuple[Toy, nn.Module, str]:
        model = toy()
        if place == "tied by its data":  # other objects over the same memory
            model.blocks[-1].scale = nn.Parameter(model.blocks[0].scale.data)
        return (model, model.head, "weight") if place == "of the base" else (model, model.blocks[-1], "scale")

    (resident, *its), (model, *mine) = made(), made()
    views: list[torch.Tensor] = []
    with layerstream.offload(model, vram_budget=BUDGETS[budget], device=adversary()):
        if has_entries:
            assert len(model.state_dict()) == len(resident.state_dict())
        for each, (owner, name) in ((resident, its), (model, mine)):
            hook = functools.partial(lambda name, m, *_: views.append(getattr(m, name).data), name)
            handle = owner.register_forward_hook(hook)
            run(each, passes=1)
            handle.remove()
        for _ in range(2):
            for _ in range(4):
                assert_equal(run(model), run(resident))
            for view in views:
                view.add_(0.5)
            assert_equal(run(model), run(resident))
            for view in views:
                view.mul_(1.5)
            assert_alike(pickle.loads(pickle.dumps(model)), resident)
        assert_equal(run(model), run(resident))
        for view in views:
            view.sub_(0.25)
    assert_alike(model, resident)


@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_weight_set_to_one_of_other_strides(is_read: bool, budget: str) -> None:
    def edit(model: Toy) -> None:
        weight = model.blocks[3].conv.weight
        other = torch.linspace(-1, 1, weight.numel()).reshape(weight.shape)
        with torch.no_grad():
            weight.set_(other)
        if is_read:
            assert weight.is_contiguous()

    resident, model = toy(), toy()
    with layerstream.offload(model, vram_budget=BUDGETS[budget], device=adversary()):
        for _ in range(3):
            assert_equal(run(model), run(resident))
        for each in (resident, model):
            edit(each)
        with torch.enable_grad():  # a call of another kind: what is there makes way
            assert_equal([model(toy_input(0)).detach()], [resident(toy_input(0)).detach()])
        for _ in range(3):
            assert_equal(run(model), run(resident))
    assert_alike(model, resident)
    assert model.blocks[3].conv.weight.stride() == resident.blocks[3].conv.weight.stride()


@pytest.mark.parametrize("how", ["data", "set_"])
@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_one_of_two_weights_tied_by_their_data_is_pointed_elsewhere(how: str, is_read: bool, budget: str) -> None:
    def tied() -> Toy:
        model = toy()
        model.blocks[-1].scale = nn.Parameter(model.blocks[0].scale.data)
        return model

    resident, model = tied(), tied()
    with layerstream.offload(model, vram_budget=BUDGETS[budget], device=adversary()):
        for _ in range(2):
            assert_equal(run(model), run(resident))
        for each in (resident, model):
            weight, other = each.blocks[0].scale, torch.linspace(-1, 1, 16)
            if is_read:
                assert weight.detach().sum().isfinite()
            with torch.no_grad():
                if how == "set_":
                    weight.set_(other)
                else:
                    weight.data = other
        for _ in range(2):
            assert_equal(run(model), run(resident))
        for each in (resident, model):
            each.blocks[-1].scale.data.mul_(0.5)
        assert_equal(run(model), run(resident))
    assert_alike(model, resident)


@pytest.mark.parametrize("then", ["call", "leave", "pickle", "pause"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_an_edit_after_an_interrupted_call(then: str, budget: str) -> None:
    """Nobody has told of its end, so its weights are plain, and who looks at them is not noticed."""
    resident, model = toy(), toy()

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with layerstream.offload(model, vram_budget=BUDGETS[budget], device=adversary()) as streamer:
        for _ in range(2):
            assert_equal(run(model), run(resident))
        handle = model.blocks[3].down.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model)
        handle.remove()
        for each in (resident, model):
            for weight in (each.blocks[2].gain, each.blocks[3].up.weight, each.head.weight):
                weight.data.mul_(1.5)
        if then == "call":
            assert_equal(run(model), run(resident))
        elif then == "pickle":
            assert_alike(pickle.loads(pickle.dumps(model)), resident)
        elif then == "pause":
            with streamer.paused():
                assert_alike(model, resident)
    assert_alike(model, resident)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_weight_edited_while_graphs_have_what_it_was(budget: str) -> None:
    """What the slot holds is older than what was written to the copy that is there for code outside."""
    resident, model = toy(), toy()

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with layerstream.offload(model, vram_budget=BUDGETS[budget], device=adversary()):
        handle = model.blocks[-1].down.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt) as held:  # with all that the frames of the call hold
            model(toy_input(0))
        handle.remove()
        assert_alike(model, resident)
        graph = model(toy_input(0))
        for number in range(4):
            for each in (resident, model):
                each.blocks[-1].gain.data.mul_(1.5)
                each.blocks[number].norm.bias.data.add_(0.5)  # whose block takes its place
            assert_alike(model, resident)
        assert_equal(run(model), run(resident))
        del held, graph
    assert_alike(model, resident)


@pytest.mark.parametrize("held", ["a state_dict from before", "a state_dict", "an array from before"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_view_that_a_hook_kept_of_a_weight_that_is_held_at_home_too(held: str, budget: str) -> None:
    """Either may be written to, and nothing but the bytes tells which was."""
    resident, model = toy(), toy()

    def at_home(each: Toy) -> torch.Tensor:
        if held == "an array from before":
            return torch.from_numpy(each.blocks[-1].scale.detach().numpy())
        return each.state_dict()["blocks.5.scale"]

    before = None if held == "a state_dict" else [at_home(each) for each in (resident, model)]
    views: list[torch.Tensor] = []
    with layerstream.offload(model, vram_budget=BUDGETS[budget], device=adversary()):
        for _ in range(3):
            assert_equal(run(model), run(resident))
        homes = before or [at_home(each) for each in (resident, model)]
        for each in (resident, model):
            handle = each.blocks[-1].register_forward_hook(lambda module, *_: views.append(module.scale.data))
            run(each, passes=1)
            handle.remove()
        for number in range(4):
            for some in (views, homes)[:: 1 if number % 2 else -1]:
                for view in some:
                    view.add_(0.5)
                assert_equal(run(model), run(resident))
    assert_alike(model, resident)


@pytest.mark.parametrize("budget", BUDGETS)
def test_an_array_of_an_entry_and_then_another_state_dict(budget: str) -> None:
    resident, model = toy(), toy()
    with layerstream.offload(model, vram_budget=BUDGETS[budget], device=adversary()):
        arrays = []
        for each in (resident, model):
            run(each)
            arrays.append(each.state_dict()["blocks.4.up.weight"].numpy())
            for _ in range(2):
                assert len(each.state_dict())
        for number in range(5):
            for array in arrays:
                array[number] = number
            assert_equal(run(model), run(resident))
    assert_alike(model, resident)


@pytest.mark.parametrize("is_interrupted", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_kept_view_of_one_of_two_tied_weights_is_written_to(is_interrupted: bool, budget: str) -> None:
    """Both are one at home: what the device has of the other is as old."""

    def tied() -> Toy:
        model = toy()
        model.blocks[-1].scale = nn.Parameter(model.blocks[0].scale.data)
        return model

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    resident, model = tied(), tied()
    with layerstream.offload(model, vram_budget=BUDGETS[budget], device=adversary()):
        assert_equal(run(model), run(resident))
        views = [each.blocks[-1].scale.data for each in (resident, model)]
        assert len(model.state_dict())  # a pause, after which the weights lie elsewhere on the device
        for _ in range(4):
            assert_equal(run(model), run(resident))
        for _ in range(2):
            if is_interrupted:
                handle = model.blocks[3].down.register_forward_hook(interrupt)
                with pytest.raises(KeyboardInterrupt):
                    run(model)
                handle.remove()
            else:
                assert_alike(pickle.loads(pickle.dumps(model)), resident)
                assert model.head.weight.sum().isfinite()  # which lies with the tied ones
            for view in views:
                view.add_(0.5)
            assert_equal(run(model), run(resident))
    assert_alike(model, resident)


def assert_alike(model: nn.Module, resident: nn.Module) -> None:
    expected = resident.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("budget", BUDGETS)
def test_weights_of_a_block_that_are_tied_by_their_memory_are_read_as_one(budget: str) -> None:
    """What is written to each through `.data` is written twice, as on a resident model."""

    def tied() -> nn.Module:
        model = toy()
        model.blocks[1].scale.data = model.blocks[1].norm.weight.data
        return model

    resident, model = tied(), tied()
    with layerstream.offload(model, vram_budget=BUDGETS[budget], device=adversary()):
        for _ in range(3):
            assert_equal(run(model, 2), run(resident, 2))
            for each in (model, resident):
                for weight in each.parameters():
                    weight.data.mul_(1.5)
    assert_equal(run(model, 2), run(resident, 2))


@pytest.mark.parametrize(
    "look",
    [
        lambda m: m.blocks[0].scale.data,
        lambda m: m.blocks[0].scale.data.add_(0.5),
        lambda m: m.blocks[0].up.weight.data.mul_(2),
    ],
)
def test_a_write_to_what_was_held_before_while_its_unit_is_looked_at(look: Any) -> None:
    """The entry shares its count with the weight: a write there looks like one on the device, whose bytes are older."""
    model = toy()
    resident, pipe = OneModel(twin(model)), OneModel(model)
    held = [each.model.state_dict()["blocks.0.conv.bias"] for each in (pipe, resident)]
    with layerstream.offload(pipe, vram_budget="min", device=adversary()), torch.no_grad():
        for each, entry in zip((pipe, resident), held, strict=True):
            look(each.model)
            entry.add_(1)
        copy.deepcopy(model)  # brings the unit of which somebody has the entry home, since another needs its room
        assert_equal(run(model, 2), run(resident.model, 2))
    for name, value in resident.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(held[0], held[1])
