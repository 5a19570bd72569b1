"""How torch's CUDA allocator cuts device memory while something streams.

By default each large request that no cached piece fits gets a segment of its own size from the driver, and a pass that
asks for many sizes leaves gaps that fit nothing: the denoisers here reserve up to twice, and VAEs 1.8 times, what their
tensors ever take together. Segments that grow and shrink by pages have hardly any gaps. The engine's own buffers come
and go whole, so they keep segments of their own, whose size is known exactly.

Source: PyTorch, "CUDA semantics", memory management, `expandable_segments`. That it may be turned off for single
requests while it is on otherwise is provided for in the allocator (`get_free_block`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Hashable, Iterator

import torch

from layerstream.finalisers import FinaliserLock
from layerstream.torch_private import (
    GET_ALLOCATOR_SETTINGS,
    SET_ALLOCATOR_SETTINGS,
    SET_CUDA_ALLOCATOR_SETTINGS,
)

_OPTION = "expandable_segments"
PAGE_BYTES = 20 * 2**20  # by which segments of the large pool grow


class GrowingSegments:
    """Turns growing segments on while somebody streams. One per process, as is the setting.

    What the user has said about them, in the environment or since, is left as it is.

    Once two GPUs work together they are turned off, for good: whoever asks for them after that, or has asked before,
    has segments as torch cuts them. Before torch unmaps what has grown it waits for the default stream of the current
    GPU only (PyTorch issue 196258), on whichever GPU the memory is. With one GPU in use that is the right one. Where
    a copy or kernel of another GPU uses it, nothing waits for that.

    Attributes:
        is_forbidden: two GPUs work together, now or before.
    """

    def __init__(
        self,
        read: Callable[[], str | None] | None = None,
        write: Callable[[str], None] | None = None,
    ) -> None:
        self._read = read or _read_settings
        self._write = write or _write_settings
        self._owners: set[Hashable] = set()
        self._before: str | None = None  # the settings as they were; None: not changed
        self._left: dict[str, str] = {}  # what they were, by what we left when we were done
        self._lock = FinaliserLock()
        self.is_forbidden = False
        self._was_on = False

    @property
    def may_have_grown(self) -> bool:
        """Whether there may be memory that has grown: because of us, now or before, or because the user wanted it."""
        said = (os.environ.get(name, "") for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))
        return self._was_on or any(_OPTION in settings for settings in said)

    def forbid(self) -> bool:
        """Turn them off for good. Returns whether this is the first time, and they were on before."""
        with self._lock.held():
            is_first, self.is_forbidden = not self.is_forbidden, True
            self._turn_off()
        return is_first and self._was_on

    @property
    def is_on(self) -> bool:
        """Whether they are on because of us."""
        return self._before is not None

    def add(self, owner: Hashable) -> None:
        """Turn them on, unless they are on or the user decided otherwise."""
        with self._lock.held():
            if not self._owners:
                settings = self._read()
                settings = self._left.get(settings, settings) if settings is not None else None
                if settings is not None and _OPTION in settings:
                    self._was_on = True  # by the user, as far as we know
                elif settings is not None and not self.is_forbidden:
                    try:
                        self._write(_with(settings, "True"))
                        self._before, self._was_on = settings, True
                    except (RuntimeError, ValueError):
                        self._before = None  # this allocator cannot; it cuts as it always does
            self._owners.add(owner)

    def remove(self, owner: Hashable) -> None:
        """Turn them off after the last owner; idempotent, and for finalisers, too."""
        self._lock.when_free(functools.partial(self._remove, owner))

    def _remove(self, owner: Hashable) -> None:
        self._owners.discard(owner)
        if not self._owners:
            self._turn_off()

    def _turn_off(self) -> None:
        if self._before is not None:
            left = _with(self._before, "False")  # said, because leaving it out may leave it as it is
            self._write(left)
            self._left = {left: self._before}
            self._before = None

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, requests get segments of their own size, as long as it was us who turned growing ones on."""
        with self._lock.held():
            before = self._before
            if before is not None:
                self._write(_with(before, "False"))
        try:
            yield
        finally:
            with self._lock.held():
                if before is not None and self._before is not None:
                    self._write(_with(before, "True"))


def _with(settings: str, value: str) -> str:
    return ",".join([*([settings] if settings else []), f"{_OPTION}:{value}"])


def _read_settings() -> str | None:
    """The allocator's settings in its own words; None where there is no such allocator or no way to ask."""
    if not torch.version.cuda or torch.cuda.get_allocator_backend() != "native" or os.name == "nt":
        return None
    getter = GET_ALLOCATOR_SETTINGS.find()
    try:
        if getter is not None:
            return str(getter())
        return str(torch.cuda.memory._snapshot()["allocator_settings"]["PYTORCH_CUDA_ALLOC_CONF"])
    except (RuntimeError, KeyError, AttributeError):
        return None


def _write_settings(settings: str) -> None:
    setter = SET_ALLOCATOR_SETTINGS.find() or SET_CUDA_ALLOCATOR_SETTINGS.find()
    if setter is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        setter(settings)
