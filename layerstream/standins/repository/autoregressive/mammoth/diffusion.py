"""From prompt and sketch to an image: hidden states of the language model, the loop of the denoiser, the decode."""

from typing import Any

import torch


@torch.inference_mode()
def decode_diffusion_image(
    *,
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    negative_ids: torch.Tensor,
    height: int,
    width: int,
    num_inference_steps: int = 50,
    text_guidance_scale: float = 5.0,
    image_guidance_scale: float = 1.0,
    cfg_range: tuple[float, float] = (0.0, 1.0),
    ref_images: list[torch.Tensor] | None = None,
    generator: torch.Generator | None = None,
    shown: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return images [1, 3, height, width] in 0..1.

    Args:
        model: a Mammothmoda2Model.
        input_ids: [1, length] of prompt and sketch.
        attention_mask: [1, length].
        negative_ids: [1, length], without a sketch.
        cfg_range: between these times there is guidance.
        ref_images: images to edit [1, 3, height, width] in -1..1.
        generator: on the CPU, draws the latents.
        shown: what the vision tower is given of an image in the prompt.
    """
    device = next(model.parameters()).device
    dtype = model.gen_transformer.dtype
    is_image = input_ids[0] >= model.config.gen_vocab_start_index
    states = _states(model, input_ids.to(device), **{key: value.to(device) for key, value in (shown or {}).items()})
    text, sketch = states[:, ~is_image], states[:, is_image]
    negative = _states(model, negative_ids.to(device))
    references = [model.encode_vae(image.to(device)).to(dtype) for image in ref_images or []]
    channels = model.gen_vae.config.latent_channels
    shape = (1, channels, height // 8, width // 8)
    latents = torch.randn(shape, generator=generator).to(device, torch.float32)
    times = model.gen_transport.times(num_inference_steps)
    for i, t in enumerate(times[:-1]):
        moment = {
            "hidden_states": latents.to(dtype),
            "timestep": torch.full((1,), t, device=device),
            "freqs_cis": model.gen_freqs_cis,
        }
        velocity = model.gen_transformer(
            **moment, text_hidden_states=text, image_hidden_states=sketch, ref_image_hidden_states=references
        ).float()
        if cfg_range[0] <= t <= cfg_range[1] and text_guidance_scale > 1:
            without = model.gen_transformer(**moment, text_hidden_states=negative).float()
            middle = without
            if references and image_guidance_scale > 1:
                middle = model.gen_transformer(
                    **moment, text_hidden_states=negative, ref_image_hidden_states=references
                ).float()
            velocity = without + image_guidance_scale * (middle - without) + text_guidance_scale * (velocity - middle)
        latents = latents + (times[i + 1] - t) * velocity
    decoded = model.gen_vae.decode((latents / model.gen_vae.config.scaling_factor).to(model.gen_vae.dtype)).sample
    image: torch.Tensor = (decoded.float() / 2 + 0.5).clamp(0, 1)
    return image


def _states(model: Any, input_ids: torch.Tensor, **shown: torch.Tensor) -> torch.Tensor:
    """Return the mean [1, length, hidden] of the hidden states that condition the denoiser."""
    outputs = model.llm_model(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        use_cache=False,
        output_hidden_states=True,
        **shown,
    )
    chosen = [outputs.hidden_states[index] for index in model.config.gen_condition_layers]
    return torch.stack(chosen).mean(0).to(model.gen_transformer.dtype)
