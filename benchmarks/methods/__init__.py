"""The ways of running a pipeline or a denoiser that are compared: ours, and every peer's."""

from benchmarks.methods.base import Method, MissingPeerError, Setup
from benchmarks.methods.diffusers_offload import BLOCK, LEAF, MODEL_OFFLOAD, SEQUENTIAL
from benchmarks.methods.flextensor import FLEXTENSOR
from benchmarks.methods.mmgp import MMGP
from benchmarks.methods.ours import LAYERSTREAM, PACKED, PACKED_AUTO, PACKED_PAIRED, PAIRED, STORED, STORED_APART
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
        LEAF,
        BLOCK,
        MODEL_OFFLOAD,
        SEQUENTIAL,
        VLLM_OMNI,
        FLEXTENSOR,
        MMGP,
    )
}

OURS = tuple(method.name for method in (LAYERSTREAM, PAIRED, PACKED, PACKED_AUTO, PACKED_PAIRED, STORED, STORED_APART))

__all__ = ["METHODS", "OURS", "Method", "MissingPeerError", "Setup"]
