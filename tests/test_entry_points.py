"""Entered by other ways than a forward, and blocks out of order: equal to resident, within the budget, nothing left.

Each act runs resident, with everything streamed, and under a budget that lets some weights stay. Where a VAE or an
encoder is entered, the denoiser ran just before, so that room has to be made.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.device.simulated import SimulatedDevice
from layerstream.standins import build_tiny, run_tiny
from layerstream.standins.components import finish
from layerstream.standins.repository.tiny.recipes import picture, replaced
from layerstream.standins.repository.tokenizers import QWEN_VOCAB_SIZE
from layerstream.weights.absent import AbsentParameter, AbsentTensor
from tests.fakes import adversary, assert_restored, describe

pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*upcast_vae.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]

SLACK = 2**15  # what small tensors take more at one time than at another
# Smaller than the images here, and overlapping.
TILES = dict.fromkeys(("tile_sample_min_height", "tile_sample_min_width"), 32) | dict.fromkeys(
    ("tile_sample_stride_height", "tile_sample_stride_width"), 24
)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(name: str, **options: Any) -> Any:
    try:
        return build_tiny(name, **options)
    except ImportError as exc:
        pytest.skip(str(exc))


@cache
def tiny(name: str) -> Any:
    """For tests that leave the pipeline as it is."""
    return build(name)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, *, below: int = 60) -> torch.Tensor:
    return torch.randint(1, below, (1, count), generator=torch.Generator().manual_seed(0))


def modules_of(target: Any) -> dict[str, nn.Module]:
    if isinstance(target, nn.Module):
        return {"": target}
    found = target if isinstance(target, dict) else target.components
    return {name: m for name, m in found.items() if isinstance(m, nn.Module)}


def tensors_of(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in tensors_of(part)]


def assert_same(result: Any, expected: Any) -> None:
    found, wanted = tensors_of(result), tensors_of(expected)
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        assert b.numel()
        assert not torch.isnan(b).any()
        assert torch.equal(a, b)


@contextlib.contextmanager
def streamed(target: Any, budget: int | str, **options: Any) -> Iterator[tuple[Any, SimulatedDevice]]:
    """`target` streams on a checking device, and is afterwards as it was."""
    before = {name: describe(m) for name, m in modules_of(target).items()}
    device = adversary(**options)
    with layerstream.offload(target, vram_budget=budget, device=device) as streamer, device.checking():
        yield streamer, device
    assert device.buffer_bytes == 0
    assert not device.registered
    for name, m in modules_of(target).items():
        assert_restored(m, before[name])


def middle_budget(target: Any, act: Callable[[], Any], expected: Any, *, share: float = 0.4) -> int:
    """What `act` takes with everything streamed, and room for a `share` of all weights."""
    with streamed(target, "min") as (streamer, _):
        assert_same(act(), expected)
        least: int = streamer.stats().peak_reserved_bytes
        assert streamer.stats().num_loads > 0
    total = sum(t.nbytes for m in modules_of(target).values() for t in m.parameters())
    needed = layerstream.plan(target, vram_budget="min", device="cpu").needed_bytes  # of what does not run, too
    return max(least + int(share * total), needed) + SLACK


def check(target: Any, act: Callable[[], Any], *, share: float = 0.4) -> None:
    """`act` gives the same as resident with everything streamed, and within a budget that lets some weights stay.

    There it runs three times: the third is planned from what the first two were measured to take.
    """
    expected = act()
    limit = middle_budget(target, act, expected, share=share)
    with streamed(target, limit, copies="random") as (streamer, device):
        for _ in range(3):
            assert_same(act(), expected)
            assert device.reserved_bytes() <= limit
        assert streamer.stats().peak_reserved_bytes <= limit
        assert device.num_ooms() == 0


def denoise(pipe: Any, name: str, *, steps: int = 1) -> torch.Tensor:
    """A call without its decode: afterwards the denoiser's weights fill what room there is."""
    return run_tiny(pipe, name, output_type="latent", num_inference_steps=steps)


# ---- VAEs

# Of each VAE class: latents of two images (or videos of one frame) of 48 x 32, and its tiles, where they are not in its
# config. So each is done in two tiles and two slices.
VAES: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
    "sd15": ((2, 4, 24, 16), {}),
    "flux2_klein": ((2, 8, 12, 8), {}),
    "wan22": ((2, 16, 1, 6, 4), TILES),
    "qwen_image": ((2, 16, 1, 6, 4), TILES),
    "hunyuan_video": ((2, 8, 1, 6, 4), TILES),
    "ltx": ((2, 8, 1, 6, 4), TILES),
    "cogvideox": ((2, 4, 1, 6, 4), {"tile_sample_min_height": 32, "tile_overlap_factor_height": 0.25}),
    "sana": ((2, 8, 12, 8), TILES),
}


class VaeCalls:
    """Both calls of a pipeline's VAE after a pass of its denoiser."""

    def __init__(self, name: str) -> None:
        self.name, self.pipe = name, build(name)
        shape, self.tiles = VAES[name]
        self.latents = noise(*shape)
        self.images = noise(2, 3, *(48, 32) if len(shape) == 4 else (1, 48, 32), seed=1)

    def __call__(self) -> list[torch.Tensor]:
        vae = self.pipe.vae
        encoded = vae.encode(self.images)
        encoded = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        return [denoise(self.pipe, self.name), encoded, vae.decode(self.latents).sample]

    def switch(self, *, on: bool) -> None:
        vae = self.pipe.vae
        if on:
            vae.enable_tiling(**self.tiles)
            vae.enable_slicing()
        else:
            vae.disable_tiling()
            vae.disable_slicing()


@pytest.mark.parametrize("name", VAES)
def test_vae_in_tiles_and_slices(name: str) -> None:
    act = VaeCalls(name)
    whole = act()
    act.switch(on=True)
    assert all(not torch.equal(a, b) for a, b in zip(act()[1:], whole[1:], strict=True)), "nothing is tiled"
    check(act.pipe, act)


@pytest.mark.parametrize("name", ["sd15", "wan22"])
def test_tiling_and_slicing_switched_while_streaming(name: str) -> None:
    act = VaeCalls(name)
    whole = act()
    act.switch(on=True)
    tiled = act()
    act.switch(on=False)
    assert not torch.equal(whole[2], tiled[2])
    limit = middle_budget(act.pipe, act, whole)
    with streamed(act.pipe, limit, copies="random") as (streamer, _):
        for is_on in (False, False, True, True, False):
            act.switch(on=is_on)
            assert_same(act(), tiled if is_on else whole)
        assert streamer.stats().peak_reserved_bytes <= limit


def test_tiling_switched_off_costs_one_call_at_most() -> None:
    """The same latents need more then: what was kept for them in tiles may be too little, which is said."""
    act = VaeCalls("sd15")
    whole = act()
    limit = middle_budget(act.pipe, act, whole)
    act.switch(on=True)
    tiled = act()
    with streamed(act.pipe, limit):
        for _ in range(3):
            assert_same(act(), tiled)
        act.switch(on=False)
        with contextlib.suppress(torch.OutOfMemoryError):
            act()
        for _ in range(3):
            assert_same(act(), whole)


def test_latents_decoded_by_the_user() -> None:
    pipe = tiny("sd15")

    def act() -> tuple[torch.Tensor, ...]:
        latents = denoise(pipe, "sd15")
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
        return latents, pipe.image_processor.postprocess(image, output_type="pt")

    with torch.inference_mode():  # as many call it
        check(pipe, act)


def test_the_forward_of_a_vae() -> None:
    pipe = tiny("sd15")
    image = 2 * picture() - 1
    check(pipe, lambda: (denoise(pipe, "sd15"), pipe.vae(image).sample))


def test_a_part_of_a_vae_called_after_the_denoiser() -> None:
    """Nothing is called that pipelines call: the decoder's own forward, which needs the room that the denoiser has. It
    is found on the stack when it reads the first weight."""
    pipe = tiny("sd15")
    latents = noise(2, 4, 32, 32)

    def act() -> tuple[torch.Tensor, ...]:
        vae = pipe.vae
        return denoise(pipe, "sd15", steps=3), vae.decoder(vae.post_quant_conv(latents))

    check(pipe, act)


def test_a_part_of_a_vae_called_after_its_weights_were_read() -> None:
    """A read takes next to nothing, which says nothing about what a call of the decoder takes."""
    pipe = tiny("flux2_klein")
    latents = noise(2, 8, 16, 16)

    def read() -> tuple[torch.Tensor, ...]:
        return denoise(pipe, "flux2_klein"), pipe.vae.bn.running_mean.view(1, -1) + 0

    def act() -> tuple[torch.Tensor, ...]:
        vae = pipe.vae
        return *read(), *read(), vae.decoder(vae.post_quant_conv(latents))

    check(pipe, act)


def test_a_part_of_a_vae_called_in_the_middle_of_denoising() -> None:
    """For a preview, say; the pipeline goes on afterwards. In the third call all of the VAE may be kept meanwhile."""
    pipe = tiny("sd15")
    seen: list[torch.Tensor] = []

    def preview(pipe: Any, step: int, time: int, given: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            latents = given["latents"][:, :, :16, :16].repeat(2, 1, 2, 2)
            seen.append(pipe.vae.quant_conv.weight.sum() + pipe.vae.decoder(pipe.vae.post_quant_conv(latents)))
        return {}

    def act() -> tuple[torch.Tensor, ...]:
        seen.clear()
        found = run_tiny(pipe, "sd15", output_type="latent", num_inference_steps=3, callback_on_step_end=preview)
        return found, *seen

    check(pipe, act)


def test_what_is_held_beside_the_decode_is_not_held_beside_the_encode() -> None:
    """The larger of both calls and the more of what others hold never come together."""
    pipe = tiny("sd15")
    images, latents = noise(1, 3, 96, 96), noise(1, 4, 8, 8)

    def act() -> tuple[torch.Tensor, ...]:
        encoded = pipe.vae.encode(images).latent_dist.mode()
        held = torch.zeros(300_000)
        return encoded, pipe.vae.decode(latents).sample, held[:1]

    check(pipe, act)


@pytest.mark.parametrize("name", ["sdxl_img2img", "animatediff_sdxl"])
def test_a_vae_cast_inside_each_call(name: str) -> None:
    """As a whole, and single layers of it down again. The order of the blocks is the same in the next call.

    Without a limit: casts are done at home, and the simulated device cannot tell that from its own memory.
    """
    pipe = build(name, dtype=torch.float16)
    expected = run_tiny(pipe, name, num_inference_steps=1)
    with streamed(pipe, "min") as (streamer, _):
        for _ in range(2):
            assert_same(run_tiny(pipe, name, num_inference_steps=1), expected)
        stats = streamer.stats()
        assert_same(run_tiny(pipe, name, num_inference_steps=1), expected)
        assert streamer.stats().num_relaid > stats.num_relaid
        assert streamer.stats().num_demand_loads <= stats.num_demand_loads + 1


# ---- text and vision


def vision_inputs(patch_values: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of an image of 8 x 8 of them, and their grid."""
    return noise(64, patch_values), torch.tensor([[1, 8, 8]])


def features_of(output: Any) -> Any:
    """Older versions of transformers return the features themselves."""
    return getattr(output, "pooler_output", output)


@pytest.mark.parametrize(
    ("name", "attribute"),
    [("longcat", "text_encoder"), ("flux2_klein", "text_encoder"), ("audioldm2", "language_model")],
)
def test_generate(name: str, attribute: str) -> None:
    """A head apart, a head tied to the embedding, and one of another family."""
    pipe = tiny(name)
    model, prompt = getattr(pipe, attribute), tokens(6)
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    check(pipe, lambda: model.generate(input_ids=prompt, max_new_tokens=5, **options))


def test_generate_again_in_what_it_took() -> None:
    """A token loop keeps a quarter more than it took so far, for the tokens to come; where there is no quarter more, it
    runs in what it has run in."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    prompt = tokens(40).repeat(4, 1)
    check(model, lambda: model.generate(prompt, max_new_tokens=20, do_sample=False), share=0.1)


def test_generate_from_an_image() -> None:
    pipe = tiny("longcat")
    pixels, grid = vision_inputs(3 * 2 * 4 * 4)
    prompt = torch.tensor([[259, *[262] * 16, 260, *range(20, 30)]])  # 8 x 8 patches become 4 x 4 tokens
    inputs = {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "pixel_values": pixels,
        "image_grid_thw": grid,
    }
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 256}
    if "mm_token_type_ids" in transformers.Qwen2_5_VLForConditionalGeneration.forward.__code__.co_varnames:
        inputs["mm_token_type_ids"] = (prompt == 262).long()
    check(pipe, lambda: pipe.text_encoder.generate(**inputs, **options))


def test_generate_by_a_model_that_borrows_a_component() -> None:
    """Ideogram puts a head on its text encoder to rewrite prompts; what generates is none of its components."""
    pipe = build("ideogram4")
    from diffusers import Ideogram4PromptEnhancerHead

    head = Ideogram4PromptEnhancerHead(hidden_size=32, vocab_size=QWEN_VOCAB_SIZE)
    pipe.register_modules(prompt_enhancer_head=finish(head, dtype=torch.float32, seed=9, std=0.2))

    def act() -> torch.Tensor:
        module = "diffusers.pipelines.ideogram4.prompt_enhancer"
        with replaced(module, "CAPTION_SYSTEM_MESSAGE", lambda kept: "Caption."):
            [text] = pipe.upsample_prompt("a fox", max_new_tokens=6, temperature=0.0)
        return torch.tensor([ord(letter) for letter in text])

    check(pipe, act)


@pytest.mark.parametrize("is_direct", [False, True])
@pytest.mark.parametrize("name", ["longcat", "ideogram4"])
def test_vision_towers(name: str, is_direct: bool) -> None:
    """By the method that pipelines call, and by the tower itself."""
    pipe = tiny(name)
    encoder = pipe.text_encoder
    pixels, grid = vision_inputs(3 * 2 * 4 * 4)

    def act() -> Any:
        if is_direct:
            tower = next(m for n, m in encoder.named_modules() if n.endswith("visual"))
            return features_of(tower(pixels, grid_thw=grid))
        output = encoder.get_image_features(pixels, grid)
        return [*features_of(output), *(getattr(output, "deepstack_features", None) or [])]

    check(pipe, act)


def test_features_of_other_encoders() -> None:
    pipe = tiny("glm_image")
    pixels, grid = vision_inputs(3 * 8 * 8)
    check(pipe, lambda: features_of(pipe.vision_language_encoder.get_image_features(pixels, grid)))
    pipe = tiny("audioldm2")
    prompt = tokens(8)
    check(pipe, lambda: features_of(pipe.text_encoder.get_text_features(prompt, torch.ones_like(prompt))))


def test_an_image_encoder() -> None:
    pipe = tiny("sd15_ip_adapter")
    image = picture(height=16, width=16)
    check(pipe, lambda: (denoise(pipe, "sd15_ip_adapter"), pipe.image_encoder(image).image_embeds))


@pytest.mark.parametrize("name", ["sd3", "sdxl_img2img"])
def test_clip_skip(name: str) -> None:
    pipe = tiny(name)
    assert not torch.equal(
        run_tiny(pipe, name, num_inference_steps=1), run_tiny(pipe, name, clip_skip=1, num_inference_steps=1)
    )
    check(pipe, lambda: run_tiny(pipe, name, clip_skip=1, num_inference_steps=1))


def clip_of(pipe: Any) -> Any:
    """The part of a CLIPTextModel that has the layers; the model itself since transformers 5."""
    return getattr(pipe.text_encoder, "text_model", pipe.text_encoder)


def run_layer(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """The states after a layer of a CLIP encoder, without masks: one argument in transformers 5, two before."""
    masks = [name for name in inspect.signature(layer.forward).parameters if name.endswith("attention_mask")]
    output = layer(states, **dict.fromkeys(masks))
    return output if isinstance(output, torch.Tensor) else output[0]


PARTS: dict[str, Callable[[Any, torch.Tensor, torch.Tensor], Any]] = {
    # What pipelines do with clip_skip: a norm, outside of the model's call.
    "norm": lambda clip, ids, states: clip.final_layer_norm(states),
    "embeddings": lambda clip, ids, states: clip.embeddings(ids),
    "encoder": lambda clip, ids, states: clip.encoder(inputs_embeds=states)[0],
    "layer": lambda clip, ids, states: run_layer(clip.encoder.layers[2], states),
    "inside a layer": lambda clip, ids, states: clip.encoder.layers[1].mlp(states),
    "weight of a layer": lambda clip, ids, states: states @ clip.encoder.layers[1].mlp.fc1.weight.T,
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_text_encoder(part: str) -> None:
    pipe = tiny("sd15")
    ids, states = tokens(77), noise(1, 77, 32)
    check(pipe, lambda: (denoise(pipe, "sd15"), PARTS[part](clip_of(pipe), ids, states)))


# ---- weights read from outside


@pytest.mark.parametrize("share", [0.1, 0.2, 0.4])
def test_weights_read_between_calls(share: float) -> None:
    """Of a component that is to run, of one that has run, and of blocks."""
    pipe = tiny("flux2_klein")

    def act() -> list[torch.Tensor]:
        latents = denoise(pipe, "flux2_klein")
        norm, transformer = pipe.vae.bn, pipe.transformer
        mean, std = norm.running_mean.view(1, -1, 1, 1) + 0, torch.sqrt(norm.running_var.view(1, -1, 1, 1) + 1e-4)
        weights = [
            pipe.text_encoder.get_input_embeddings().weight,
            transformer.x_embedder.weight,
            transformer.transformer_blocks[1].attn.to_q.weight,
            transformer.single_transformer_blocks[3].attn.to_out.weight,
        ]
        return [latents, mean, std, *(w.sum() for w in weights), pipe.vae.decode(latents).sample]

    check(pipe, act, share=share)


def test_buffers_of_a_vae_read_between_calls() -> None:
    pipe = tiny("ltx")
    vae = pipe.vae
    vae.latents_mean.copy_(torch.linspace(-1, 1, vae.latents_mean.numel()))
    check(pipe, lambda: (run_tiny(pipe, "ltx", num_inference_steps=1), vae.latents_mean * 2, vae.latents_std * 2))


def test_weights_read_inside_another_components_forward() -> None:
    """Inside a call another phase's weights have no room of their own."""
    pipe = tiny("flux2_klein")
    layers = next(m for n, m in pipe.text_encoder.named_modules() if n.endswith("layers"))

    def act() -> list[torch.Tensor]:
        seen = []

        def before(module: nn.Module, args: object) -> None:
            seen.append(pipe.vae.bn.running_mean + layers[1].mlp.up_proj.weight.sum())

        def after(module: nn.Module, args: object, output: object) -> None:
            seen.append(pipe.transformer.single_transformer_blocks[2].attn.to_out.weight.sum())

        handles = [
            pipe.transformer.register_forward_pre_hook(before),
            pipe.transformer.transformer_blocks[1].register_forward_hook(after),
        ]
        try:
            return [run_tiny(pipe, "flux2_klein", num_inference_steps=2), *seen]
        finally:
            for handle in handles:
                handle.remove()

    check(pipe, act)


def test_another_pipeline_of_the_same_components() -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = tiny("sd15")
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)

    def act() -> tuple[torch.Tensor, ...]:
        first = run_tiny(pipe, "sd15", num_inference_steps=1)
        return first, run_tiny(other, "sd15", image=first, strength=1.0, num_inference_steps=1, height=None, width=None)

    check(pipe, act)


# ---- blocks out of order


def test_skipped_layers() -> None:
    """Stable Diffusion 3 runs a third pass without some blocks, in the middle of its steps only."""
    pipe = tiny("sd3")
    guidance = {"skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.8}
    plain = run_tiny(pipe, "sd3")

    def act() -> torch.Tensor:
        return run_tiny(pipe, "sd3", skip_guidance_layers=[1, 2], **guidance)

    assert not torch.equal(act(), plain)
    check(pipe, act)


def test_two_controlnets() -> None:
    """A list of two whole networks, whose residuals are added up."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    pipe = build("sd15_controlnet")
    second = finish(ControlNetModel.from_config(pipe.controlnet.config), dtype=torch.float32, seed=7, std=0.2)
    both = StableDiffusionControlNetPipeline(
        **{**pipe.components, "controlnet": [pipe.controlnet, second]}, requires_safety_checker=False
    )
    both.set_progress_bar_config(disable=True)
    images = [picture(), 1 - picture()]
    check(both, lambda: run_tiny(both, "sd15_controlnet", image=images, num_inference_steps=1))


@pytest.mark.parametrize("order", [(2, 1, 0), (0, 1), (1,), (0, 0, 2, 1, 0)], ids=str)
def test_blocks_driven_from_outside(order: tuple[int, ...]) -> None:
    """In reverse, with an early exit, and repeated; every other call in the usual order."""
    pipe = tiny("sd15")
    clip, ids, states = clip_of(pipe), tokens(77), noise(1, 77, 32)

    def act() -> tuple[torch.Tensor, ...]:
        hidden = states
        for number in order:
            hidden = run_layer(clip.encoder.layers[number], hidden)
        return hidden, pipe.text_encoder(ids)[0]

    check(pipe, act)


def test_an_early_exit_inside_the_forward() -> None:
    """What hooks of users do to have the states of a layer in the middle: leave by an exception."""
    pipe = tiny("sd3")
    encoder = pipe.text_encoder_3
    ids = tokens(9)

    class FoundError(Exception):
        pass

    def act() -> list[torch.Tensor]:
        found = []

        def stop(module: nn.Module, args: object, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            raise FoundError

        handle = encoder.encoder.block[1].register_forward_hook(stop)
        with contextlib.suppress(FoundError):
            encoder(ids)
        handle.remove()
        return [*found, encoder(ids)[0]]

    check({"encoder": encoder, "transformer": pipe.transformer}, act)


def caches() -> dict[str, Callable[[Any], Any]]:
    hooks = pytest.importorskip("diffusers.hooks")
    return {
        # The largest threshold: after the first step every block but the first is skipped.
        "first_block": lambda pipe: hooks.FirstBlockCacheConfig(threshold=1e9),
        "attention": lambda pipe: hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: pipe._current_timestep,
        ),
    }


@pytest.mark.parametrize("kind", ["first_block", "attention"])
def test_blocks_replaced_by_a_cache(kind: str) -> None:
    """Of diffusers, whose hooks replace the blocks' forwards: put on before streaming, and while streaming."""
    pipe = build("flux")
    try:
        config = caches()[kind]
    except AttributeError as exc:
        pytest.skip(str(exc))

    def act() -> torch.Tensor:
        return run_tiny(pipe, "flux", num_inference_steps=2)

    plain = act()
    pipe.transformer.enable_cache(config(pipe))
    cached = act()
    assert not torch.equal(cached, plain)
    check(pipe, act)
    pipe.transformer.disable_cache()
    device = adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device), device.checking():
        assert_same(act(), plain)
        pipe.transformer.enable_cache(config(pipe))
        assert_same(act(), cached)
        assert_same(act(), cached)
        pipe.transformer.disable_cache()
        assert_same(act(), plain)
    assert_same(act(), plain)


def test_blocks_replaced_by_identity() -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    if not hasattr(hooks, "apply_layer_skip"):
        pytest.skip("this diffusers has no layer skip")
    pipe = build("flux")
    plain = run_tiny(pipe, "flux", num_inference_steps=2)
    config = hooks.LayerSkipConfig(indices=[1, 2], fqn="transformer_blocks")
    hooks.apply_layer_skip(pipe.transformer, config)
    assert not torch.equal(run_tiny(pipe, "flux", num_inference_steps=2), plain)
    check(pipe, lambda: run_tiny(pipe, "flux", num_inference_steps=2))


# ---- what gives its room is gone


def present_bytes(module: nn.Module) -> int:
    """Bytes of the tensors that are on the device; to ask for their types loads none."""
    tensors = {id(t): t for t in [*module.parameters(), *module.buffers()]}.values()
    return sum(t.nbytes for t in tensors if not isinstance(t, AbsentParameter | AbsentTensor))


@pytest.mark.parametrize("name", ["sd3", "wan22", "longcat", "sd15_ip_adapter"])
def test_what_gave_its_room_is_off_the_device(name: str) -> None:
    """While the denoiser runs, nothing is there of encoders and VAE but what the plan keeps."""
    pipe = tiny(name)

    def act() -> torch.Tensor:
        return run_tiny(pipe, name, num_inference_steps=2)

    expected = act()
    limit = middle_budget(pipe, act, expected, share=0.3)
    denoisers = {n: m for n, m in modules_of(pipe).items() if n.startswith(("transformer", "unet"))}
    others = {n: m for n, m in modules_of(pipe).items() if n not in denoisers}
    most: dict[str, int] = {}
    num_seen = 0

    with streamed(pipe, limit) as (streamer, device):

        def look_at_own(module: nn.Module, args: object) -> None:
            for n, other in others.items():
                most[n] = max(most.get(n, 0), present_bytes(other))

        def look_at_others(module: nn.Module, args: object) -> None:
            nonlocal num_seen
            num_seen += 1
            component = next(n for n, m in denoisers.items() if any(module is inner for inner in m.modules()))
            phase = streamer.plan.phase_of(component)
            for n, other in others.items():
                kept = [u for u in streamer.plan.units if u.component == n and u.index in phase.kept]
                assert present_bytes(other) <= sum(u.num_bytes for u in kept), n
            assert device.buffer_bytes <= phase.weights_bytes
            if phase.peak_bytes is not None:
                assert phase.peak_bytes <= limit

        handles = [m.register_forward_pre_hook(look_at_own) for other in others.values() for m in other.modules()]
        for denoiser in denoisers.values():
            blocks = next(m for m in denoiser.modules() if isinstance(m, nn.ModuleList))
            handles += [block.register_forward_pre_hook(look_at_others) for block in blocks]
        for _ in range(3):
            assert_same(act(), expected)
        for handle in handles:
            handle.remove()
        phase = streamer.plan.phase_of(next(iter(denoisers)))
        given_up = [u.name for u in streamer.plan.units if u.component in others and u.index not in phase.kept]
    assert given_up, "the budget is too large to show anything"
    assert num_seen
    assert all(most[n] > 0 for n in others), "each was on the device while it ran"
