"""Stand-ins of image models that write tokens, and are no pipelines of diffusers, tiny and at their true size."""

from layerstream.standins.repository.autoregressive.models import (
    AUTOREGRESSIVE,
    autoregressive_call,
    build_autoregressive,
    run_autoregressive,
)

__all__ = ["AUTOREGRESSIVE", "autoregressive_call", "build_autoregressive", "run_autoregressive"]
