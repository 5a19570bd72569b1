"""FlexTensor (NVIDIA): traces the denoiser, profiles it, and decides per tensor what streams."""

from __future__ import annotations

import torch

from benchmarks.methods.base import Method, Setup, move_all_but_blocks, need, stacks


def _apply(setup: Setup) -> None:
    flextensor = need("flextensor", "flextensor")
    move_all_but_blocks(setup)
    total = torch.cuda.get_device_properties(setup.device).total_memory
    config = flextensor.OffloadConfig(
        include_patterns=[f"{name}.*" for name in stacks(setup.work.denoiser)],
        max_gpu_mem_fraction=setup.budget_bytes / total,
    )
    offloaded = flextensor.offload(setup.work.denoiser, config=config)
    setup.work.modules["transformer"] = offloaded
    if setup.work.pipe is not None:
        setup.work.pipe.transformer = offloaded


# Discovery and ten profiling passes come first.
FLEXTENSOR = Method(
    "flextensor",
    _apply,
    mode=torch.no_grad,
    num_warm_ups=14,
    needs_budget=True,
    takes_budget=True,
    packages=(("flextensor", "flextensor"),),
)
