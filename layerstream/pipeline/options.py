"""What `offload` and `plan` are given, checked: devices, budgets, seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from layerstream.budget import resolve_budget
from layerstream.device.base import Device
from layerstream.device.cuda import CudaDevice, find_device
from layerstream.errors import ArgumentError, BudgetError, DeviceError, brief
from layerstream.host.keeper import Keeper
from layerstream.saying import warn
from layerstream.transfer.helper import Helper

Place: TypeAlias = "torch.device | str | int | Device | None"
Store: TypeAlias = "Place | Sequence[Place]"

PAIRINGS = ("auto", "off")
PACKINGS = ("auto", "ahead", "off")


def device_of(device: torch.device | str | int | Device | None) -> Device:
    if isinstance(device, bool | type) or not isinstance(device, torch.device | str | int | Device | None):
        raise DeviceError(f'device {brief(device)} is not a device. Write "cuda", "cuda:1" or "cpu" (simulated).')
    if isinstance(device, Device):
        return device
    torch_device = find_device(device)
    if torch_device.type != "cpu":
        return CudaDevice(torch_device)
    from layerstream.device.simulated import SimulatedDevice  # beside a GPU nobody needs it

    return SimulatedDevice()


def budget_bytes_on(vram_budget: int | str, device: Device) -> int | None:
    return resolve_budget(
        vram_budget, free_bytes=device.allocated_bytes() + device.free_bytes(), total_bytes=device.total_bytes()
    )


def keepers_of(store: Store, store_budget: int | str, device: Device) -> tuple[list[Keeper], bool]:
    """The GPUs in whose memory units are kept, and whether all must fit there.

    Raises:
        ArgumentError: `store` names the device itself, a GPU twice, or something after the host; or there is a
            `store_budget` without one.
        DeviceError: a GPU does not exist.
        BudgetError: of `store_budget`.
    """
    found = _others("store", store, device)
    if None in found[:-1]:
        raise ArgumentError('"cpu" comes last in `store`: host memory takes all the rest.')
    others = [each for each in found if each is not None]
    if not others and store_budget != "auto":
        raise ArgumentError(
            f"store_budget {brief(store_budget)} is given without a store. Name the GPU that it is of, for instance "
            'store="cuda:1".'
        )
    return [Keeper(each, _store_bytes(store_budget, each), device) for each in others], None not in found


def helpers_of(links: Store, device: Device) -> list[Helper]:
    """The GPUs whose links to the host are used, too: those within reach.

    Raises:
        ArgumentError: `links` names the device itself, the host, or a GPU twice.
        DeviceError: a GPU does not exist.
    """
    found = [] if links is None else _others("links", links, device)
    if None in found:
        raise ArgumentError("links names the host, to which each GPU has a link of its own. Name other GPUs.")
    helpers = [Helper(one, device) for one in found if one is not None]
    for helper in helpers:
        if not helper.is_reached:
            warn(
                f"{helper.name} cannot be reached from {device.label} directly: its link to the host is of no "
                "use, and is not used."
            )
    return [helper for helper in helpers if helper.is_reached]


def checked_store(store: Store, *, name: str = "store") -> Store:
    """`store` as it is.

    Args:
        name: of the argument, for people.

    Raises:
        ArgumentError: it is no device, nor a list of some.
    """
    each = _each(store)
    is_none = not each or (len(each) > 1 and None in each)
    if is_none or any(not isinstance(one, str | torch.device | int | Device | None) for one in each):
        host = ', perhaps with "cpu" at the end' if name == "store" else ""
        raise ArgumentError(f'{name} must be a GPU such as "cuda:1", or a list of some{host}, not {brief(store)}.')
    return store


def checked_name(shared_as: str | None, store: Store, packing: str) -> str | None:
    """The name under which ranks share weights, as it is.

    Raises:
        ArgumentError: it is no name, or the weights would be elsewhere, or packed.
    """
    if shared_as is None:
        return None
    if not isinstance(shared_as, str) or not shared_as.strip():
        raise ArgumentError(
            f"shared_as must be a name that all ranks use for the same weights, or None, not {brief(shared_as)}."
        )
    if packing != "off" or not all(map(_is_host, _each(store))):
        raise ArgumentError(
            "shared_as is for weights as they are, in host memory: it goes with neither `packing` nor a GPU in "
            "`store`. Leave one of them away."
        )
    return shared_as


def _each(store: Store) -> list[Any]:
    return list(store) if isinstance(store, list | tuple) else [store]


def _others(option: str, places: Store, device: Device) -> list[Device | None]:
    """Each device of an option; None: host memory.

    Raises:
        ArgumentError: the pipeline runs on one of them, or one is named twice.
        DeviceError: one does not exist.
    """
    found: list[Device | None] = []
    for place in _each(places):
        one = None if _is_host(place) else device_of(place)
        if one is not None and _is_same(one, device):
            raise ArgumentError(
                f"{option} names {one.label}, which is the GPU that the pipeline runs on. Name another one, or leave "
                f"`{option}` away."
            )
        if one is not None and any(other is not None and _is_same(one, other) for other in found):
            raise ArgumentError(f"{option} names {one.label} twice. Name each GPU once.")
        found.append(one)
    return found


def _is_host(place: Any) -> bool:
    """Whether this is host memory: None, or a CPU."""
    if isinstance(place, str | torch.device):
        return str(place).partition(":")[0] == "cpu"
    return place is None


def _is_same(one: Device, other: Device) -> bool:
    return one is other or (not one.is_simulated and one.torch_device == other.torch_device)


def _store_bytes(store_budget: int | str, device: Device) -> int:
    free_bytes = device.allocated_bytes() + device.free_bytes()
    num_bytes = resolve_budget(
        store_budget, free_bytes=free_bytes, total_bytes=device.total_bytes(), name="store_budget"
    )
    if num_bytes is None:
        raise BudgetError('store_budget "min" means nothing: the weights take what they take. Give a size, or "auto".')
    return num_bytes


def checked_pairing(pairing: str) -> str:
    return _one_of("pairing", pairing, PAIRINGS)


def checked_packing(packing: str) -> str:
    return _one_of("packing", packing, PACKINGS)


def _one_of(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        *others, last = (f'"{choice}"' for choice in choices)
        raise ArgumentError(f"{name} must be {', '.join(others)} or {last}, not {brief(value)}.")
    return value


def checked_timeout(call_timeout: float | None) -> float | None:
    if call_timeout is None:
        return None
    is_number = isinstance(call_timeout, int | float) and not isinstance(call_timeout, bool)
    if not is_number or math.isnan(call_timeout) or call_timeout < 0:
        raise ArgumentError(
            f"call_timeout must be a number of seconds, or None to wait as long as it takes, not {brief(call_timeout)}."
        )
    return float(call_timeout)
