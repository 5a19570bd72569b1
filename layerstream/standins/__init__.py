"""Offline stand-ins: real diffusers pipelines and denoisers from configs, with random weights and local tokenizers.

Nothing here reaches the network, and importing it imports neither diffusers nor transformers.
"""

from layerstream.standins.demo import DEMO_CALL, build_demo
from layerstream.standins.full_size import DENOISERS, build_denoiser, denoiser_inputs
from layerstream.standins.tiny import TINY_PIPELINES, build_tiny, run_tiny
from layerstream.standins.weights import fill_normal_, skip_init

__all__ = [
    "DEMO_CALL",
    "DENOISERS",
    "TINY_PIPELINES",
    "build_demo",
    "build_denoiser",
    "build_tiny",
    "denoiser_inputs",
    "fill_normal_",
    "run_tiny",
    "skip_init",
]
