"""Random weights for models built from their configs: skip the slow initialisers, then fill in place.

[Note: pool] Drawing a normal value per weight takes minutes for tens of GB, because torch draws on one thread of the
CPU. So values are drawn once into a flat *pool* and copied from it at offsets that shift with every copy. A copy runs
on all threads of torch (for pages touched the first time, that is what makes it fast), and two tensors of a model do
not start at the same place of the pool. A model smaller than the pool gets values of its own everywhere.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

INIT_FUNCTIONS = (
    "uniform_",
    "normal_",
    "trunc_normal_",
    "constant_",
    "ones_",
    "zeros_",
    "eye_",
    "dirac_",
    "xavier_uniform_",
    "xavier_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "orthogonal_",
    "sparse_",
)
# Layers whose reset_parameters touches parameters only. Batch norms are left alone: theirs also resets the running
# statistics, which are buffers, and no buffer may stay uninitialised.
RESET_LAYERS: tuple[Any, ...] = (
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.modules.conv._ConvNd,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
# These import functions of nn.init by name, so that a patch of nn.init alone does not reach them.
INIT_IMPORTERS = ("torch.nn.init", "torch.nn.modules.activation", "torch.nn.modules.transformer")
# Where transformers keeps the functions of nn.init as they were when it was imported (version 5, then 4).
INIT_TABLES = (
    ("transformers.initialization", "TORCH_INIT_FUNCTIONS"),
    ("transformers.modeling_utils", "TORCH_INIT_FUNCTIONS"),
)

POOL_VALUES_CPU = 1 << 22  # 8 MB of bf16: drawn in 50 ms, read from the cache of the CPU
POOL_VALUES_CUDA = 1 << 27  # 256 MB of bf16: drawn in milliseconds, few and long copies
# Each turn through the pool starts this much later than the one before, so that a long tensor does not repeat with
# the period of the pool: a multiple of no row length in use, it also keeps rows of a matrix different.
POOL_STRIDE = 12345
VECTOR_STD = 0.01

_skipping = threading.local()
_patch_lock = threading.Lock()
_patch_users = 0
_unpatch: list[Callable[[], None]] = []


@contextmanager
def skip_init() -> Iterator[None]:
    """Let this thread build modules without running their initialisers.

    Inside, the functions of `nn.init` return a parameter as it is, and `reset_parameters` of the common layers does
    nothing; tensors that are no parameters (buffers, slices) are still initialised. Parameters then hold whatever the
    memory held, so follow with `fill_normal_`. Everything is put back on exit, also after an exception. May be nested;
    other threads are not affected.
    """
    global _patch_users
    with _patch_lock:
        if _patch_users == 0:
            _patch()
        _patch_users += 1
    _skipping.depth = _depth() + 1
    try:
        yield
    finally:
        _skipping.depth -= 1
        with _patch_lock:
            _patch_users -= 1
            if _patch_users == 0:
                while _unpatch:
                    _unpatch.pop()()


def _depth() -> int:
    return int(getattr(_skipping, "depth", 0))


def _patch() -> None:
    """Replace every initialiser by a skipping one; `_unpatch` receives what puts them back."""
    skipping = {name: _skip_parameters(getattr(nn.init, name)) for name in INIT_FUNCTIONS}
    for module_name in INIT_IMPORTERS:
        module = sys.modules[module_name]
        for name, function in skipping.items():
            if hasattr(module, name):
                _unpatch.append(_restorer(setattr, module, name, getattr(module, name)))
                setattr(module, name, function)
    for module_name, table_name in INIT_TABLES:
        table = getattr(sys.modules.get(module_name), table_name, None) or {}
        for name in table.keys() & skipping.keys():
            _unpatch.append(_restorer(dict.__setitem__, table, name, table[name]))
            table[name] = skipping[name]
    for layer in RESET_LAYERS:
        _unpatch.append(_restorer(setattr, layer, "reset_parameters", layer.reset_parameters))
        layer.reset_parameters = _skip_reset(layer.reset_parameters)


def _restorer(function: Callable[..., object], *args: object) -> Callable[[], None]:
    def restore() -> None:
        function(*args)

    return restore


def _skip_parameters(original: Callable[..., Any]) -> Callable[..., Any]:
    # The depth is asked at each call: a library imported inside skip_init keeps this function for good.
    def skipping(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if _depth() and isinstance(tensor, nn.Parameter):
            return tensor
        return original(tensor, *args, **kwargs)

    return skipping


def _skip_reset(original: Callable[..., Any]) -> Callable[..., Any]:
    def skipping(self: nn.Module) -> None:
        if not _depth():
            original(self)

    return skipping


@contextmanager
def unfilled() -> Iterator[None]:
    """Let this thread's `fill_normal_` do nothing, for weights that come from elsewhere: no page of what is built has
    been touched then."""
    before = getattr(_skipping, "is_unfilled", False)
    _skipping.is_unfilled = True
    try:
        yield
    finally:
        _skipping.is_unfilled = before


@torch.no_grad()
def fill_normal_(
    module: nn.Module, *, std: float = 0.02, seed: int = 0, pool_device: torch.device | str | None = None
) -> None:
    """Fill every floating parameter of `module` in place with random normal values.

    Tensors of two or more dimensions get `std` * randn from a pool (see [Note: pool]), the weights of norms 1, biases
    and other vectors 0.01 * randn. A tied parameter is filled once. Buffers are left alone: what a constructor computed
    (inv_freq, position_ids, pos_embed) is right, and `skip_init` leaves none of them uninitialised.

    Args:
        module: Parameters may be on the CPU or on CUDA, in any floating dtype.
        std: Standard deviation of the matrices.
        seed: Same seed, same module, same device of the pool: same bits.
        pool_device: Where values are drawn for parameters on the CPU. "cuda" draws a larger pool in less time; it is
            then copied to the host once, and each parameter is filled from there.
    """
    if getattr(_skipping, "is_unfilled", False):
        return
    pools: dict[tuple[torch.device, torch.dtype], _Pool] = {}
    generators: dict[torch.device, torch.Generator] = {}
    wanted = sum(p.numel() for p in module.parameters() if p.ndim >= 2)
    for owner, name, parameter in _floating_parameters(module):
        if _is_norm_weight(owner, name):
            parameter.fill_(1.0)
        elif parameter.ndim >= 2:
            key = (parameter.device, parameter.dtype)
            if key not in pools:
                drawn_on = torch.device(pool_device or "cpu") if parameter.device.type == "cpu" else parameter.device
                pools[key] = _Pool(wanted, std=std, seed=seed, drawn_on=drawn_on, kept_on=key[0], dtype=key[1])
            pools[key].copy_to_(parameter)
        else:
            device = parameter.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(seed + 1)
            values = torch.randn(parameter.shape, generator=generators[device], device=device)
            parameter.copy_(values.mul_(VECTOR_STD))


class _Pool:
    """Flat normal values [n] of one dtype on one device, handed out at shifting offsets."""

    def __init__(
        self,
        wanted: int,
        *,
        std: float,
        seed: int,
        drawn_on: torch.device,
        kept_on: torch.device,
        dtype: torch.dtype,
    ) -> None:
        size = min(wanted, POOL_VALUES_CUDA if drawn_on.type == "cuda" else POOL_VALUES_CPU)
        generator = torch.Generator(drawn_on).manual_seed(seed)
        values = torch.empty(size, dtype=dtype, device=drawn_on)
        # Drawn in float32 piece by piece: randn in a low precision gives coarser values, and a whole float32
        # copy would be twice the pool.
        for start in range(0, size, POOL_VALUES_CPU):
            piece = values[start : start + POOL_VALUES_CPU]
            piece.copy_(torch.randn(piece.shape, generator=generator, device=drawn_on).mul_(std))
        self.values = values.to(kept_on)
        self.offset = 0
        self.turns = 0

    def copy_to_(self, tensor: torch.Tensor) -> None:
        """Fill `tensor` (any shape, same dtype and device) with the next values."""
        # A channels-last weight has no flat view; its values go through a contiguous twin.
        target = tensor if tensor.is_contiguous() else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        flat = target.view(-1)
        size = self.values.numel()
        done = 0
        while done < flat.numel():
            count = min(flat.numel() - done, size - self.offset)
            flat[done : done + count].copy_(self.values[self.offset : self.offset + count])
            done += count
            self.offset += count
            if self.offset == size:
                self.turns += 1
                self.offset = self.turns * POOL_STRIDE % size
        if target is not tensor:
            tensor.copy_(target)


def _floating_parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield (owner, name in owner, parameter) once for each floating parameter, tied ones at their first owner."""
    seen: set[int] = set()
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_floating_point() and id(parameter) not in seen:
                seen.add(id(parameter))
                yield owner, name, parameter


def _is_norm_weight(owner: nn.Module, name: str) -> bool:
    # By class name, because models bring norms of their own (Qwen2RMSNorm.weight, WanRMS_norm.gamma [C, 1, 1, 1]).
    return name in ("weight", "gamma", "scale") and "norm" in type(owner).__name__.lower()


@torch.no_grad()
def cast_floating_(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast `module` in place as its `from_pretrained(torch_dtype=dtype)` would.

    What the class declares as float32 islands is float32 then, whatever it was built in. Buffers that are not in the
    state dict (inv_freq of rotary embeddings) stay as they are. `module.to(dtype)` would cast both. Tied parameters
    stay tied.
    """
    islands: set[str] = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    # transformers keeps the plain list in float32 for float16 only, diffusers for each lower dtype.
    if dtype == torch.float16 or not type(module).__module__.startswith("transformers."):
        islands |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for prefix, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(_kept_in(islands, prefix, name) or dtype)
        for name, buffer in owner.named_buffers(recurse=False):
            persistent = name not in owner._non_persistent_buffers_set
            if persistent and buffer.is_floating_point():
                # setattr would make a parameter of a buffer that is a Parameter
                owner._buffers[name] = buffer.to(_kept_in(islands, prefix, name) or dtype)


def _kept_in(islands: set[str], prefix: str, name: str) -> torch.dtype | None:
    return None if islands.isdisjoint([*prefix.split("."), name]) else torch.float32
