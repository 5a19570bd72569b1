"""What `offload` and `plan` are given, checked: a device, a budget, seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from layerstream.budget import resolve_budget
from layerstream.device.base import Device
from layerstream.device.cuda import CudaDevice, find_device
from layerstream.errors import ArgumentError, DeviceError, brief

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
