"""Pickles, saved files and copies of what streams: as of a resident pipeline, with nothing of ours in them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file, save_model
from torch import nn

import layerstream
from layerstream.standins import build_tiny, run_tiny
from tests.fakes import adversary, assert_equal, assert_restored, describe, run, toy, twin

BUDGETS = ["min", 10**8]


def saved(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "pickle 2": lambda thing: pickle.loads(pickle.dumps(thing, protocol=2)),
    "torch.save": saved,
    "deepcopy": copy.deepcopy,
}


def assert_plain(module: nn.Module) -> None:
    """Nothing of ours hangs on it."""
    for part in module.modules():
        assert not any("layerstream" in repr(value) for value in vars(part).values())
        assert not {"_apply", "__reduce_ex__"} & set(vars(part))
        for tensor in [*part._parameters.values(), *part._buffers.values()]:
            assert tensor is None or type(tensor) in (torch.Tensor, nn.Parameter)
            assert tensor is None or "layerstream" not in repr(vars(tensor))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("way", WAYS)
def test_a_pipeline(way: str, budget: int | str) -> None:
    pipe = build_tiny("sd15")
    expected = run_tiny(pipe, "sd15")
    with layerstream.offload(pipe, vram_budget=budget, device=adversary()):
        for _ in range(2):
            assert torch.equal(run_tiny(pipe, "sd15"), expected)
            other = WAYS[way](pipe)
            assert torch.equal(run_tiny(other, "sd15"), expected)
            for module in (m for m in other.components.values() if isinstance(m, nn.Module)):
                assert_plain(module)
        assert torch.equal(run_tiny(pipe, "sd15"), expected)
    assert torch.equal(run_tiny(WAYS[way](pipe), "sd15"), expected)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("way", WAYS)
def test_a_module_with_tied_and_written_weights(way: str, budget: int | str) -> None:
    model = toy(writes_buffer=True)
    model.blocks[4].up.weight = model.blocks[1].up.weight
    resident = twin(model)
    before = describe(model)
    with layerstream.offload(model, vram_budget=budget, device=adversary()):
        assert_equal(run(model), run(resident))
        model.blocks[3].scale.data[0] = 7
        resident.blocks[3].scale.data[0] = 7
        other = WAYS[way](model)
        assert other.blocks[4].up.weight is other.blocks[1].up.weight
        assert float(other.blocks[0].count) == 3.0
        assert_equal(run(other), run(twin(resident)))
        assert_plain(other)
        inside: list[nn.Module] = []
        handle = model.blocks[5].register_forward_hook(lambda m, a, o: inside.append(WAYS[way](m.up)))
        assert_equal(run(model), run(resident))
        handle.remove()
        assert torch.equal(inside[0].weight, resident.blocks[5].up.weight)
        weight = WAYS[way](model.blocks[2].up.weight)
        assert torch.equal(weight, resident.blocks[2].up.weight)
        assert type(weight) is nn.Parameter
        assert_equal(run(model), run(resident))
    assert_restored(model, before, changed=["count", "blocks.3.scale"])


def test_a_shallow_copy_shares_the_weights() -> None:
    model = toy()
    expected = run(twin(model))
    with layerstream.offload(model, vram_budget="min", device=adversary()):
        other = copy.copy(model)
        assert other.head.weight is model.head.weight
        assert_equal(run(other), expected)


@pytest.mark.parametrize("budget", BUDGETS)
def test_files_of_weights(tmp_path: Path, budget: int | str) -> None:
    model = toy()
    named = {name: p.detach().clone() for name, p in model.named_parameters() if p.is_contiguous()}
    with layerstream.offload(model, vram_budget=budget, device=adversary()):
        run(model)
        ours = {name: p for name, p in model.named_parameters() if name in named}
        save_file(ours, tmp_path / "named.safetensors")
        ours["head.bias"].data[0] = named["head.bias"][0] = 5.0
        data = save(ours)
        save_file({name: t for name, t in model.state_dict().items() if name in named}, tmp_path / "state.safetensors")
        model.transposed_ok = True
        for block in model.blocks:
            block.transposed.data = block.transposed.data.contiguous()
            block.conv.to(memory_format=torch.contiguous_format)
        save_model(model, str(tmp_path / "model.safetensors"))
        run(model)
    for name, tensor in load_file(tmp_path / "named.safetensors").items():
        if name != "head.bias":
            assert torch.equal(tensor, named[name]), name
    for name, tensor in load_file(tmp_path / "state.safetensors").items():
        assert torch.equal(tensor, named[name]), name
    assert len(data) > sum(t.nbytes for t in named.values())
    (tmp_path / "data.safetensors").write_bytes(data)
    for name, tensor in load_file(tmp_path / "data.safetensors").items():
        assert torch.equal(tensor, named[name]), name
    assert "blocks.0.transposed" in load_file(tmp_path / "model.safetensors")
