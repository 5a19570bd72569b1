"""The flow-matching head of code A: a stochastic sampler in float32."""

import math

import torch
from torch import nn

from layerstream.standins.repository.autoregressive.nextstep.head import (
    SimpleMLPAdaLN,
    guided,
    rows_per_image,
    shifted,
)

LAST_STEP = 0.04


class FlowMatchingHead(nn.Module):
    """Draws a token; is itself never called, only `sample`, which calls `net`."""

    net_class: type[nn.Module] = SimpleMLPAdaLN

    def __init__(self, *, token: int, condition: int, width: int, blocks: int) -> None:
        super().__init__()
        self.token = token
        self.net = self.net_class(token=token, condition=condition, width=width, blocks=blocks)

    @property
    def device(self) -> torch.device:
        weight: torch.Tensor = self.net.input_proj.weight  # type: ignore[union-attr, assignment]
        return weight.device

    def sample(
        self,
        c: torch.Tensor,
        cfg: float = 1.0,
        cfg_img: float = 1.0,
        timesteps_shift: float = 1.0,
        num_sampling_steps: int = 20,
    ) -> torch.Tensor:
        """Return tokens [images, token] in the dtype of `c` [rows, condition]; the net runs once a step."""
        mult = rows_per_image(cfg, cfg_img)
        images = c.shape[0] // mult
        x = torch.randn(images, self.token, device=self.device, dtype=torch.float32)
        last = num_sampling_steps - 1
        times = [shifted((1 - LAST_STEP) * i / max(last, 1), timesteps_shift) for i in range(num_sampling_steps)]
        for i, t in enumerate(times):
            velocity = self._velocity(x, t, c, mult, cfg, cfg_img)
            if i == last:
                x = x + (1 - t) * velocity
            else:
                step = times[i + 1] - t
                drift = velocity + t * velocity - x
                noise = torch.randn(images, self.token, device=self.device, dtype=torch.float32)
                x = x + step * drift + math.sqrt(2 * (1 - t) * step) * noise
        return x.to(c.dtype)

    def _velocity(
        self, x: torch.Tensor, t: float, c: torch.Tensor, mult: int, cfg: float, cfg_img: float
    ) -> torch.Tensor:
        time = torch.full((c.shape[0],), t, device=c.device, dtype=torch.float32)
        velocity = self.net(x.to(c.dtype).repeat(mult, 1), time, c)
        return guided(velocity.float(), cfg=cfg, cfg_img=cfg_img)
