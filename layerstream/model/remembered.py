"""The device that a pipeline of an ordinary class keeps in its attributes, which it sends its inputs to.

Such a pipeline sets it when it is made (`self.device = model.device`), on the host if the weights are there. While they
are streamed the inputs must go where the weights seem to be.
"""

from __future__ import annotations

import torch


class RememberedDevices:
    """Devices in the attributes of an object, set to another; `restore` sets them back.

    Args:
        homes: where the weights were when the object made its attributes: only these are replaced.
        device: what takes their place.
    """

    def __init__(self, pipe: object, homes: set[torch.device], device: torch.device) -> None:
        self._names = vars(pipe)
        self._changed: dict[str, tuple[object, object]] = {}
        for name, value in list(self._names.items()):
            if _device_in(name, value) in homes:
                now = str(device) if isinstance(value, str) else device
                self._changed[name] = value, now
                self._names[name] = now

    def restore(self) -> None:
        """Put back what was there, where nobody has put something else; idempotent."""
        for name, (before, now) in self._changed.items():
            if self._names.get(name) is now:
                self._names[name] = before
        self._changed = {}


def _device_in(name: str, value: object) -> torch.device | None:
    """The device that an attribute holds; a string does where its name says so."""
    if isinstance(value, torch.device):
        return value
    if isinstance(value, str) and "device" in name.lower():
        try:
            return torch.device(value)
        except RuntimeError:
            return None
    return None
