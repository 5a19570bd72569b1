"""Run diffusion pipelines on GPUs too small for them: weights streamed block by block, the same image bit for bit."""

from layerstream import _import_torch  # noqa: F401 - before anything else imports torch
from layerstream._version import __version__
from layerstream.api import active, offload, plan
from layerstream.errors import (
    AdapterError,
    AlreadyOffloadedError,
    ArgumentError,
    BackwardError,
    BudgetError,
    CompiledWholeError,
    ConcurrentUseError,
    DeviceError,
    HostMemoryError,
    LayerstreamError,
    LayerstreamWarning,
    MovedWhileStreamingError,
    PipelineError,
    RankError,
    StoreError,
    StreamerStateError,
    TransferError,
    WeightsLostError,
)
from layerstream.model.adapters.base import Adapter
from layerstream.model.adapters.registry import register_adapter
from layerstream.pipeline.layer_streamer import LayerStreamer
from layerstream.planning.plan import Plan
from layerstream.report import Report
from layerstream.stats import Stats

__all__ = [
    "Adapter",
    "AdapterError",
    "AlreadyOffloadedError",
    "ArgumentError",
    "BackwardError",
    "BudgetError",
    "CompiledWholeError",
    "ConcurrentUseError",
    "DeviceError",
    "HostMemoryError",
    "LayerStreamer",
    "LayerstreamError",
    "LayerstreamWarning",
    "MovedWhileStreamingError",
    "PipelineError",
    "Plan",
    "RankError",
    "Report",
    "Stats",
    "StoreError",
    "StreamerStateError",
    "TransferError",
    "WeightsLostError",
    "__version__",
    "active",
    "offload",
    "plan",
    "register_adapter",
]
