"""The model around its four children, and the loop in which its language model writes a sketch."""

from types import SimpleNamespace
from typing import Any

import torch

from layerstream.standins.libraries import diffusers, transformers
from layerstream.standins.repository.autoregressive.mammoth.dit import Transformer2DModel
from layerstream.standins.repository.autoregressive.mammoth.llm import MammothQwen3VL
from layerstream.standins.repository.autoregressive.mammoth.rope import tables
from layerstream.standins.repository.autoregressive.mammoth.sampling import Sampling, next_token
from layerstream.standins.repository.autoregressive.mammoth.visual_tokenizer import VisualDiscreteTokenizer

# Of a prompt, so many last tokens stay in the rows without it: those that begin the answer.
KEPT_WITHOUT_PROMPT = 10


class Mammothmoda2Config(transformers.PretrainedConfig):  # type: ignore[misc, name-defined]  # Any to mypy
    model_type = "mammothmoda2"


class GenTransport:
    """The path from noise to image: straight, in equal steps."""

    def times(self, count: int) -> list[float]:
        return [i / count for i in range(count + 1)]


class Mammothmoda2Model(transformers.PreTrainedModel):  # type: ignore[misc, name-defined]  # Any to mypy
    """Has no `forward`: `generate` calls `llm_model`, and `decode_diffusion_image` the others."""

    config_class = Mammothmoda2Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.llm_model = MammothQwen3VL(config.llm_config)
        self.gen_tokenizer = VisualDiscreteTokenizer(config.gen_tokenizer_config)
        self.gen_vae = diffusers.AutoencoderKL.from_config(config.gen_vae_config)
        self.gen_transformer = Transformer2DModel(**config.gen_dit_config)
        self.gen_freqs_cis = tables(config.gen_axes_dim_rope, config.gen_axes_lens)
        self.gen_transport = GenTransport()
        self.post_init()

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        ar_height: int,
        ar_width: int,
        sampling: Sampling,
        gen_pixel_values: torch.Tensor | None = None,
        **shown: torch.Tensor,
    ) -> SimpleNamespace:
        """Return `input_ids` and `attention_mask` [1, length] of prompt and sketch.

        Args:
            input_ids: [1, length] of the prompt.
            attention_mask: [1, length].
            ar_height: rows of the sketch.
            ar_width: tokens of a row, and one more that ends it.
            sampling: how tokens are drawn, by the global generator.
            gen_pixel_values: an image to edit [1, 3, height, width] in -1..1; its codes follow the prompt.
            **shown: `pixel_values` and `image_grid_thw` of the same image, for the vision tower.
        """
        device = next(self.parameters()).device
        input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
        if gen_pixel_values is not None:
            dtype = next(self.gen_tokenizer.parameters()).dtype
            codes = self.gen_tokenizer.encode(gen_pixel_values.to(device, dtype))
            input_ids = torch.cat([input_ids, codes + self.config.gen_vocab_start_index], dim=1)
            attention_mask = torch.ones_like(input_ids)
        return self.generate_t2i(input_ids, attention_mask, ar_height, ar_width, sampling, shown)

    def generate_t2i(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        ar_height: int,
        ar_width: int,
        sampling: Sampling,
        shown: dict[str, torch.Tensor],
    ) -> SimpleNamespace:
        device = input_ids.device
        first, codes = self.config.gen_vocab_start_index, self.config.gen_tokenizer_config["num_codes"]
        end_of_row = input_ids.new_full((1,), first + codes)
        without = attention_mask.clone()
        without[:, :-KEPT_WITHOUT_PROMPT] = 0
        mask = torch.cat([attention_mask, without])
        sequence = input_ids
        cache = transformers.DynamicCache()
        fed = input_ids.repeat(2, 1)
        # Both rows show the image, where there is one.
        given = {key: value.to(device).repeat(2, *[1] * (value.ndim - 1)) for key, value in shown.items()}
        cache_position = torch.arange(fed.shape[1], device=device)
        for step in range(ar_height * (ar_width + 1)):
            outputs = self.llm_model(
                input_ids=fed,
                attention_mask=mask,
                use_cache=True,
                past_key_values=cache,
                cache_position=cache_position,
                **given,
            )
            given = {}
            token = next_token(outputs.logits[:, -1], sampling, first=first, last=first + codes)
            if (step + 1) % (ar_width + 1) == 0:
                token = end_of_row
            sequence = torch.cat([sequence, token[:, None]], dim=1)
            fed = token[:, None].repeat(2, 1)
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            cache_position = cache_position[-1:] + 1
        return SimpleNamespace(input_ids=sequence, attention_mask=torch.ones_like(sequence))

    def encode_vae(self, image: torch.Tensor) -> torch.Tensor:
        """Return latents of an image [1, 3, height, width] in -1..1."""
        latents: torch.Tensor = self.gen_vae.encode(image.to(self.gen_vae.dtype)).latent_dist.mode()
        factor: float = self.gen_vae.config.scaling_factor
        return latents * factor
