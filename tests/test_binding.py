"""Tensors pointed at device memory and back: the same objects, the same bytes (EXPERIMENTS.md 9, 15, 26)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from layerstream.host.home import handed_back
from layerstream.weights.absent import AbsentClasses, is_absent, nan_scalar
from layerstream.weights.binding import BoundTensor, UnitBinding

CPU = torch.device("cpu")


def binding_of(*tensors: torch.Tensor) -> UnitBinding:
    binding = UnitBinding([BoundTensor(f"t{i}", t) for i, t in enumerate(tensors)])
    binding.prepare(0, lambda dtype: nan_scalar(dtype, CPU), AbsentClasses(lambda units: None))
    return binding


def views_of(binding: UnitBinding) -> list[torch.Tensor]:
    """Where a slot would hold the unit: the same values in other memory, in the strides of the device."""
    return [
        torch.empty_strided(b.shape, b.strides, dtype=b.dtype).copy_(b.home)
        if b.num_bytes
        else torch.empty(b.shape, dtype=b.dtype)
        for b in binding.tensors
    ]


def odd_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "contiguous": torch.randn(3, 5),
        "transposed": torch.randn(3, 5).t(),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "sliced": torch.randn(4, 6)[:, 1:4],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "0-dim": torch.tensor(2.5),
        "zero-size": torch.empty(0, 4),
        "one": torch.randn(1, 1, 3),
        "ints": torch.arange(6).reshape(2, 3),
        "bools": torch.tensor([True, False]),
        "bf16": torch.randn(7).to(torch.bfloat16),
        "view": torch.randn(20)[5:11],
    }


def state(tensor: torch.Tensor) -> tuple[object, ...]:
    return (
        id(tensor),
        type(tensor),
        tensor.data_ptr(),
        tensor.untyped_storage()._cdata,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.requires_grad,
    )


@pytest.mark.parametrize("name", odd_tensors())
@pytest.mark.parametrize("is_parameter", [True, False])
def test_there_and_back(name: str, is_parameter: bool) -> None:
    tensor = odd_tensors()[name]
    if is_parameter:
        tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    before, values = state(tensor), tensor.detach().clone()
    binding = binding_of(tensor)
    (bound,) = binding.tensors
    binding.absent()
    assert not binding.is_present
    for _ in range(3):
        assert is_absent(tensor)
        (view,) = views = views_of(binding)
        binding.present(views)
        assert binding.is_present
        assert not is_absent(tensor)
        assert tensor.data_ptr() == view.data_ptr()
        assert tensor.stride() == bound.strides
        assert torch.equal(tensor, values)
        assert binding.written() == []
        binding.absent()
    binding.restore(handed_back)
    assert binding.is_present
    assert state(tensor) == before
    assert torch.equal(tensor, values)


def test_restoring_from_any_state_and_twice() -> None:
    parameter = nn.Parameter(torch.randn(3))
    before = state(parameter)
    for last in ("home", "present", "absent"):
        binding = binding_of(parameter)
        if last == "present":
            binding.present(views_of(binding))
        if last == "absent":
            binding.absent()
        binding.restore(handed_back)
        binding.restore(handed_back)
        assert state(parameter) == before


def test_one_object_at_two_places() -> None:
    module = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    module[1].weight = module[0].weight
    values = module[0].weight.detach().clone()
    binding = binding_of(*module[0].parameters(), module[1].bias)
    binding.absent()
    assert is_absent(module[1].weight)
    binding.present(views_of(binding))
    assert module[1].weight is module[0].weight
    assert torch.equal(module[1].weight, values)
    binding.restore(handed_back)
    assert module[1].weight is module[0].weight


def test_two_objects_over_one_storage_come_back_tied() -> None:
    a = nn.Parameter(torch.randn(3))
    b = nn.Parameter(a.data)
    binding = binding_of(a, b)
    binding.absent()
    binding.restore(handed_back)
    assert a.data_ptr() == b.data_ptr()
    with torch.no_grad():
        a.fill_(3)
    assert torch.equal(b, torch.full((3,), 3.0))


def test_absent_holds_no_device_memory() -> None:
    tensor = torch.randn(1000)
    binding = binding_of(tensor)
    (view,) = views_of(binding)
    binding.present([view])
    storage = view.untyped_storage()
    del view
    binding.absent()
    assert torch._C._storage_Use_Count(storage._cdata) == 1, "only this test looks at it"
    binding.restore(handed_back)


def test_absent_allocates_nothing() -> None:
    tensors = [torch.randn(2, 2) for _ in range(3)]
    made: list[torch.dtype] = []

    def nans(dtype: torch.dtype) -> torch.Tensor:
        made.append(dtype)
        return nan_scalar(dtype, CPU)

    binding = UnitBinding([BoundTensor("t", t) for t in tensors])
    binding.prepare(0, nans, AbsentClasses(lambda units: None))
    assert len(made) == 3
    for _ in range(3):
        binding.absent()
        binding.present(views_of(binding))
    assert len(made) == 3
    binding.restore(handed_back)


# ---- what was written


def written(binding: UnitBinding) -> Sequence[str]:
    return [b.name for b in binding.written()]


def test_in_place_writes_are_seen() -> None:
    a, b, c = torch.randn(3), nn.Parameter(torch.randn(3)), torch.randn(3)
    binding = binding_of(a, b, c)
    binding.absent()
    binding.present(views_of(binding))
    with torch.no_grad():
        a += 1
        b.mul_(2)
    assert written(binding) == ["t0", "t1"]
    binding.absent()
    binding.present(views_of(binding))
    assert written(binding) == [], "counted from the last time it was bound"
    binding.restore(handed_back)


def test_a_write_through_a_view_is_seen() -> None:
    a = torch.randn(3, 3)
    binding = binding_of(a)
    binding.present(views_of(binding))
    a[1].zero_()
    assert written(binding) == ["t0"]
    binding.restore(handed_back)


def test_data_pointed_elsewhere_is_seen() -> None:
    a = nn.Parameter(torch.randn(3))
    binding = binding_of(a)
    binding.present(views_of(binding))
    a.data = torch.ones(3)
    assert written(binding) == ["t0"]
    binding.restore(handed_back)


def test_reading_is_no_write() -> None:
    a = nn.Parameter(torch.randn(3, 3))
    binding = binding_of(a)
    binding.present(views_of(binding))
    _ = (a.sum() * 2, a.detach().clone(), a[0] + 1, a @ a)
    assert written(binding) == []
    binding.restore(handed_back)


# ---- backward


def test_a_backward_that_saved_the_weights_raises_once_they_are_gone() -> None:
    weight = nn.Parameter(torch.randn(3))
    binding = binding_of(weight)
    binding.present(views_of(binding))
    output = (weight * weight).sum()
    binding.forbid_backward()
    binding.absent()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()
    binding.restore(handed_back)


def test_a_backward_that_saved_an_index_buffer_raises_once_it_is_gone() -> None:
    index, x = torch.tensor([2, 0]), torch.randn(3, requires_grad=True)
    binding = binding_of(index)
    binding.present(views_of(binding))
    output = x[index].sum()
    binding.forbid_backward()
    binding.absent()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()
    binding.restore(handed_back)


def test_gradients_and_hooks_stay_with_the_parameter() -> None:
    weight = nn.Parameter(torch.randn(3))
    weight.sum().backward()
    seen: list[torch.Tensor] = []
    weight.register_hook(seen.append)
    binding = binding_of(weight)
    binding.absent()
    binding.restore(handed_back)
    assert torch.equal(weight.grad, torch.ones(3))
    (weight * 2).sum().backward()
    assert [g.tolist() for g in seen] == [[2.0, 2.0, 2.0]]


# ---- bytes that moved


def test_rehomed_inexactly_lets_go_of_the_original() -> None:
    parameter = nn.Parameter(torch.randn(5, 3).t())
    values, strides = parameter.detach().clone(), parameter.stride()
    storage = parameter.untyped_storage()
    binding = binding_of(parameter)
    (bound,) = binding.tensors
    master = torch.empty_strided(bound.shape, bound.strides).copy_(bound.home)
    binding.rehome(bound, master, keeps_home=False, is_handed_back=False)
    assert torch._C._storage_Use_Count(storage._cdata) == 1, "only this test looks at the original"
    assert parameter.data_ptr() == master.data_ptr()
    binding.absent()
    binding.restore(handed_back)
    assert parameter.data_ptr() != master.data_ptr(), "memory of its own"
    assert parameter.stride() == strides
    assert torch.equal(parameter, values)


def test_rehomed_exactly_keeps_the_original() -> None:
    parameter = nn.Parameter(torch.randn(4, 6)[:, :3])
    before = state(parameter)
    binding = binding_of(parameter)
    (bound,) = binding.tensors
    master = torch.empty_strided(bound.shape, bound.strides).copy_(bound.home)
    binding.rehome(bound, master, keeps_home=True, is_handed_back=False)
    assert bound.master is master
    assert state(parameter) == before
    binding.absent()
    binding.restore(handed_back)
    assert state(parameter) == before


# ---- any layout


@given(st.lists(st.integers(0, 4), max_size=4), st.randoms(use_true_random=False), st.booleans())
def test_any_shape_and_order_of_dimensions(shape: list[int], random: object, is_sliced: bool) -> None:
    order = list(range(len(shape)))
    random.shuffle(order)  # type: ignore[attr-defined]
    tensor = torch.arange(int(torch.tensor(shape).prod()) if shape else 1).reshape([shape[i] for i in order])
    tensor = tensor.permute([order.index(i) for i in range(len(shape))])
    if is_sliced and shape and shape[-1] > 1:
        tensor = tensor[..., 1:]
    before, values = state(tensor), tensor.clone()
    binding = binding_of(tensor)
    assert binding.tensors[0].strides == tensor.to("meta").stride()
    assert binding.tensors[0].num_bytes == tensor.nbytes
    binding.absent()
    assert tensor.stride() == binding.tensors[0].strides
    binding.present(views_of(binding))
    assert torch.equal(tensor, values)
    binding.restore(handed_back)
    assert state(tensor) == before
