"""Stand-ins for tests and benchmarks, which are in the repository only: the wheel leaves this folder out.

`tiny` holds small pipelines with every class, block stack and call path of the real ones, `full_size` pipelines and
denoisers at their true size, `autoregressive` both of models that diffusers does not have.
"""

from layerstream.standins.repository.autoregressive import (
    AUTOREGRESSIVE,
    autoregressive_call,
    build_autoregressive,
    run_autoregressive,
)
from layerstream.standins.repository.full_size import (
    DENOISERS,
    PIPELINES,
    build_denoiser,
    build_pipeline,
    denoiser_inputs,
    pipeline_call,
    run_pipeline,
)
from layerstream.standins.repository.tiny import TINY_PIPELINES, build_tiny, run_tiny

__all__ = [
    "AUTOREGRESSIVE",
    "DENOISERS",
    "PIPELINES",
    "TINY_PIPELINES",
    "autoregressive_call",
    "build_autoregressive",
    "build_denoiser",
    "build_pipeline",
    "build_tiny",
    "denoiser_inputs",
    "pipeline_call",
    "run_autoregressive",
    "run_pipeline",
    "run_tiny",
]
