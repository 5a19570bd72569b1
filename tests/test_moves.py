"""Moves of modules while they stream: a pipeline's own are satisfied, a user's refused; what else is applied is done.

To torch the simulated device and the host are both "cpu". `adversary()` tells them apart: there, "cpu" is the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.device.simulated import SimulatedDevice
from layerstream.standins import build_tiny, run_tiny
from tests.fakes import Toy, adversary, assert_equal, assert_restored, describe, run, toy, twin

MOVES: dict[str, Callable[[nn.Module], object]] = {
    "to": lambda m: m.to("cpu"),
    "cpu": lambda m: m.cpu(),
    "to with a dtype": lambda m: m.to("cpu", torch.float32),
    "to like a tensor": lambda m: m.to(torch.zeros(1)),
}


class Moving:
    """A pipeline that moves its checker to where it runs, and back, as those of Cosmos do; and casts it on the way."""

    def __init__(self, *, casts: bool = False) -> None:
        self.net, self.checker = toy(0), toy(1)
        self.components = {"net": self.net, "checker": self.checker}
        self.casts = casts
        self.devices: list[torch.device] = []

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.checker.to(x.device)
        self.devices.append(next(self.checker.parameters()).device)
        checked = self.checker(x)
        self.checker.to("cpu")
        for number in range(3):
            if number == 1:
                self.net.blocks[2].to("cpu", torch.float64 if self.casts else None)
                self.checker.cpu()
            x = x + (self.net if not self.casts else self.checker)(x)
        return x + checked


def offloaded(pipe: Any, budget: int | str = "min", device: SimulatedDevice | None = None) -> layerstream.LayerStreamer:
    return layerstream.offload(pipe, vram_budget=budget, device=device or adversary())


@pytest.mark.parametrize("budget", ["min", 10**8])
def test_a_pipeline_moves_its_own_components_inside_its_call(budget: int | str) -> None:
    pipe, resident = Moving(), Moving()
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    expected = resident(x)
    before = {name: describe(m) for name, m in pipe.components.items()}
    device = adversary()
    with offloaded(pipe, budget, device) as streamer, device.checking():
        for _ in range(3):
            assert torch.equal(pipe(x), expected)
        assert streamer.stats().num_relaid == 0, "nothing was moved, so nothing was laid out anew"
        with pytest.raises(layerstream.MovedWhileStreamingError, match="`checker` .Toy. cannot be moved"):
            pipe.checker.to("cpu")  # by the user, between calls
    for name, was in before.items():
        assert_restored(pipe.components[name], was)


def test_the_dtype_of_such_a_move_is_done() -> None:
    pipe = Moving(casts=True)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    with offloaded(pipe):
        pipe(x)
        assert pipe.net.blocks[2].up.weight.dtype == torch.float64
        assert pipe.net.blocks[1].up.weight.dtype == torch.float32
    assert pipe.net.blocks[2].up.weight.dtype == torch.float64


def test_a_callback_of_the_users_is_inside_the_call() -> None:
    """Whoever frees the text encoder after the first step, as tutorials for small GPUs do."""
    pipe = build_tiny("sd3")
    expected = run_tiny(pipe, "sd3")

    def free(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe.text_encoder.to("cpu")
        return kwargs

    with offloaded(pipe):
        assert torch.equal(run_tiny(pipe, "sd3", callback_on_step_end=free), expected)
        with pytest.raises(layerstream.MovedWhileStreamingError):
            pipe.text_encoder.to("cpu")


def test_a_module_that_moves_parts_of_itself_in_its_forward() -> None:
    class Mover(Toy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.blocks[1].to("cpu")
            self.head.cpu()
            return super().forward(x)

    torch.manual_seed(0)
    model = Mover().eval()
    expected = run(twin(model))
    with offloaded(model):
        assert_equal(run(model), expected)


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("path", ["", "blocks.3", "head"])
def test_a_users_move_between_calls_is_refused(name: str, path: str) -> None:
    model = toy()
    before, expected = describe(model), run(twin(model))
    with offloaded(model):
        with pytest.raises(layerstream.MovedWhileStreamingError, match=r"cannot be moved .* Leave the call out"):
            MOVES[name](model.get_submodule(path))
        assert_equal(run(model), expected)
    assert_restored(model, before)


@pytest.mark.parametrize("name", MOVES)
def test_where_both_places_have_one_name_nothing_moves(name: str) -> None:
    """`device="cpu"` for people: `pipe.to(device)` is as harmless as `.to("cuda")` beside a GPU."""
    model = toy()
    before, expected = describe(model), run(twin(model))
    with offloaded(model, device=SimulatedDevice()):
        MOVES[name](model.embed)  # of one dtype, so that no cast is meant
        assert_equal(run(model), expected)
    assert_restored(model, before)


# ---- what else `_apply` does


@pytest.mark.parametrize("when", ["between calls", "in a callback"])
def test_a_memory_format_is_kept(when: str) -> None:
    def lay_out(pipe: Any) -> None:
        pipe.unet.to(memory_format=torch.channels_last)

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            lay_out(pipe)
        return kwargs

    resident, pipe = build_tiny("sd15"), build_tiny("sd15")
    plain = run_tiny(resident, "sd15")
    arguments: dict[str, Any] = {"callback_on_step_end": callback} if when == "in a callback" else {}
    device = adversary()
    with offloaded(pipe, device=device), device.checking():
        for each in (resident, pipe) if not arguments else ():
            lay_out(each)
        expected = run_tiny(resident, "sd15", **arguments)
        assert not torch.equal(plain, expected)
        assert torch.equal(run_tiny(pipe, "sd15", **arguments), expected)
        assert torch.equal(run_tiny(pipe, "sd15"), run_tiny(resident, "sd15"))
    assert pipe.unet.conv_in.weight.stride() == resident.unet.conv_in.weight.stride() != (36, 9, 3, 1)
    assert torch.equal(run_tiny(pipe, "sd15"), run_tiny(resident, "sd15"))


def test_shared_memory_is_shared_afterwards() -> None:
    model = toy()
    expected = run(twin(model))
    with offloaded(model):
        run(model)
        model.share_memory()
        assert_equal(run(model), expected)
    assert all(p.is_shared() for p in model.parameters())
    assert_equal(run(model), expected)


def test_whatever_function_is_applied_is_applied_to_all_weights() -> None:
    model, resident = toy(), toy()

    def change(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.neg() if tensor.is_floating_point() else tensor

    with offloaded(model) as streamer:
        run(model)
        for each in (model, resident):
            each._apply(change)
        assert_equal(run(model), run(resident))
        assert streamer.stats().num_relaid == 1
    for mine, its in zip(model.parameters(), resident.parameters(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("cast", [lambda m: m.float(), lambda m: m.to(torch.float32), lambda m: m.type(torch.float32)])
def test_casting_to_what_it_is_lays_nothing_out(cast: Callable[[nn.Module], object]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(4))).eval()
    with pytest.warns(layerstream.LayerstreamWarning, match="no block stacks"):
        streamer = offloaded(model).start()
    cast(model)
    assert streamer.stats().num_relaid == 0
    streamer.close()
