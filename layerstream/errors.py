"""Every error and warning layerstream raises, and how values are named in them; imports nothing.

`LayerstreamError` is the root. A child also derives from the builtin a caller would expect
(`ValueError` for a wrong argument, `RuntimeError` for a wrong moment), so code that knows nothing of
layerstream still catches it. Messages say what happened with numbers, then what to do.
"""

from __future__ import annotations

_MOST_CHARACTERS = 60


def brief(value: object) -> str:
    """A value as messages name it: its repr, in one line that is not long."""
    try:
        text = " ".join(line.strip() for line in repr(value).splitlines())
    except Exception:  # anybody's class may raise, and an int of thousands of digits does
        text = object.__repr__(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS // 2]}... ({len(text)} characters)"


class LayerstreamError(Exception):
    """Root of all errors raised by layerstream."""


class BudgetError(LayerstreamError, ValueError):
    """The budget cannot be parsed, or cannot hold what must be on the device.

    Attributes:
        budget_bytes: what was asked for, or None when it could not be read.
        least_bytes: what is known to be needed, at least; None when nothing is.
        needed_bytes: a budget that will do. Where what a call takes beside the weights was never measured, that is all
            that is free on the device: `report()` names the least once the call has run. None when unknown.
    """

    def __init__(
        self,
        message: str,
        *,
        budget_bytes: int | None = None,
        least_bytes: int | None = None,
        needed_bytes: int | None = None,
    ) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.least_bytes = least_bytes
        self.needed_bytes = needed_bytes


class HostMemoryError(LayerstreamError, MemoryError):
    """The weights cannot be held in host memory.

    Attributes:
        needed_bytes: how much more memory this process would take.
        available_bytes: how much more it can have.
    """

    def __init__(self, message: str, *, needed_bytes: int | None = None, available_bytes: int | None = None) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class StoreError(LayerstreamError, ValueError):
    """The weights cannot be kept in the memory of the GPUs that were asked for, or do not come over their links.

    Attributes:
        needed_bytes: what they take there.
        available_bytes: what may be taken there.
    """

    def __init__(self, message: str, *, needed_bytes: int | None = None, available_bytes: int | None = None) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class ArgumentError(LayerstreamError, ValueError):
    """An argument is of a kind, or has a value, that means nothing."""


class AdapterError(LayerstreamError, ValueError):
    """An adapter described a component wrongly (a name that does not exist, a block listed twice)."""


class PipelineError(LayerstreamError, TypeError):
    """What was given is no pipeline, module or dict of modules, or holds weights that cannot be streamed."""


class DeviceError(LayerstreamError, ValueError):
    """The device asked for does not exist or cannot be streamed to."""


class AlreadyOffloadedError(LayerstreamError, RuntimeError):
    """The pipeline is under another offloader (layerstream, accelerate, diffusers, `device_map`).

    Attributes:
        streamer: the `LayerStreamer` that streams it, when it is layerstream; its `close()` ends that.
    """

    def __init__(self, message: str, *, streamer: object = None) -> None:
        super().__init__(message)
        self.streamer = streamer


class StreamerStateError(LayerstreamError, RuntimeError):
    """A streamer was used at the wrong moment: entered twice, closed in the middle of a call, asked for a report before
    it started. Or its pipeline was changed in a way that it could not go on with."""


class ConcurrentUseError(LayerstreamError, RuntimeError):
    """A call in another thread did not end within `call_timeout`, or two threads of one call used it at once."""


class MovedWhileStreamingError(LayerstreamError, RuntimeError):
    """A component was moved to a device by its user while its weights are streamed."""


class BackwardError(LayerstreamError, RuntimeError):
    """A backward pass reached streamed weights, whose bytes have been replaced since the forward pass."""


class CompiledWholeError(LayerstreamError, RuntimeError):
    """A component is compiled as a whole with `fullgraph=True`, which leaves no place to load its blocks."""


class TransferError(LayerstreamError, RuntimeError):
    """A fault inside the transfer engine. Our bug, or a device that failed: please report it."""


class RankError(LayerstreamError, RuntimeError):
    """Another rank of this host has ended, does not answer, or shares something else.

    Attributes:
        rank: which; None where it is not known, or where it is none.
        is_gone: it has ended, or left. Whoever enters again leads, or finds another that does.
    """

    def __init__(self, message: str, *, rank: int | None = None, is_gone: bool = False) -> None:
        super().__init__(message)
        self.rank = rank
        self.is_gone = is_gone


class WeightsLostError(TransferError):
    """Weights could not be brought back: they were in the memory of another GPU (`store`), which has failed, or there
    was no host memory for them by then. Raised once all others are handed back; the lost ones are NaN. Load the
    pipeline anew."""


class LayerstreamWarning(UserWarning):
    """Something works, but slower or with more memory than it should; said once each."""
