"""What each component of the tiny pipelines is divided into: a change in the adapters is seen here, model by model."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.model.adapters.registry import adapter_for
from layerstream.model.units import ComponentLayout, Unit, divide
from layerstream.standins import TINY_PIPELINES, build_tiny
from layerstream.standins.components import finish
from layerstream.standins.weights import skip_init
from layerstream.weights.absent import AbsentParameter, AbsentTensor
from tests.fakes import adversary

pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

# How many blocks are in the stacks of each kind; "*" stands for any number. By class where pipelines share it. Leaves
# that are units of their own, such as an embedding, are not stacks.
OF_ENCODERS = {
    "CLIPTextModel": "encoder.layers:3",
    "CLIPTextModelWithProjection": "encoder.layers:3",
    "CLIPVisionModelWithProjection": "vision_model.encoder.layers:3",
    "ClapModel": "encoder.layer:3 audio_model.audio_encoder.layers:2",
    "GPT2LMHeadModel": "transformer.h:3",
    "Gemma2Model": "layers:3",
    "GlmImageForConditionalGeneration": "visual.blocks:3 language_model.layers:3",
    "LlamaModel": "layers:5",
    "Qwen2_5_VLForConditionalGeneration": "visual.blocks:3 language_model.layers:3",
    "Qwen3ForCausalLM": "layers:3",
    "Qwen3Model": "layers:3",
    "Qwen3VLModel": "visual.blocks:3 language_model.layers:3",
    "SmolLM3ForCausalLM": "layers:3",
    "SpeechT5HifiGan": "upsampler:2 resblocks:4",
    "T5EncoderModel": "encoder.block:3",
    "UMT5EncoderModel": "encoder.block:3",
}
FLUX_LIKE = "transformer_blocks:4 single_transformer_blocks:4"
SD15_UNET = (
    "down_blocks.*.attentions.*.transformer_blocks:3 up_blocks.*.resnets:8 "
    "up_blocks.*.attentions.*.transformer_blocks:6 mid_block.attentions.*.transformer_blocks:1 mid_block.resnets:2"
)
OF_DENOISERS = {
    "sd3": {"transformer": "transformer_blocks:4"},
    "flux": {"transformer": FLUX_LIKE},
    "ovis": {"transformer": FLUX_LIKE},
    "longcat": {"transformer": FLUX_LIKE},
    "qwen_image": {"transformer": "transformer_blocks:4"},
    "flux_controlnet": {
        "transformer": FLUX_LIKE,
        "controlnet": "transformer_blocks:2 single_transformer_blocks:2 controlnet_blocks:2 controlnet_single_blocks:2",
    },
    "qwen_image_edit": {"transformer": "transformer_blocks:4"},
    "flux2_klein": {"transformer": FLUX_LIKE},
    "ideogram4": {"transformer": "layers:4", "unconditional_transformer": "layers:4"},
    "wan22": {"transformer": "blocks:4", "transformer_2": "blocks:4"},
    "wan_vace": {"transformer": "blocks:8 vace_blocks:4"},
    "hunyuan_video": {"transformer": f"context_embedder.token_refiner.refiner_blocks:2 {FLUX_LIKE}"},
    "ltx": {"transformer": "transformer_blocks:4"},
    "cogvideox": {"transformer": "transformer_blocks:4"},
    "latte": {"transformer": "transformer_blocks:4 temporal_transformer_blocks:4"},
    "kandinsky5": {"transformer": "text_transformer_blocks:2 visual_transformer_blocks:4"},
    "sd15": {"unet": SD15_UNET},
    "sd15_controlnet": {
        "unet": SD15_UNET,
        "controlnet": "controlnet_cond_embedding.blocks:2 controlnet_down_blocks:8 mid_block.resnets:2",
    },
    "sd15_ip_adapter": {"unet": SD15_UNET},
    "sdxl_img2img": {
        "unet": "down_blocks.*.attentions.*.transformer_blocks:5 up_blocks.*.attentions.*.transformer_blocks:10 "
        "up_blocks.*.resnets:6 mid_block.attentions.*.transformer_blocks:3 mid_block.resnets:2",
    },
    "animatediff_sdxl": {
        "unet": "down_blocks.*.attentions.*.transformer_blocks:2 up_blocks.*.attentions:4 up_blocks.*.resnets:6 "
        "up_blocks.*.motion_modules:6 mid_block.attentions.*.transformer_blocks:2 mid_block.resnets:2",
        "motion_adapter": "up_blocks.*.motion_modules:6",
    },
    "stable_cascade": {
        # Lists of three kinds of blocks in turns; in the decoder each is there once, so that they pass for layers.
        "prior_prior": "down_blocks.*:6 up_blocks.*:6",
        "decoder": "down_downscalers:3 up_upscalers:3 up_repeat_mappers.*:4",
    },
    "aura_flow": {"transformer": "joint_transformer_blocks:4 single_transformer_blocks:4"},
    "pixart": {"transformer": "transformer_blocks:4"},
    "sana": {"transformer": "transformer_blocks:4"},
    "lumina2": {"transformer": "noise_refiner:2 context_refiner:2 layers:4", "text_encoder": "layers:4"},
    "glm_image": {"transformer": "transformer_blocks:4"},
    # A projection of the text's states per block is too small to stream by itself.
    "bria_fibo_edit": {"transformer": FLUX_LIKE},
    "cosmos": {"transformer": "transformer_blocks:4", "safety_checker": ""},
    "glm_image_edit": {"transformer": "transformer_blocks:4"},
    "audioldm2": {
        "unet": "down_blocks.*.attentions:6 up_blocks.*.attentions:12 up_blocks.*.resnets:6 mid_block.attentions:3 "
        "mid_block.resnets:2",
        "projection_model": "",
    },
}
# Less than six tenths of these are in blocks. The ControlNet of true size has more layers in each list.
MOSTLY_BASE = {
    ("stable_cascade", "decoder"),
    ("sd15_controlnet", "controlnet"),
    ("audioldm2", "projection_model"),
    ("cosmos", "safety_checker"),
}


@cache
def tiny(name: str) -> Any:
    try:
        return build_tiny(name)
    except ImportError as exc:
        pytest.skip(str(exc))


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    return {name: m for name, m in pipe.components.items() if isinstance(m, nn.Module)}


def layout_of(name: str, module: nn.Module) -> ComponentLayout:
    return adapter_for(module).layout(name, module)


def summary(layout: ComponentLayout) -> str:
    counts: dict[str, int] = {}
    for stack in layout.stacks:
        if stack.blocks[0][0] != stack.name:  # else a leaf by itself
            kind = re.sub(r"\.\d+(?=\.|$)", ".*", stack.name)
            # Between versions of transformers these come and go.
            kind = kind.removeprefix("text_model.").removeprefix("model.")
            counts[kind] = counts.get(kind, 0) + len(stack.blocks)
    return " ".join(f"{kind}:{count}" for kind, count in counts.items())


def is_autoencoder(module: nn.Module) -> bool:
    return all(callable(getattr(module, name, None)) for name in ("encode", "decode"))


def test_every_tiny_pipeline_is_listed() -> None:
    assert set(OF_DENOISERS) == set(TINY_PIPELINES)


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_stacks_of_every_component(name: str) -> None:
    found, expected = {}, {}
    for key, module in modules_of(tiny(name)).items():
        found[key] = summary(layout_of(key, module))
        if is_autoencoder(module):
            expected[key] = ""  # comes and goes as a whole
        else:
            expected[key] = OF_DENOISERS[name].get(key, OF_ENCODERS.get(type(module).__name__))
    assert found == expected
    assert OF_DENOISERS[name].keys() <= found.keys()


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_who_repeats_and_how_much_streams(name: str) -> None:
    for key, module in modules_of(tiny(name)).items():
        layout = layout_of(key, module)
        is_encoder = type(module).__name__ in OF_ENCODERS
        assert layout.is_repeated == (not is_encoder and not is_autoencoder(module)), key
        units = divide([layout]).units
        in_blocks = sum(u.spec.num_bytes for u in units if u.spec.is_block)
        share = in_blocks / sum(u.spec.num_bytes for u in units)
        if is_autoencoder(module):
            assert share == 0
            assert {"encode", "decode"} <= set(layout.entry_points)
        else:
            assert (share > 0.6) != ((name, key) in MOSTLY_BASE), f"{key}: {share:.0%}"


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_every_tensor_of_every_component_is_in_a_unit(name: str) -> None:
    """Nothing of any component is on the device before it is called, and all of it is away."""
    pipe = tiny(name)
    device = adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device) as streamer:
        for key, module in modules_of(pipe).items():
            tensors = [*module.parameters(), *module.buffers()]
            assert tensors, key
            assert all(isinstance(t, AbsentParameter | AbsentTensor) for t in tensors), key
        assert device.buffer_bytes == 0
        units = streamer.plan.units
        assert {unit.component for unit in units} == set(modules_of(pipe))


# ---- embeddings that are larger than a block

VOCABULARY, WIDTH = 1000, 32


def t5(kind: str) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=16, d_ff=64, num_layers=3, num_heads=2
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def qwen_vl(*, is_tied: bool) -> Any:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]},
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": is_tied,
    }
    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": 4,
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=is_tied)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


ENCODERS = {
    "t5": lambda: t5("T5"),
    "umt5": lambda: t5("UMT5"),
    "qwen_vl": lambda: qwen_vl(is_tied=False),
    "qwen_vl_tied": lambda: qwen_vl(is_tied=True),
}


def encoder(kind: str) -> tuple[Any, list[Unit]]:
    with skip_init():
        model = ENCODERS[kind]()
    finish(model, dtype=torch.float32, seed=0, std=0.2)
    return model, divide([layout_of("text_encoder", model)]).units


def units_of_tables(model: nn.Module, units: list[Unit]) -> list[Unit]:
    """Which units hold the embedding of the vocabulary, and the head of that size."""
    tables = {id(p) for p in model.parameters() if p.shape[0] == VOCABULARY}
    return [u for u in units if any(id(bound.tensor) in tables for bound in u.binding.tensors)]


@pytest.mark.parametrize("kind", ENCODERS)
def test_large_embeddings_are_stored_once(kind: str) -> None:
    model, units = encoder(kind)
    found = units_of_tables(model, units)
    assert len(found) == (2 if kind == "qwen_vl" else 1), "one for each table, however many modules have it"
    blocks = [u for u in units if u.module is not None and u not in found]
    assert all(u.spec.num_bytes > max(b.spec.num_bytes for b in blocks) for u in found)
    assert sum(u.spec.num_bytes for u in found) < 2.02 * VOCABULARY * WIDTH * 4


@pytest.mark.parametrize("kind", ["t5", "umt5", "qwen_vl"])
def test_large_embeddings_are_units_of_their_own(kind: str) -> None:
    """Also in T5, where two modules have the same embedding, of which one is called."""
    model, units = encoder(kind)
    for unit in units_of_tables(model, units):
        assert unit.module is not None, f"the table is in `{unit.spec.name}`"
        assert unit.spec.num_bytes == VOCABULARY * WIDTH * 4


def test_an_embedding_tied_to_the_head_is_in_the_base() -> None:
    model, units = encoder("qwen_vl_tied")
    [unit] = units_of_tables(model, units)
    assert unit.module is None


@pytest.mark.parametrize("kind", ENCODERS)
def test_large_embeddings_stream(kind: str) -> None:
    model, _ = encoder(kind)
    ids = torch.randint(0, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))

    def act() -> torch.Tensor:
        output = model(ids)
        return output.logits if hasattr(output, "logits") else output.last_hidden_state

    total = sum(p.nbytes for p in model.parameters())
    with torch.no_grad():
        expected = act()
        for budget in ("min", int(0.9 * total) + 2**16):
            device = adversary(copies="random")
            with layerstream.offload(model, vram_budget=budget, device=device) as streamer, device.checking():
                for _ in range(3):
                    assert torch.equal(act(), expected)
                stats = streamer.stats()
                assert stats.num_touch_loads == 0
                assert device.num_ooms() == 0
            if budget == "min":
                assert stats.peak_device_bytes < total
            else:
                assert stats.peak_reserved_bytes <= budget
