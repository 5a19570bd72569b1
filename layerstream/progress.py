"""A bar while entering takes more than a second, where `tqdm` is installed: pipelines of diffusers have it, too."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_DELAY_S = 1.0
_LEAST_BYTES = 2**28  # less takes no second; importing tqdm takes a tenth


class Progress:
    """How much of the work is done, by bytes.

    Args:
        num_bytes: all of it.
        what: is done.
    """

    def __init__(self, num_bytes: int, what: str = "layerstream takes hold of the weights") -> None:
        self._bar: Any = None
        if num_bytes >= _LEAST_BYTES:
            try:
                tqdm = import_module("tqdm.auto").tqdm
            except ImportError:
                return
            self._bar = tqdm(
                desc=what,
                total=num_bytes,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                delay=_DELAY_S,
                leave=False,
            )

    def add(self, num_bytes: int) -> None:
        """So many bytes more are done."""
        if self._bar is not None:
            # Page locks are told in whole pages, which hold more than the weights.
            self._bar.update(min(num_bytes, self._bar.total - self._bar.n))

    def close(self) -> bool:
        """Take the bar away; returns whether it was shown. Idempotent."""
        bar, self._bar = self._bar, None
        if bar is None:
            return False
        was_shown = not bar.disable and bar.n > 0 and bar.format_dict["elapsed"] >= _DELAY_S
        bar.close()
        return bool(was_shown)
