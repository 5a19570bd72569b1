"""The flow-matching head of code B: a choice of samplers, noise in the dtype of the weights."""

import math
from typing import Literal

import torch
from torch import nn

from layerstream.standins.repository.autoregressive.nextstep.head import (
    SimpleMLPAdaLN,
    guided,
    rows_per_image,
    shifted,
)

Sampler = Literal["sde", "ode", "cps"]


class FlowMatchingHead(nn.Module):
    """Draws a token; is itself never called, only `sample`, which calls `net`."""

    def __init__(self, *, token: int, condition: int, width: int, blocks: int) -> None:
        super().__init__()
        self.token = token
        self.net = SimpleMLPAdaLN(token=token, condition=condition, width=width, blocks=blocks)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def sample(
        self,
        c: torch.Tensor,
        *,
        cfg: float = 1.0,
        cfg_img: float = 1.0,
        timesteps_shift: float = 1.0,
        num_sampling_steps: int = 20,
        sampler: Sampler = "sde",
        noise_level: float = 0.8,
    ) -> torch.Tensor:
        """Return tokens [images, token] for `c` [rows, condition]; the net runs once a step."""
        mult = rows_per_image(cfg, cfg_img)
        shape = (c.shape[0] // mult, self.token)
        x = torch.randn(shape, device=self.device, dtype=c.dtype)
        times = [shifted(i / num_sampling_steps, timesteps_shift) for i in range(num_sampling_steps + 1)]
        for i, t in enumerate(times[:-1]):
            time = torch.full((c.shape[0],), t, device=c.device, dtype=c.dtype)
            velocity = guided(self.net(x.repeat(mult, 1), time, c), cfg=cfg, cfg_img=cfg_img)
            step = times[i + 1] - t
            if sampler == "ode" or i == num_sampling_steps - 1:
                x = x + step * velocity
                continue
            fresh = torch.randn(shape, device=self.device, dtype=c.dtype)
            if sampler == "cps":  # a part of the noise that is left is exchanged, and its size is kept
                clean, noise = x + (1 - t) * velocity, x - t * velocity
                angle = noise_level * math.pi / 2
                x = (t + step) * clean + (1 - t - step) * (math.cos(angle) * noise + math.sin(angle) * fresh)
            else:
                drift = velocity + 0.5 * noise_level**2 * (t * velocity - x)
                x = x + step * drift + noise_level * math.sqrt((1 - t) * step) * fresh
        return x
