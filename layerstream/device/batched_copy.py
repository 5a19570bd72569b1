"""Many copies in one call of the driver: `cudaMemcpyBatchAsync`, by cuda-bindings, which torch's CUDA wheels bring.

A load of 342 MiB in 12 segments takes 8 us of the host so, and 58 with `copy_` on each; in 39 segments 34 and 168, at
55.1 and 54.0 GB/s (H100). Where it does not exist (before CUDA 12.8, no cuda-bindings, ROCm, an older driver), `copy_`
does the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import import_module
from typing import Any

_log = logging.getLogger("layerstream.device")

# What a call says when the driver or runtime cannot do it at all.
_CANNOT = ("cudaErrorInsufficientDriver", "cudaErrorCallRequiresNewerDriver", "cudaErrorNotSupported")

FROM_HOST = "from cpu to cuda"  # the kind of copy that most are


class BatchedCopy:
    """The call, with what is the same each time."""

    def __init__(self, runtime: Any) -> None:
        self._call = runtime.cudaMemcpyBatchAsync
        self._success = runtime.cudaError_t.cudaSuccess
        attributes = runtime.cudaMemcpyAttributes()
        # Sources are page-locked, and are let go of only once an event after the copy has passed.
        attributes.srcAccessOrder = runtime.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
        self._attributes = [attributes]
        # By kind of copy: a driver that brings many from the host need not bring them from another GPU.
        self._worked: set[str] = set()
        self._refused: set[str] = set()

    @classmethod
    def find(cls) -> BatchedCopy | None:
        """None where there is no such call."""
        try:
            return cls(import_module("cuda.bindings.runtime"))
        except Exception as error:  # not installed, of a version without it, or without a library that it needs
            _log.debug("no batched copies: %r", error)
            return None

    def can(self, kind: str = FROM_HOST) -> bool:
        """Whether copies of this kind work, as far as known."""
        return kind not in self._refused

    def __call__(
        self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int], stream: int, kind: str = FROM_HOST
    ) -> bool:
        """Queue copies from page-locked memory to the device, or from one to another, in any order among them, on a
        stream that is not the default one.

        Args:
            targets, sources: addresses.
            sizes: in bytes.
            kind: from where to where all of them go.
        Returns: whether they were queued; False: this machine cannot, now or ever.
        Raises:
            RuntimeError: a copy failed; others of the same call may be on their way.
        """
        if not self.can(kind):
            return False
        # Since CUDA 13 it returns the error alone, before also the index of the copy that failed.
        error = self._call(targets, sources, sizes, len(sizes), self._attributes, [0], 1, stream)[0]
        if error == self._success:
            self._worked.add(kind)
            return True
        name = getattr(error, "name", str(error))
        if kind not in self._worked and name in _CANNOT:
            self._refused.add(kind)
            _log.debug("no batched copies %s: %s", kind, name)
            return False
        raise RuntimeError(f"CUDA error: {len(sizes)} copies to the device were not all queued ({name}).")
