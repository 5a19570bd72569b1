"""The pipeline of code B: a plain class that is told its device, and remembers it in an ordinary attribute."""

from typing import Any

import torch
from torch.nn import functional as F

from layerstream.standins.repository.autoregressive.nextstep.head import rows_per_image
from layerstream.standins.repository.autoregressive.nextstep.tokens import (
    PLACEHOLDER,
    guidance_texts,
    image_prefix,
    tokenise,
)


class NextStepPipeline:
    """Has no `components` and no `to`: the modules are put on `device` when it is made."""

    def __init__(self, *, model: Any, vae: Any, tokenizer: Any, device: torch.device | str = "cuda") -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.vae = vae.to(self.device)
        self.tokenizer = tokenizer
        self.vae_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.down_factor = self.vae_factor * model.config.latent_patch_size

    @torch.no_grad()
    def generate_image(
        self,
        captions: str | list[str],
        images: torch.Tensor | None = None,
        *,
        num_images_per_caption: int = 1,
        positive_prompt: str = "",
        negative_prompt: str = "",
        hw: tuple[int, int] = (512, 512),
        use_norm: bool = False,
        cfg: float = 1.0,
        cfg_img: float = 1.0,
        num_sampling_steps: int = 28,
        timesteps_shift: float = 1.0,
        sampler: str = "sde",
        noise_level: float = 0.8,
        num_tokens: int | None = None,
        seed: int | None = None,
    ) -> torch.Tensor:
        """Return images [n, 3, height, width] in 0..1 (the original returns PIL images).

        Arguments are those of code A, and the head's `sampler` ("sde", "ode" or "cps") and `noise_level`.
        """
        if seed is not None:
            torch.manual_seed(seed)
        h, w = hw[0] // self.down_factor, hw[1] // self.down_factor
        texts = [captions] if isinstance(captions, str) else captions
        texts = [positive_prompt + text for text in texts for _ in range(num_images_per_caption)]
        mult = rows_per_image(cfg, cfg_img)
        latents, image = None, None
        if images is not None:
            latents = self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist.mode()
            image = self._placeholders(latents)
            latents = latents.repeat(min(mult, 2), 1, 1, 1)
        rows = guidance_texts(texts, negative_prompt, image_prefix(*hw), image=image, cfg=cfg, cfg_img=cfg_img)
        ids, mask = tokenise(self.tokenizer, rows, self.device)
        embeds, cache = self.model.prepare_inputs_embeds(ids, latents), None
        tokens: list[torch.Tensor] = []
        for _ in range(min(num_tokens or h * w, h * w)):
            outputs = self._forward(embeds, mask, cache)
            cache = outputs.past_key_values
            c = self.model.image_out_projector(outputs.last_hidden_state[:, -1])
            token = self.model.image_head.sample(
                c=c,
                cfg=cfg,
                cfg_img=cfg_img,
                timesteps_shift=timesteps_shift,
                num_sampling_steps=num_sampling_steps,
                sampler=sampler,
                noise_level=noise_level,
            )
            if use_norm:
                token = F.layer_norm(token, token.shape[-1:])
            tokens.append(token)
            embeds = self.model.image_in_projector(token)[:, None].repeat(mult, 1, 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        self._forward(embeds, mask, cache)  # nothing reads what comes of the last token
        drawn = F.pad(torch.stack(tokens, dim=1), (0, 0, 0, h * w - len(tokens)))
        z = self.model.unpatchify(drawn, h, w)
        decoded: torch.Tensor = self.vae.decode(z.to(self.vae.dtype)).sample
        return (decoded / 2 + 0.5).clamp(0, 1)

    def _forward(self, embeds: torch.Tensor, mask: torch.Tensor, cache: Any) -> Any:
        # As a method, not by calling the model: hooks on it do not run.
        return self.model.forward(inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, use_cache=True)

    def _placeholders(self, latents: torch.Tensor) -> str:
        height, width = latents.shape[-2:]
        patch: int = self.model.config.latent_patch_size
        prefix = image_prefix(height * self.vae_factor, width * self.vae_factor)
        return prefix + PLACEHOLDER * (height // patch * (width // patch))
