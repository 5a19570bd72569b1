"""Dividing components into units: every tensor has one owner, and what cannot move as plain bytes is listed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from layerstream.blocks import unit_bytes
from layerstream.errors import AdapterError, PipelineError
from layerstream.model import units as units_module
from layerstream.model.units import ComponentLayout, Division, StackLayout, Unit, divide, part_of


def component(root: nn.Module, *stacks: str, name: str = "net", is_repeated: bool = False) -> ComponentLayout:
    layouts = tuple(
        StackLayout(s, tuple((f"{s}.{n}", m) for n, m in root.get_submodule(s).named_children())) for s in stacks
    )
    return ComponentLayout(name, root, layouts, is_repeated)


def owned(division: Division) -> dict[str, list[str]]:
    """The names of the tensors of each unit."""
    return {u.spec.name: [b.name for b in u.binding.tensors] for u in division.units}


def owner_of(division: Division, tensor: torch.Tensor) -> str:
    owners = [u.spec.name for u in division.units if any(b.tensor is tensor for b in u.binding.tensors)]
    assert len(owners) == 1, f"owners: {owners}"
    return owners[0]


def all_tensors(root: nn.Module) -> list[torch.Tensor]:
    return [*root.parameters(), *root.buffers()]


class Net(nn.Module):
    """Two stacks, a base, and a bare parameter and buffers on modules that have children."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.down = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
        self.bare = nn.Parameter(torch.randn(4))
        self.register_buffer("table", torch.arange(6), persistent=False)
        self.down[1].gate = nn.Parameter(torch.tensor(1.5))
        self.down[2].register_buffer("mask", torch.ones(3, dtype=torch.bool), persistent=False)
        self.down[2].register_buffer("nothing", None)
        self.down[0].register_parameter("absent", None)
        self.down[0].empty = nn.Parameter(torch.empty(0, 4))


def test_every_tensor_has_one_owner() -> None:
    net = Net()
    division = divide([component(net, "down", "up")])
    for tensor in all_tensors(net):
        owner_of(division, tensor)
    assert sum(len(u.binding.tensors) for u in division.units) == len(all_tensors(net))
    assert owned(division) == {
        "net (base)": ["net.bare", "net.table", "net.embed.weight"],
        "net.down.0": [
            "net.down.0.empty",
            "net.down.0.0.weight",
            "net.down.0.0.bias",
            *(f"net.down.0.1.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        ],
        "net.down.1": [
            "net.down.1.gate",
            "net.down.1.0.weight",
            "net.down.1.0.bias",
            *(f"net.down.1.1.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        ],
        "net.down.2": [
            "net.down.2.mask",
            "net.down.2.0.weight",
            "net.down.2.0.bias",
            *(f"net.down.2.1.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        ],
        "net.up.0": ["net.up.0.weight"],
        "net.up.1": ["net.up.1.weight"],
    }


def test_specs_describe_their_units() -> None:
    net = Net()
    division = divide([component(net, "down", "up", is_repeated=True), component(nn.Linear(2, 2), name="head")])
    specs = [u.spec for u in division.units]
    assert [s.index for s in specs] == list(range(len(specs)))
    assert [(s.name, s.component, s.stack) for s in specs] == [
        ("net (base)", "net", None),
        ("net.down.0", "net", "down"),
        ("net.down.1", "net", "down"),
        ("net.down.2", "net", "down"),
        ("net.up.0", "net", "up"),
        ("net.up.1", "net", "up"),
        ("head (base)", "head", None),
    ]
    assert [s.is_repeated for s in specs] == [True] * 6 + [False]
    for unit in division.units:
        assert unit.spec.num_bytes == unit_bytes(b.tensor.nbytes for b in unit.binding.tensors)
        assert unit.spec.is_block is (unit.module is not None)
    assert division.units[4].module is net.up[0]


def test_dividing_changes_nothing() -> None:
    net = Net()
    before = [(id(t), t.data_ptr(), type(t), t._version, t.stride()) for t in all_tensors(net)]
    values = copy.deepcopy(net.state_dict())
    divide([component(net, "down", "up")])
    assert [(id(t), t.data_ptr(), type(t), t._version, t.stride()) for t in all_tensors(net)] == before
    for name, value in net.state_dict().items():
        assert torch.equal(value, values[name])


def test_shapes_dtypes_and_strides_are_those_of_the_device() -> None:
    block = nn.Module()
    block.zero = nn.Parameter(torch.empty(0, 3))
    block.scalar = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    block.transposed = nn.Parameter(torch.randn(3, 5).t())
    block.conv = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    block.sliced = nn.Parameter(torch.randn(4, 6)[:, :3])
    block.register_buffer("expanded", torch.randn(3, 1).expand(3, 4))
    root = nn.Module()
    root.stack = nn.ModuleList([block])
    (unit,) = divide([component(root, "stack")]).units
    bound = {b.name.rpartition(".")[2]: b for b in unit.binding.tensors}
    assert {n: (b.shape, b.strides, b.is_dense) for n, b in bound.items()} == {
        "zero": ((0, 3), (3, 1), True),
        "scalar": ((), (), True),
        "transposed": ((5, 3), (1, 5), True),
        "conv": ((2, 3, 4, 4), (48, 1, 12, 3), True),
        "sliced": ((4, 3), (3, 1), False),
        "expanded": ((3, 4), (4, 1), False),
    }
    for name, b in bound.items():
        tensor = getattr(block, name)
        assert b.dtype is tensor.dtype
        assert b.home.data_ptr() == tensor.data_ptr()
        assert b.strides == tensor.to("meta").stride(), "what `.to(device)` makes of it"


# ---- what is shared


def stacked(*blocks: nn.Module) -> Any:
    root = nn.Module()
    root.stack = nn.ModuleList(blocks)
    root.head = nn.Linear(4, 4)
    return root


def test_parameter_tied_by_its_object_belongs_to_the_base() -> None:
    root = stacked(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    root.stack[2].weight = root.stack[0].weight
    root.head.bias = root.stack[1].bias
    division = divide([component(root, "stack")])
    assert owner_of(division, root.stack[0].weight) == "net (base)"
    assert owner_of(division, root.head.bias) == "net (base)"
    assert owned(division)["net.stack.0"] == ["net.stack.0.bias"]
    assert owned(division)["net.stack.2"] == ["net.stack.2.bias"]
    assert len([p for p in division.places if p.tensor is root.stack[0].weight]) == 2


def test_parameters_tied_by_their_bytes_belong_to_the_base() -> None:
    root = stacked(nn.Linear(4, 4), nn.Linear(4, 4))
    root.stack[1].weight.data = root.stack[0].weight.data
    division = divide([component(root, "stack")])
    assert owner_of(division, root.stack[0].weight) == "net (base)"
    assert owner_of(division, root.stack[1].weight) == "net (base)"


def test_tied_within_one_block_stays_in_the_block() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    block[1].weight = block[0].weight
    block[1].bias.data = block[0].bias.data
    division = divide([component(stacked(block, nn.Linear(4, 4)), "stack")])
    assert owned(division)["net.stack.0"] == ["net.stack.0.0.weight", "net.stack.0.0.bias", "net.stack.0.1.bias"]


def test_overlapping_views_of_one_storage_belong_to_the_base() -> None:
    """A fused weight in one block, and a view of a part of it in another: in-place writes are seen through both."""
    root = stacked(nn.Linear(4, 12, bias=False), nn.Linear(4, 4, bias=False))
    root.stack[1].weight.data = root.stack[0].weight.data[:4]
    division = divide([component(root, "stack")])
    assert owner_of(division, root.stack[0].weight) == "net (base)"
    assert owner_of(division, root.stack[1].weight) == "net (base)"


def test_disjoint_views_of_one_storage_are_not_shared() -> None:
    flat = torch.randn(8, 4)
    root = stacked(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    root.stack[0].weight.data, root.stack[1].weight.data = flat[:4], flat[4:]
    division = divide([component(root, "stack")])
    assert owner_of(division, root.stack[0].weight) == "net.stack.0"
    assert owner_of(division, root.stack[1].weight) == "net.stack.1"


def test_module_shared_by_two_blocks_belongs_to_the_base() -> None:
    shared = nn.LayerNorm(4)
    root = stacked(nn.Sequential(nn.Linear(4, 4), shared), nn.Sequential(nn.Linear(4, 4), shared))
    division = divide([component(root, "stack")])
    assert owner_of(division, shared.weight) == owner_of(division, shared.bias) == "net (base)"
    assert owned(division)["net.stack.1"] == ["net.stack.1.0.weight", "net.stack.1.0.bias"]


def test_module_shared_by_a_block_and_the_base_belongs_to_the_base() -> None:
    root = stacked(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.Linear(4, 4))
    root.norm = root.stack[0][1]
    division = divide([component(root, "stack")])
    assert owner_of(division, root.norm.weight) == "net (base)"


def test_tied_across_components_has_one_owner() -> None:
    first, second = stacked(nn.Linear(4, 4), nn.Linear(4, 4)), stacked(nn.Linear(4, 4), nn.Linear(4, 4))
    second.stack[0].weight = first.stack[0].weight
    division = divide([component(first, "stack", name="a"), component(second, "stack", name="b")])
    assert owner_of(division, first.stack[0].weight) == "a (base)"


def test_a_part_of_a_division_is_what_dividing_the_part_gives() -> None:
    roots = [stacked(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(4)]
    roots[2].stack[0].weight = roots[0].stack[0].weight
    with torch.inference_mode():
        roots[1].made = nn.Linear(3, 3)
    layouts = [component(root, "stack", name=name) for root, name in zip(roots, "abcd", strict=True)]
    whole = divide(layouts)
    for names in ("ac", "b", "d"):
        group = [layout for layout in layouts if layout.name in names]
        part, alone = part_of(whole, group), divide(group)
        assert [u.spec.name for u in part.units] == [u.spec.name for u in alone.units]
        for mine, its in zip(part.units, alone.units, strict=True):
            assert [b.name for b in mine.binding.tensors] == [b.name for b in its.binding.tensors]
        assert part.places == alone.places
        assert [place for place, _ in part.stand_ins] == [place for place, _ in alone.stand_ins]
        assert bool(part.stand_ins) is (names == "b")


def test_zero_size_tensors_are_not_taken_for_tied() -> None:
    root = stacked(nn.Linear(4, 4), nn.Linear(4, 4))
    for block in root.stack:
        block.empty = nn.Parameter(torch.empty(0))
    division = divide([component(root, "stack")])
    assert [owner_of(division, b.empty) for b in root.stack] == ["net.stack.0", "net.stack.1"]


def test_units_without_tensors_do_not_exist() -> None:
    root = nn.Module()
    root.stack = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])
    assert list(owned(divide([component(root, "stack")]))) == ["net.stack.0"]
    assert divide([]).units == []


# ---- wrong descriptions


def test_block_listed_twice() -> None:
    root = stacked(nn.Linear(4, 4), nn.Linear(4, 4))
    layout = component(root, "stack", "stack")
    with pytest.raises(AdapterError) as error:
        divide([layout])
    assert str(error.value) == (
        "`net.stack.0` and `net.stack.0` overlap: one block is inside, or the same as, another. "
        "Each block of `net` must be listed once, and no stack inside another."
    )


def test_block_inside_a_block() -> None:
    root = nn.Module()
    root.outer = nn.ModuleList([nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))])
    with pytest.raises(AdapterError, match=r"`net\.outer\.0\.0\.0` and `net\.outer\.0` overlap"):
        divide([component(root, "outer", "outer.0.0")])


def test_meta_tensors_have_nothing_to_stream() -> None:
    root = stacked(nn.Linear(4, 4), nn.Linear(4, 4))
    root.stack[1].to("meta")
    with pytest.raises(PipelineError) as error:
        divide([component(root, "stack")])
    assert str(error.value).startswith("`net.stack.1.weight` is on the meta device: it has no bytes to stream.")


# ---- what does not move as plain bytes


class Subclass(torch.Tensor):
    pass


class Special(nn.Parameter):
    pass


def others(root: nn.Module) -> list[str]:
    return [p.name for places in divide([component(root, "stack")]).others.values() for p in places]


def nested_tensor(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=layout)


def strange_tensors() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says of each that it is a prototype
        return {
            "subclass": torch.randn(3).as_subclass(Subclass),
            "sparse": torch.eye(3).to_sparse(),
            "csr": torch.eye(3).to_sparse_csr(),
            "quantised": torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8),
            "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
            "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
            "nested": nested_tensor(torch.strided),
            "jagged": nested_tensor(torch.jagged),
        }


@pytest.mark.parametrize("kind", strange_tensors())
def test_strange_buffers_are_listed_and_stay_whole(kind: str) -> None:
    root = stacked(nn.Linear(4, 4), nn.Linear(4, 4))
    root.stack[1].register_buffer("strange", strange_tensors()[kind])
    division = divide([component(root, "stack")])
    (place,) = division.others["net"]
    assert (place.module, place.kind, place.name) == (root.stack[1], "_buffers", "strange")
    assert place.tensor is root.stack[1].strange
    assert not any("strange" in name for names in owned(division).values() for name in names)
    assert all(p.tensor is not place.tensor for p in division.places)


def test_parameter_subclass_is_listed() -> None:
    root = stacked(nn.Linear(4, 4), nn.Linear(4, 4))
    root.stack[0].weight = Special(torch.randn(4, 4))
    assert others(root) == ["weight"]


def test_meta_tensor_of_a_strange_type_is_no_reason_to_refuse() -> None:
    root = stacked(nn.Linear(4, 4), nn.Linear(4, 4))
    root.stack[0].register_buffer("strange", torch.randn(3, device="meta").as_subclass(Subclass))
    assert others(root) == ["strange"]


# ---- inference tensors


def test_inference_tensors_get_stand_ins_over_the_same_bytes() -> None:
    with torch.inference_mode():
        root = stacked(nn.Linear(4, 4), nn.Linear(4, 4))
    root.stack[1].bias = root.stack[0].bias
    division = divide([component(root, "stack")])
    assert len(division.stand_ins) == len(division.places) == 6
    for place, stand_in in division.stand_ins:
        assert not stand_in.is_inference()
        assert type(stand_in) is type(place.tensor)
        assert stand_in.data_ptr() == place.tensor.data_ptr()
        assert stand_in.requires_grad == place.tensor.requires_grad
    shared = {id(s) for p, s in division.stand_ins if p.tensor is root.stack[0].bias}
    assert len(shared) == 1, "tied parameters have one stand-in"
    assert owned(division)["net (base)"] == ["net.stack.0.bias", "net.head.weight", "net.head.bias"]


# ---- pieces of large blocks


class Wide(nn.Module):
    """A block with tensors of 400, 40, 200, 160 and 0 bytes, of which two are one."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(100))
        self.b = nn.Parameter(torch.zeros(10))
        self.c = nn.Parameter(torch.zeros(50))
        self.d = nn.Parameter(torch.zeros(40))
        self.e = nn.Parameter(torch.zeros(0))
        self.tied = self.a  # and one more name


def wide_units(piece_bytes: int, monkeypatch: pytest.MonkeyPatch, count: int = 2) -> list[Unit]:
    monkeypatch.setattr(units_module, "PIECE_BYTES", piece_bytes)
    root = nn.Module()
    root.blocks = nn.ModuleList(Wide() for _ in range(count))
    stack = StackLayout("blocks", tuple((f"blocks.{n}", block) for n, block in enumerate(root.blocks)))
    return divide([ComponentLayout("net", root, (stack,))]).units


def test_a_large_block_is_cut_into_pieces_of_about_equal_size(monkeypatch: pytest.MonkeyPatch) -> None:
    found = wide_units(400, monkeypatch)
    assert [u.spec.name for u in found] == [
        "net.blocks.0 (1 of 2)", "net.blocks.0 (2 of 2)", "net.blocks.1 (1 of 2)", "net.blocks.1 (2 of 2)",
    ]  # fmt: skip
    assert [u.spec.index for u in found] == [0, 1, 2, 3]
    assert {u.spec.block_name for u in found} == {"net.blocks.0", "net.blocks.1"}
    assert all(u.spec.is_block and u.spec.stack == "blocks" for u in found)
    assert [[b.name[-1] for b in u.binding.tensors] for u in found[:2]] == [["a"], ["b", "c", "d", "e"]]
    assert found[0].module is found[1].module, "the hooks of one block bring all of its pieces"


@pytest.mark.parametrize("piece_bytes", [800, 100_000])
def test_a_block_that_is_not_much_larger_than_a_piece_stays_whole(
    piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = wide_units(piece_bytes, monkeypatch)
    assert [u.spec.name for u in found] == ["net.blocks.0", "net.blocks.1"]
    assert [u.spec.block for u in found] == [None, None]
    assert [u.spec.block_name for u in found] == ["net.blocks.0", "net.blocks.1"]


@pytest.mark.parametrize("piece_bytes", [1, 50, 150, 300])
def test_no_tensor_is_lost_or_cut(piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = wide_units(piece_bytes, monkeypatch, count=1)
    names = [b.name for u in found for b in u.binding.tensors]
    assert names == [f"net.blocks.0.{n}" for n in "abcde"]
    assert all(u.binding.tensors for u in found)


def test_tensors_that_share_memory_are_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units_module, "PIECE_BYTES", 100)
    block = nn.Module()
    block.first = nn.Parameter(torch.zeros(100))
    block.between = nn.Parameter(torch.zeros(100))
    block.last = nn.Parameter(torch.zeros(0))
    block.last.data = block.first.data[50:]
    root = nn.Module()
    root.blocks = nn.ModuleList([block])
    found = divide([ComponentLayout("net", root, (StackLayout("blocks", (("blocks.0", block),)),))]).units
    homes = {b.name.rsplit(".", 1)[-1]: u.spec.index for u in found for b in u.binding.tensors}
    assert homes["first"] == homes["last"] != homes["between"]


def test_neighbours_in_one_storage_are_not_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """As all weights of a mapped file are."""
    monkeypatch.setattr(units_module, "PIECE_BYTES", 400)
    storage = torch.zeros(400)
    block = nn.Module()
    for number in range(4):
        block.register_parameter(f"p{number}", nn.Parameter(storage[100 * number : 100 * number + 100]))
    root = nn.Module()
    root.blocks = nn.ModuleList([block])
    found = divide([ComponentLayout("net", root, (StackLayout("blocks", (("blocks.0", block),)),))]).units
    assert [len(u.binding.tensors) for u in found] == [1, 1, 1, 1]
