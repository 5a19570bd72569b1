"""The ways of running a pipeline or a denoiser that are compared: ours, and every peer's."""

from benchmarks.methods.base import Method, MissingPeerError, Setup
from benchmarks.methods.diffusers_offload import BLOCK, LEAF, MODEL_OFFLOAD, SEQUENTIAL
from benchmarks.methods.flextensor import FLEXTENSOR
from benchmarks.methods.mmgp import MMGP
from benchmarks.methods.ours import (
    LAYERSTREAM,
    LINKS,
    LINKS_PACKED,
    PACKED,
    PACKED_AUTO,
    PACKED_PAIRED,
    PAIRED,
    STORED,
    STORED_APART,
)
from benchmarks.methods.replicas import REPLICAS
from benchmarks.methods.resident import RESIDENT
from benchmarks.methods.vllm_omni import VLLM_OMNI

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        RESIDENT,
        LAYERSTREAM,
        PAIRED,
        PACKED,
        PACKED_AUTO,
        PACKED_PAIRED,
        STORED,
        STORED_APART,
        LINKS,
        LINKS_PACKED,
        REPLICAS,
        LEAF,
        BLOCK,
        MODEL_OFFLOAD,
        SEQUENTIAL,
        VLLM_OMNI,
        FLEXTENSOR,
        MMGP,
    )
}

_OURS = LAYERSTREAM, PAIRED, PACKED, PACKED_AUTO, PACKED_PAIRED, STORED, STORED_APART, LINKS, LINKS_PACKED, REPLICAS
OURS = tuple(method.name for method in _OURS)

__all__ = ["METHODS", "OURS", "Method", "MissingPeerError", "Setup"]
