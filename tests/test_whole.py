"""Weights that are no plain tensors: on the device whole, and counted wherever weights are."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.device.simulated import SimulatedDevice
from layerstream.model.units import whole_bytes
from tests.fakes import adversary, assert_equal, assert_restored, describe, run, toy, twin


class Packed(torch.Tensor):
    """As quantisation libraries make them: a wrapper around plain tensors of fewer bytes."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Packed:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)
        made.codes, made.scale = codes, scale
        return made  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        plain = [a.codes.to(a.scale.dtype) * a.scale if isinstance(a, Packed) else a for a in args]
        return func(*plain, **(kwargs or {}))


def pack(linear: nn.Linear) -> None:
    scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
    codes = (linear.weight.detach() / scale).round().to(torch.int8)
    linear.weight = nn.Parameter(Packed(codes, scale), requires_grad=False)


def packed_toy() -> nn.Module:
    model = toy()
    for block in model.blocks:
        pack(block.up)
    return model


WHOLE = 6 * (32 * 16 + 32 * 4)  # codes and scales of six layers
SAID = rf"6 weights of type Packed \({WHOLE / 1024:.1f} KiB\) are no plain tensors.*stay on the device whole, within"


def test_they_are_in_plan_statistics_and_report() -> None:
    model = packed_toy()
    expected, before = run(model), describe(model)
    plain = layerstream.plan(toy(), vram_budget="min", device="cpu")
    plan = layerstream.plan(model, vram_budget="min", device="cpu")
    assert plan.whole_bytes == WHOLE
    assert plan.least_bytes - WHOLE < plain.least_bytes
    (row,) = [line for line in str(plan).splitlines() if "Packed" in line]
    assert row.split() == ["Toy", "Packed", "6", "3.8", "KiB", "whole"]
    assert plan.as_dict()["whole"] == [{"component": "Toy", "num_tensors": 6, "num_bytes": WHOLE, "kinds": ("Packed",)}]
    device = adversary()
    with pytest.warns(layerstream.LayerstreamWarning, match=SAID) as said:
        streamer = layerstream.offload(model, vram_budget="min", device=device).start()
    with device.checking():
        for _ in range(3):
            assert_equal(run(model), expected)
    stats = streamer.stats()
    assert stats.whole_bytes == WHOLE
    assert stats.peak_device_bytes >= plan.least_bytes
    assert "3.8 KiB of them whole" in str(streamer.report())
    assert streamer.plan.whole_bytes == WHOLE
    with streamer.paused():
        assert device.reserved_bytes() == device.buffer_bytes, "they are at home"
    assert len(said) == 1
    assert_equal(run(model), expected)
    streamer.close()
    assert device.reserved_bytes() == 0
    assert_restored(model, before)


def test_a_budget_without_room_for_them_is_refused_before_anything_moves() -> None:
    model = packed_toy()
    before = describe(model)
    plan = layerstream.plan(model, vram_budget="min", device="cpu")
    device = adversary(memory_bytes=10**8)
    with (
        pytest.raises(
            layerstream.BudgetError, match=r"the weights that stay on the device whole \(3\.8 KiB of Packed"
        ) as e,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")  # nothing is said of what does not begin
        layerstream.offload(model, vram_budget=plan.least_bytes - 1, device=device).start()
    assert e.value.least_bytes == plan.least_bytes
    assert not device.num_operations
    assert_restored(model, before)
    with pytest.raises(layerstream.BudgetError):
        layerstream.plan(model, vram_budget=plan.least_bytes - 1, device=device)


def test_the_budget_holds_with_them() -> None:
    model = packed_toy()
    expected = run(model)
    device = SimulatedDevice(copies="late", is_poisoned=True)
    with pytest.warns(layerstream.LayerstreamWarning, match=SAID):
        streamer = layerstream.offload(model, vram_budget=40_000, device=device).start()
    with device.checking():
        for _ in range(4):
            assert_equal(run(model), expected)
    assert streamer.stats().peak_reserved_bytes <= 40_000
    assert 0 < streamer.stats().num_streamed_blocks < 6 or streamer.stats().num_resident_blocks
    streamer.close()


NESTED_BYTES = {torch.strided: 6 * 3 * 4, torch.jagged: 6 * 3 * 4 + 3 * 8}  # the jagged one has offsets


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", ["buffer", "buffer of the base", "parameter"])
@pytest.mark.parametrize("layout", NESTED_BYTES)
def test_nested_tensors_stay_whole(layout: torch.layout, kind: str) -> None:
    model = toy()
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=layout)
    if kind == "parameter":
        model.blocks[1].nested = nn.Parameter(nested, requires_grad=False)
    else:
        (model if kind.endswith("base") else model.blocks[1]).register_buffer("nested", nested)
    expected, before = run(model), describe(model)
    assert layerstream.plan(model, device="cpu").whole_bytes == NESTED_BYTES[layout]
    with pytest.warns(layerstream.LayerstreamWarning, match=r"1 weights of type (nested |NestedTensor)"):
        streamer = layerstream.offload(model, vram_budget="min", device=adversary()).start()
    assert_equal(run(model), expected)
    assert streamer.stats().whole_bytes == NESTED_BYTES[layout]
    streamer.close()
    assert_restored(model, before)


def test_their_bytes() -> None:
    assert whole_bytes(Packed(torch.zeros(3, 5, dtype=torch.int8), torch.zeros(3, 1))) == 15 + 12
    assert whole_bytes(torch.eye(4).to_sparse()) == 4 * 4 + 2 * 4 * 8
    assert whole_bytes(nn.Parameter(torch.zeros(3, 5), requires_grad=False).as_subclass(torch.Tensor)) == 60
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it is a prototype
        assert whole_bytes(torch.eye(4).to_sparse_csr()) == 4 * 4 + 5 * 8 + 4 * 8
    assert twin(toy()) is not None
