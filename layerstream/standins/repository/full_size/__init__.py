"""Stand-ins at their true size with random weights: what benchmarks stream.

A model is a file with a `DENOISER` and a `PIPELINE`, which `models.py` lists.

[Note: memory] A model is built directly in its dtype and without initialisation, so that no page of it is touched
before it is filled: the peak is its weights and one pool of random values (8 MB, or 256 MB when drawn on CUDA).
"""

from layerstream.standins.repository.full_size.denoisers import DENOISERS, build_denoiser, denoiser_inputs
from layerstream.standins.repository.full_size.pipelines import (
    PIPELINES,
    build_pipeline,
    pipeline_call,
    run_pipeline,
)

__all__ = [
    "DENOISERS",
    "PIPELINES",
    "build_denoiser",
    "build_pipeline",
    "denoiser_inputs",
    "pipeline_call",
    "run_pipeline",
]
