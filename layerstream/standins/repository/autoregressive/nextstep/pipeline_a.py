"""The pipeline of code A: a plain class that keeps the device of its construction to itself."""

from typing import Any

import torch
from torch.nn import functional as F

from layerstream.standins.libraries import transformers
from layerstream.standins.repository.autoregressive.nextstep.compiling import Compiler
from layerstream.standins.repository.autoregressive.nextstep.head import rows_per_image
from layerstream.standins.repository.autoregressive.nextstep.tokens import (
    PLACEHOLDER,
    guidance_texts,
    image_prefix,
    tokenise,
)


class NextStepPipeline:
    """Has no `components` and is no pipeline of diffusers; `to` moves both modules and what it remembers."""

    compiler = Compiler(is_enabled=False, backend="inductor")

    def __init__(self, *, model: Any, vae: Any, tokenizer: Any) -> None:
        self.model = model
        self.vae = vae
        self.tokenizer = tokenizer
        self.vae_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.down_factor = self.vae_factor * model.config.latent_patch_size
        self.scaling_factor, self.shift_factor = vae.config.scaling_factor, vae.config.shift_factor
        self.to(model.device, model.dtype)

    @property
    def device(self) -> torch.device:
        return self.__device

    @property
    def dtype(self) -> torch.dtype:
        return self.__dtype

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "NextStepPipeline":
        self.model.to(device, dtype=dtype)
        self.vae.to(device, dtype=dtype)
        self.__device = torch.device(device)
        self.__dtype = dtype or self.model.dtype
        return self

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
        num_tokens: int | None = None,
        seed: int | None = None,
    ) -> torch.Tensor:
        """Return images [n, 3, height, width] in 0..1 (the original returns PIL images).

        Args:
            captions: n / `num_images_per_caption` of them.
            images: one to edit for each of the n, in -1..1.
            hw: height and width in pixels; a token is 16 x 16 of them.
            use_norm: norm each token.
            cfg: of texts; 1 turns it off.
            cfg_img: of the image to edit; 1 turns it off.
            num_sampling_steps: of the head for a token.
            num_tokens: end after so many; the latents of the rest are zeros.
            seed: of torch's own generators.
        """
        if seed is not None:
            torch.manual_seed(seed)
        rows, columns = hw[0] // self.down_factor, hw[1] // self.down_factor
        texts = [captions] if isinstance(captions, str) else captions
        texts = [positive_prompt + text for text in texts for _ in range(num_images_per_caption)]
        latents = None if images is None else self._encode(images)
        ids, mask = self._ids(texts, negative_prompt, hw, latents, cfg, cfg_img)
        if latents is not None and rows_per_image(cfg, cfg_img) > 1:
            latents = latents.repeat(2, 1, 1, 1)  # a second row of each shows it, too
        most = rows * columns
        cache = self._cache(len(ids), ids.shape[1] + most)
        with self.compiler.off():
            embeds = self.model.prepare_inputs_embeds(ids, latents)
            outputs = self.model.forward_model(
                inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, use_cache=True
            )
        tokens = self._decoding(
            outputs.last_hidden_state[:, -1:],
            mask,
            cache,
            count=min(num_tokens or most, most),
            use_norm=use_norm,
            sampling={
                "cfg": cfg,
                "cfg_img": cfg_img,
                "num_sampling_steps": num_sampling_steps,
                "timesteps_shift": timesteps_shift,
            },
        )
        tokens = F.pad(tokens, (0, 0, 0, most - tokens.shape[1]))
        z = self.model.unpatchify(tokens, rows, columns) / self.scaling_factor + self.shift_factor
        with self.compiler.off():
            decoded: torch.Tensor = self.vae.decode(z.to(self.vae.dtype)).sample
        return (decoded / 2 + 0.5).clamp(0, 1)

    def _decoding(
        self,
        c: torch.Tensor,
        mask: torch.Tensor,
        cache: Any,
        *,
        count: int,
        use_norm: bool,
        sampling: dict[str, Any],
    ) -> torch.Tensor:
        """Return tokens [n, count, token]; `c` [rows, 1, hidden] is what follows the prompt."""
        mult = rows_per_image(sampling["cfg"], sampling["cfg_img"])
        tokens = []
        for step in range(count):
            c = self.model.image_out_projector(c)
            token = self.model.image_head.sample(c=c.squeeze(1), **sampling)
            if use_norm:
                token = F.layer_norm(token, token.shape[-1:])
            tokens.append(token)
            embeds = self.model.image_in_projector(token)[:, None].repeat(mult, 1, 1)
            if self.model.config.use_gen_pos_embed:
                embeds = embeds + self.model.gen_pos_embed_with_ar(step)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            outputs = self.model.forward_model(
                inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, use_cache=True
            )
            c = outputs.last_hidden_state[:, -1:]
        return torch.stack(tokens, dim=1)

    def _ids(
        self,
        texts: list[str],
        negative: str,
        hw: tuple[int, int],
        latents: torch.Tensor | None,
        cfg: float,
        cfg_img: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image = None
        if latents is not None:
            patch = self.model.config.latent_patch_size
            height, width = latents.shape[-2:]
            shown = PLACEHOLDER * (height // patch * (width // patch))
            image = image_prefix(height * self.vae_factor, width * self.vae_factor) + shown
        rows = guidance_texts(texts, negative, image_prefix(*hw), image=image, cfg=cfg, cfg_img=cfg_img)
        return tokenise(self.tokenizer, rows, self.device)

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        with self.compiler.off():
            latents: torch.Tensor = self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist.sample()
        latents = (latents - self.shift_factor) * self.scaling_factor
        return latents

    def _cache(self, rows: int, length: int) -> Any:
        config = self.model.config
        cache = transformers.StaticCache(config=config, max_cache_len=length)
        cache.early_initialization(rows, config.num_key_value_heads, config.head_dim, self.dtype, self.device)
        return cache
