"""What describes an autoregressive stand-in: how it is built, and how one call of it goes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from layerstream.standins.repository.full_size.specs import Scale


@dataclass(frozen=True)
class Making:
    """What a stand-in is made with.

    Attributes:
        scale: "full" is the true size.
        dtype: of all weights.
        seed: of the weights.
        fill_device: where the pool of random values is drawn; None is the CPU.
        compiled: whether functions of its classes are compiled; None as the environment says.
        backend: of `torch.compile`.
    """

    scale: Scale
    dtype: torch.dtype
    seed: int
    fill_device: torch.device | str | None
    compiled: bool | None
    backend: str


@dataclass(frozen=True)
class AutoregressiveSpec:
    """A stand-in that is no pipeline of diffusers.

    Attributes:
        build: returns the pipeline or model.
        call: arguments of `run`, by scale, all but the seed.
        run: calls what `build` returned as its users do, and returns its images [n, 3, height, width].
    """

    build: Callable[[Making], Any]
    call: Mapping[Scale, Mapping[str, Any]]
    run: Callable[..., torch.Tensor]
