"""Absent tensors answer what needs no bytes, and load their unit once for everything else (EXPERIMENTS.md 6, 7)."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerstream.host.home import handed_back
from layerstream.weights.absent import AbsentClasses, AbsentParameter, AbsentTensor, is_absent, nan_scalar
from layerstream.weights.binding import BoundTensor, UnitBinding

CPU = torch.device("cpu")


class ToyLoader:
    """Units of tensors, one per call of `add`; `loads` lists the unit numbers of every load."""

    def __init__(self) -> None:
        self.loads: list[list[int]] = []
        self.classes = AbsentClasses(self.reading)
        self.bindings: list[UnitBinding] = []
        self._views: list[list[torch.Tensor]] = []

    def add(self, *tensors: torch.Tensor) -> int:
        unit = len(self.bindings)
        binding = UnitBinding([BoundTensor(f"t{i}", t) for i, t in enumerate(tensors)])
        binding.prepare(unit, lambda dtype: nan_scalar(dtype, CPU), self.classes)
        self.bindings.append(binding)
        self._views.append([self._view(b) for b in binding.tensors])
        binding.absent()
        return unit

    @staticmethod
    def _view(bound: BoundTensor) -> torch.Tensor:
        view = torch.empty_strided(bound.shape, bound.strides, dtype=bound.dtype)
        return view.copy_(bound.home)

    @contextlib.contextmanager
    def reading(self, units: Sequence[int]) -> Iterator[None]:
        self.load(units)
        yield

    def load(self, units: Sequence[int]) -> None:
        self.loads.append(list(units))
        for unit in units:
            self.bindings[unit].present(self._views[unit])

    def evict(self, unit: int) -> None:
        self.bindings[unit].absent()

    def restore(self) -> None:
        for binding in self.bindings:
            binding.restore(handed_back)


@pytest.fixture
def loader() -> Iterator[ToyLoader]:
    loader = ToyLoader()
    yield loader
    loader.restore()


def weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    values = torch.randn(shape or (), generator=torch.Generator().manual_seed(seed)).to(dtype)
    return nn.Parameter(values, requires_grad=False)


# ---- what is answered without the bytes

METADATA: dict[str, Callable[[torch.Tensor], Any]] = {
    "shape": lambda t: t.shape,
    "size": lambda t: (t.size(), t.size(0)),
    "dim": lambda t: (t.dim(), t.ndim, t.ndimension()),
    "numel": lambda t: (t.numel(), t.nelement(), torch.numel(t)),
    "len": lambda t: len(t),
    "dtype": lambda t: t.dtype,
    "device": lambda t: (t.device, t.get_device(), t.is_cuda, t.is_cpu, t.is_meta, t.is_mps, t.is_xpu),
    "layout": lambda t: (t.layout, t.is_sparse, t.is_sparse_csr, t.is_quantized, t.is_nested, t.is_mkldnn),
    "bytes": lambda t: (t.nbytes, t.itemsize, t.element_size()),
    "kind": lambda t: (t.is_floating_point(), t.is_complex(), t.is_signed(), torch.is_floating_point(t)),
    "views": lambda t: (t.is_conj(), t.is_neg(), t.is_inference()),
    "grad": lambda t: (t.requires_grad, t.is_leaf, t.grad, t.grad_fn, t.retains_grad, t.output_nr),
    "stride": lambda t: (t.stride(), t.stride(0), t.stride(-1), t.storage_offset()),
    "contiguous": lambda t: (t.is_contiguous(), t.is_contiguous(memory_format=torch.contiguous_format)),
    "dim_order": lambda t: t.dim_order(),
    "is_tensor": lambda t: (torch.is_tensor(t), isinstance(t, torch.Tensor), isinstance(t, nn.Parameter)),
    "hash": lambda t: hash(t) == id(t),
    "same_size": lambda t: t.is_same_size(torch.empty(3, 5)),
}


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("is_parameter", [True, False])
def test_metadata_is_answered_and_loads_nothing(loader: ToyLoader, name: str, is_parameter: bool) -> None:
    values = torch.randn(5, 3).t()  # (3, 5), strides (1, 3)
    tensor: torch.Tensor = nn.Parameter(values) if is_parameter else values
    expected = METADATA[name](tensor)
    loader.add(tensor)
    assert METADATA[name](tensor) == expected
    assert loader.loads == []
    assert is_absent(tensor)
    assert isinstance(tensor, AbsentParameter if is_parameter else AbsentTensor)
    assert type(tensor).__name__ == ("AbsentParameter" if is_parameter else "AbsentTensor")


def test_true_strides_of_every_kind(loader: ToyLoader) -> None:
    conv = weight(2, 3, 4, 4).data.to(memory_format=torch.channels_last)
    loader.add(conv, torch.randn(4, 6)[:, :3], torch.randn(3, 1).expand(3, 4))
    (channels_last, sliced, expanded) = (b.tensor for b in loader.bindings[0].tensors)
    assert channels_last.stride() == (48, 1, 12, 3)
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    assert not channels_last.is_contiguous()
    assert sliced.stride() == (3, 1), "as on the device, where it is packed"
    assert expanded.stride() == (4, 1)
    assert sliced.is_contiguous()
    assert loader.loads == []


def test_setters_that_need_no_bytes(loader: ToyLoader) -> None:
    parameter = weight(3)
    loader.add(parameter)
    parameter.requires_grad = True
    assert parameter.requires_grad
    assert parameter.requires_grad_(False) is parameter
    assert not parameter.requires_grad
    parameter.grad = None
    assert loader.loads == []
    assert is_absent(parameter)


def test_walks_over_a_module_load_nothing(loader: ToyLoader) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    loader.add(*module.parameters(), *module.buffers())
    assert len(list(module.named_parameters())) == 4
    assert sum(p.numel() for p in module.parameters()) == 18
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert {b.device for b in module.buffers()} == {CPU}
    module.requires_grad_(False).eval()
    assert module.state_dict(keep_vars=True)["0.weight"] is module[0].weight
    assert loader.loads == []


# ---- what loads

USES: dict[str, Callable[[torch.Tensor], Any]] = {
    "data": lambda t: t.data,
    "T": lambda t: t.T,
    "mT": lambda t: t.mT,
    "real": lambda t: t.real,
    "detach": lambda t: t.detach(),
    "clone": lambda t: t.clone(),
    "view": lambda t: t.view(-1),
    "getitem": lambda t: t[1],
    "iteration": lambda t: list(t),
    "contiguous": lambda t: t.contiguous(),
    "to": lambda t: t.to(torch.float64),
    "half": lambda t: t.half(),
    "numpy": lambda t: t.detach().numpy(),
    "asarray": lambda t: t.__array__(),
    "tolist": lambda t: t.tolist(),
    "item": lambda t: t[0, 0].item(),
    "repr": lambda t: repr(t),
    "format": lambda t: f"{t[0, 0]:.3f}",
    "bool": lambda t: bool((t == t).all()),
    "contains": lambda t: 0.0 in t,
    "copy": lambda t: copy.copy(t),
    "deepcopy": lambda t: copy.deepcopy(t),
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "save": lambda t: saved(t),
    "add": lambda t: t + 1,
    "radd": lambda t: 1 + t,
    "equal": lambda t: torch.equal(t, t),
    "cat": lambda t: torch.cat([t, torch.ones(1, 3), t]),
    "stack": lambda t: torch.stack((t, t)),
    "linear": lambda t: F.linear(torch.ones(2, 3), t),
    "linear by name": lambda t: F.linear(input=torch.ones(2, 3), weight=t),
    "matmul": lambda t: torch.ones(2, 4) @ t,
    "out": lambda t: torch.add(torch.ones(4, 3), 1, out=torch.empty_like(t.detach())),
    "einsum": lambda t: torch.einsum("ij,kj->ik", torch.ones(2, 3), t),
    "norm": lambda t: torch.linalg.norm(t),
    "isnan": lambda t: t.isnan().any(),
    "data_ptr": lambda t: t.data_ptr() != 0,
    "storage": lambda t: t.untyped_storage().nbytes(),
    "empty_like": lambda t: torch.empty_like(t).shape,
    "new_zeros": lambda t: t.new_zeros(2),
    "type cast": lambda t: t.type(torch.float64),
    "dlpack": lambda t: torch.utils.dlpack.from_dlpack(t.detach()),
    "is_shared": lambda t: t.is_shared(),
    "requires a view": lambda t: t.expand(2, 4, 3).sum(0),
}


def saved(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return type(a) is type(b) and a.dtype is b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("is_parameter", [True, False])
def test_every_other_use_loads_once_and_gives_the_true_values(loader: ToyLoader, name: str, is_parameter: bool) -> None:
    tensor: torch.Tensor = weight(4, 3) if is_parameter else weight(4, 3).data
    expected = USES[name](tensor)
    loader.add(tensor)
    result = USES[name](tensor)
    assert loader.loads == [[0]]
    assert same(result, expected)
    assert type(tensor) is (nn.Parameter if is_parameter else torch.Tensor), "it stays present until evicted"
    assert same(USES[name](tensor), expected)
    assert loader.loads == [[0]]


def test_the_object_stays_the_same(loader: ToyLoader) -> None:
    module = nn.Linear(3, 3)
    parameter, key = module.weight, id(module.weight)
    loader.add(module.weight)
    assert module.weight is parameter
    loader.load([0])
    assert module.weight is parameter
    loader.evict(0)
    assert module.weight is parameter
    assert id(parameter) == key
    assert {parameter: 1}[module.weight] == 1


def test_a_touch_loads_the_whole_unit(loader: ToyLoader) -> None:
    first, second = weight(2), weight(3)
    loader.add(first, second)
    first.sum()
    assert not is_absent(second)
    assert loader.loads == [[0]]


def test_one_operation_loads_all_its_units_together(loader: ToyLoader) -> None:
    a, b, c = weight(1, 2, seed=1), weight(1, 2, seed=2), weight(1, 2, seed=3)
    expected = torch.cat([a, b, c, a])
    for tensor in (a, b, c):
        loader.add(tensor)
    assert torch.equal(torch.cat([a, {"x": (b,)}["x"][0], c, a]), expected)
    assert loader.loads == [[0, 1, 2]]


def test_one_operation_over_two_loaders(loader: ToyLoader) -> None:
    other = ToyLoader()
    a, b = weight(2, seed=1), weight(2, seed=2)
    expected = a + b
    loader.add(a)
    other.add(b)
    assert torch.equal(a + b, expected)
    assert (loader.loads, other.loads) == ([[0]], [[0]])
    other.restore()


def test_in_place_writes_land_in_the_bytes(loader: ToyLoader) -> None:
    parameter = weight(3)
    before = parameter.detach().clone()
    loader.add(parameter)
    with torch.no_grad():
        parameter.mul_(2)
        parameter += 1
        parameter[0] = 7
    assert loader.loads == [[0]]
    assert torch.equal(parameter[1:], before[1:] * 2 + 1)
    assert parameter[0] == 7
    assert [b.tensor is parameter for b in loader.bindings[0].written()] == [True]


def test_setting_data_replaces_the_bytes(loader: ToyLoader) -> None:
    parameter = weight(3)
    loader.add(parameter)
    parameter.data = torch.ones(3)
    assert torch.equal(parameter, torch.ones(3))
    assert [b.tensor is parameter for b in loader.bindings[0].written()] == [True]


# ---- copies are plain


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t)), saved])
def test_copies_are_plain_and_keep_what_was_there(loader: ToyLoader, make: Callable[[Any], Any]) -> None:
    parameter = nn.Parameter(torch.randn(3), requires_grad=True)
    buffer = torch.arange(4)
    values = parameter.detach().clone()
    loader.add(parameter, buffer)
    copies = make([parameter, buffer]) if make is not copy.copy else [copy.copy(parameter), copy.copy(buffer)]
    assert [type(c) for c in copies] == [nn.Parameter, torch.Tensor]
    assert copies[0].requires_grad
    loader.evict(0)
    assert torch.equal(copies[0], values)
    assert torch.equal(copies[1], torch.arange(4))
    assert vars(copies[0]) == {}, "nothing of ours travels along"


def test_a_module_copied_while_absent_is_independent(loader: ToyLoader) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    x = torch.randn(2, 3)
    expected = module(x)
    loader.add(*module.parameters(), *module.buffers())
    twin = copy.deepcopy(module)
    loader.evict(0)
    loads = list(loader.loads)
    assert torch.equal(twin(x), expected)
    assert loader.loads == loads
    assert all(type(t) in (nn.Parameter, torch.Tensor) for t in [*twin.parameters(), *twin.buffers()])


def test_a_tied_parameter_is_copied_once(loader: ToyLoader) -> None:
    module = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    module[1].weight = module[0].weight
    loader.add(module[0].weight)
    twin = copy.deepcopy(module)
    assert twin[1].weight is twin[0].weight
    assert twin[0].weight is not module[0].weight


def test_state_dict_and_load_state_dict(loader: ToyLoader) -> None:
    module = nn.Linear(3, 3)
    expected = {k: v.clone() for k, v in module.state_dict().items()}
    loader.add(*module.parameters())
    state = module.state_dict()
    assert all(type(v) is torch.Tensor and torch.equal(v, expected[k]) for k, v in state.items())
    loader.evict(0)
    module.load_state_dict({k: v + 1 for k, v in expected.items()})
    assert torch.equal(module.weight, expected["weight"] + 1)


# ---- fast paths


def test_nothing_asks_for_torch_function_after_the_first_touch(loader: ToyLoader) -> None:
    parameter = weight(3)
    loader.add(parameter)
    assert torch.overrides.has_torch_function((parameter,))
    parameter.sum()
    assert not torch.overrides.has_torch_function((parameter,))


def test_layers_that_read_their_own_weights(loader: ToyLoader) -> None:
    torch.manual_seed(0)
    layers = [
        nn.MultiheadAttention(8, 2, batch_first=True).eval(),
        nn.LSTM(8, 8, batch_first=True).eval(),
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    ]
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        for layer in layers:
            call = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
            expected = layer(*call)
            unit = loader.add(*layer.parameters())
            result = layer(*call)
            assert torch.equal(
                result[0] if isinstance(result, tuple) else result,
                expected[0] if isinstance(expected, tuple) else expected,
            )
            assert loader.loads[-1] == [unit]


# ---- dtypes and shapes

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    *(
        getattr(torch, n)
        for n in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e8m0fnu", "uint16", "uint32")
        if hasattr(torch, n)
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (), (0, 4), (1,)], ids=str)
def test_every_dtype_and_shape(loader: ToyLoader, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    num_bytes = torch.empty(shape, dtype=dtype).nbytes
    raw = torch.arange(num_bytes, dtype=torch.uint8) % 2
    tensor = raw.view(dtype).reshape(shape) if num_bytes else torch.empty(shape, dtype=dtype)
    loader.add(tensor)
    assert (tensor.dtype, tuple(tensor.shape), tensor.device) == (dtype, shape, CPU)
    assert loader.loads == []
    assert torch.equal(tensor.detach().contiguous().reshape(-1).view(torch.uint8), raw)
    assert loader.loads == [[0]]


@pytest.mark.parametrize("name", [n for n in ("float4_e2m1fn_x2",) if hasattr(torch, n)])
def test_a_dtype_that_torch_can_hardly_compute_with(loader: ToyLoader, name: str) -> None:
    raw = torch.arange(12, dtype=torch.uint8)
    tensor = raw.view(getattr(torch, name))
    loader.add(tensor)
    assert tensor.dtype is getattr(torch, name)
    assert torch.equal(tensor.view(torch.uint8), raw)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_requires_grad_is_kept(loader: ToyLoader, requires_grad: bool) -> None:
    parameter = nn.Parameter(torch.randn(3), requires_grad=requires_grad)
    loader.add(parameter)
    assert parameter.requires_grad is requires_grad
    loader.load([0])
    assert parameter.requires_grad is requires_grad
    loader.evict(0)
    loader.restore()
    assert parameter.requires_grad is requires_grad


# ---- what slips past


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_a_bypass_meets_nan(loader: ToyLoader, dtype: torch.dtype) -> None:
    tensor = torch.ones(3, 3, dtype=dtype)
    loader.add(tensor)
    with torch._C.DisableTorchFunctionSubclass():
        seen = tensor + 0
    assert torch.view_as_real(seen.to(torch.complex64)).isnan().any(-1).all()
    assert loader.loads == []


FLOATS = ["float64", "float32", "float16", "bfloat16", "complex64", "complex128"]
FLOATS += ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]


@pytest.mark.parametrize("name", [n for n in FLOATS if hasattr(torch, n)])
def test_what_absent_tensors_lie_over_is_nan_in_every_dtype_that_has_one(name: str) -> None:
    assert nan_scalar(getattr(torch, name), CPU).to(torch.complex128).isnan()


BYPASSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "torch.tensor": lambda t: torch.tensor(t),
    "torch.as_tensor": lambda t: torch.as_tensor(t),
    "torch.asarray": lambda t: torch.asarray(t),
    "torch.tensor of a list": lambda t: torch.tensor([t[0], t[1]]),
    "nn.Parameter": lambda t: nn.Parameter(t, requires_grad=False).data,
    "from_dlpack": lambda t: torch.from_dlpack(t),
    "TensorDataset": lambda t: torch.utils.data.TensorDataset(t)[1][0],
    "as_subclass": lambda t: t.as_subclass(torch.Tensor),
    "set_data of another": lambda t: set_data(torch.empty(0), t),
}


def set_data(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    target.data = value
    return target


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("name", BYPASSES)
def test_ways_around_operators_never_give_garbage(loader: ToyLoader, name: str, dtype: torch.dtype) -> None:
    """They load, or they give what is loud: NaN, and the lowest of the integers."""
    tensor = torch.arange(1, 4).to(dtype)
    expected = BYPASSES[name](tensor)
    loader.add(tensor)
    seen = BYPASSES[name](tensor)
    is_loud = seen.isnan() if dtype.is_floating_point else seen == torch.iinfo(dtype).min
    assert torch.equal(seen, expected) or bool(is_loud.all())
