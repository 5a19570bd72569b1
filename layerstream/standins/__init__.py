"""Offline stand-ins: real diffusers pipelines and denoisers from configs, with random weights and local tokenizers.

Nothing here reaches the network, and importing it imports neither diffusers nor transformers.

What `layerstream demo` runs is installed with layerstream. Stand-ins that only tests and benchmarks use are in the
folder `repository`, which no wheel contains. In a checkout their names are found here as well:
`from layerstream.standins import build_tiny`.
"""

from importlib import import_module
from typing import Any

from layerstream.standins.demo import DEMO_CALL, build_demo
from layerstream.standins.weights import fill_normal_, skip_init

# Without the names of `repository`: a star import works where they are missing, too.
__all__ = ["DEMO_CALL", "build_demo", "fill_normal_", "skip_init"]

_REPOSITORY = "layerstream.standins.repository"
_IN_REPOSITORY = (
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
)


def __getattr__(name: str) -> Any:
    if name not in _IN_REPOSITORY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        repository = import_module(_REPOSITORY)
    except ModuleNotFoundError as error:
        if error.name != _REPOSITORY:
            raise
        # An AttributeError would be clearer for `standins.build_tiny`, but `from ... import` replaces its text.
        raise ImportError(
            f"{name} is only in the repository of layerstream: an installed package has no stand-in but that of the "
            "demo (build_demo). Run from a checkout, with its root on PYTHONPATH or installed by "
            "`pip install --editable .`",
            name=_REPOSITORY,
        ) from error
    return getattr(repository, name)
