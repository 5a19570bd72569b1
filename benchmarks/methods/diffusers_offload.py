"""What diffusers and accelerate offer: group offloading with streams by leaf and by block, model and sequential.

None of it is undone: group offloading cannot be, and the process ends with the measurement.
"""

from __future__ import annotations

import functools

import torch

from benchmarks.methods.base import Method, Setup


def _group(setup: Setup, *, offload_type: str) -> None:
    from diffusers.hooks import apply_group_offloading

    options = {
        "onload_device": setup.device,
        "offload_device": torch.device("cpu"),
        "offload_type": offload_type,
        "use_stream": setup.device.type == "cuda",
        "record_stream": setup.device.type == "cuda",
    }
    if offload_type == "block_level":
        options["num_blocks_per_group"] = 1
    if setup.work.pipe is not None:
        setup.work.pipe.enable_group_offload(**options)
    else:
        apply_group_offloading(setup.work.denoiser, **options)


def _model(setup: Setup) -> None:
    setup.work.pipe.enable_model_cpu_offload(device=setup.device)


def _sequential(setup: Setup) -> None:
    if setup.work.pipe is not None:
        setup.work.pipe.enable_sequential_cpu_offload(device=setup.device)
        return
    from accelerate import cpu_offload

    cpu_offload(setup.work.denoiser, setup.device, offload_buffers=len(setup.work.denoiser._parameters) > 0)


_PACKAGES = (("diffusers", "diffusers"), ("accelerate", "accelerate"))
LEAF = Method(
    "diffusers_leaf",
    functools.partial(_group, offload_type="leaf_level"),
    mode=torch.no_grad,  # a tensor made under inference mode cannot be written to by its hooks
    packages=_PACKAGES,
)
BLOCK = Method(
    "diffusers_block", functools.partial(_group, offload_type="block_level"), mode=torch.no_grad, packages=_PACKAGES
)
MODEL_OFFLOAD = Method("model_offload", _model, forms=("pipeline",), mode=torch.no_grad, packages=_PACKAGES)
SEQUENTIAL = Method("sequential", _sequential, mode=torch.no_grad, num_warm_ups=1, packages=_PACKAGES)
