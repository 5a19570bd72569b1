"""mmgp: towers of blocks loaded one by one, with a budget in MB for the denoiser's weights."""

from __future__ import annotations

import torch

from benchmarks.methods.base import Method, Setup, need


def _apply(setup: Setup) -> None:
    offload = need("mmgp.offload", "mmgp")
    megabytes = setup.budget_bytes // 10**6
    offload.all(
        dict(setup.work.modules),
        pinnedMemory=True,
        quantizeTransformer=False,
        convertWeightsFloatTo=None,
        budgets=dict.fromkeys(setup.work.modules, megabytes),
        verboseLevel=0,
    )
    torch.set_default_device("cpu")  # it makes the GPU the default


MMGP = Method(
    "mmgp",
    _apply,
    mode=torch.no_grad,
    needs_budget=True,
    takes_budget=True,
    packages=(("mmgp.offload", "mmgp"),),
)
