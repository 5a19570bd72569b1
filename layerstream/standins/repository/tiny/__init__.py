"""Tiny stand-ins of real diffusers pipelines, a few hundred kilobytes each: what tests stream.

A new one is a `Recipe` in the file of its kind.
"""

from layerstream.standins.repository.tiny.pipelines import TINY_PIPELINES, build_tiny, run_tiny

__all__ = ["TINY_PIPELINES", "build_tiny", "run_tiny"]
