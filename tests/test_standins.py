"""The stand-in pipelines build offline, run, repeat to the bit, and depend on their seeds."""

import subprocess
import sys
import threading
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from layerstream.standins import (
    DEMO_CALL,
    DENOISERS,
    TINY_PIPELINES,
    build_demo,
    build_denoiser,
    build_tiny,
    denoiser_inputs,
    fill_normal_,
    run_tiny,
    skip_init,
)
from layerstream.standins.repository.tokenizers import (
    glm_processor,
    letter_tokenizer,
    qwen_tokenizer,
    qwen_vl_processor,
    roberta_tokenizer,
)
from layerstream.standins.tokenizers import clip_tokenizer, t5_tokenizer
from layerstream.standins.weights import INIT_IMPORTERS, POOL_VALUES_CPU, RESET_LAYERS, cast_floating_

pytest.importorskip("diffusers", reason="the stand-ins are diffusers pipelines")
pytest.importorskip("transformers", reason="the text encoders of the stand-ins are transformers models")

MB = 1_000_000
# What a call returns behind the batch and frames, where it is no image of 32 x 32.
SHAPES = {
    "bria_fibo_edit": (3, 16, 16),
    "cosmos": (9, 3, 32, 32),
    "glm_image": (3, 64, 64),
    "glm_image_edit": (3, 96, 96),
    "stable_cascade": (3, 128, 128),
    "audioldm2": (512,),
}
DENOISERS_OF = {"wan22": 2, "stable_cascade": 2, "ideogram4": 2}
WITH_TWO_STACKS = (
    *("flux", "ovis", "longcat", "flux_controlnet", "hunyuan_video", "aura_flow"),
    *("wan_vace", "latte", "flux2_klein"),
)
WITH_THREE_STACKS = ("bria_fibo_edit",)  # the third projects the states of one layer of the text encoder each
WITH_UNETS = (
    *("sd15", "sd15_controlnet", "sd15_ip_adapter", "sdxl_img2img", "animatediff_sdxl"),
    *("stable_cascade", "audioldm2"),
)
WITHOUT_NEGATIVE_PROMPT = ("glm_image", "glm_image_edit", "flux2_klein", "ideogram4")
# The last so many layers of a text encoder run, and nothing reads what they return.
UNREAD_LAYERS = {
    ("sdxl_img2img", "text_encoder"): 1,
    ("animatediff_sdxl", "text_encoder"): 1,
    ("hunyuan_video", "text_encoder"): 2,
    ("lumina2", "text_encoder"): 1,
}
TEXTS = ["", "a red fox", "Füchse, 中文 und 🎈\n<|im_end|> 'quoted' \x00"]


@cache
def tiny(name: str) -> Any:
    """Build each tiny pipeline once for the tests that only call it."""
    return tiny_or_skip(name)


def tiny_or_skip(name: str, **options: Any) -> Any:
    try:
        return build_tiny(name, **options)
    except ImportError as error:
        pytest.skip(str(error))


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def stored_bytes(*modules: nn.Module) -> int:
    tensors = {id(t): t for module in modules for t in [*module.parameters(), *module.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def stacks_of(module: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the outermost lists of three blocks or more, by name. A block is something with weights."""
    found: dict[str, nn.ModuleList] = {}
    for name, part in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        blocks = isinstance(part, nn.ModuleList) and all(
            block is not None and any(True for _ in block.parameters()) for block in part
        )
        if blocks and len(part) >= 3 and not inside:
            found[name] = part
    return found


def takes_part(name: str, key: str, stack_name: str) -> bool:
    """Whether the stack of a component serves a call of the pipeline."""
    if key in ("vae", "vqgan"):  # half of them
        return False
    if key == "motion_adapter":  # what was copied of it runs
        return False
    if (name, key) == ("stable_cascade", "text_encoder"):  # the prior has one of its own, whose states serve both
        return False
    if "visual" in stack_name:  # the vision tower
        return name in ("qwen_image_edit", "glm_image_edit")
    return "audio_model" not in stack_name


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_tiny_pipeline_repeats_to_the_bit(name: str) -> None:
    first = run_tiny(tiny(name), name)
    shape = SHAPES.get(name, (3, 32, 32))
    assert first.dtype == torch.float32
    assert first.shape[-len(shape) :] == shape
    assert first.shape[0] == 1
    assert torch.isfinite(first).all()
    assert first.std() > 0.05
    # Clamped values would hide differences.
    least = -1 if name == "audioldm2" else 0
    assert ((first <= least) | (first >= 1)).float().mean() < 0.15
    assert torch.equal(first, run_tiny(tiny(name), name))
    assert not torch.equal(first, run_tiny(tiny(name), name, seed=1))
    assert not torch.equal(first, run_tiny(tiny(name), name, prompt="a blue boat"))
    if name in WITHOUT_NEGATIVE_PROMPT:
        assert not torch.equal(first, run_tiny(tiny(name), name, guidance_scale=1.0)), "guidance is off"
    else:
        assert not torch.equal(first, run_tiny(tiny(name), name, negative_prompt="a fox")), "guidance is off"


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_tiny_weights_come_from_the_seed(name: str) -> None:
    torch.manual_seed(123)  # the global generator must not matter
    again, other = tiny_or_skip(name), tiny_or_skip(name, seed=1)
    output = run_tiny(tiny(name), name)
    assert torch.equal(output, run_tiny(again, name))
    assert not torch.equal(output, run_tiny(other, name))


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_tiny_sizes(name: str) -> None:
    parts = modules_of(tiny(name))
    assert stored_bytes(*parts.values()) < 3 * MB
    denoisers = [
        part
        for key, part in parts.items()
        if key.startswith(("transformer", "unet", "unconditional", "prior_prior", "decoder"))
    ]
    encoders = [part for key, part in parts.items() if "encoder" in key or key == "language_model"]
    assert len(denoisers) == DENOISERS_OF.get(name, 1)
    assert encoders
    for denoiser in denoisers:
        stacks = stacks_of(denoiser)
        if name in WITH_UNETS:
            assert stacks
        else:
            assert len(stacks) == 1 + (name in WITH_TWO_STACKS) + 2 * (name in WITH_THREE_STACKS)
            assert all(len(stack) >= 4 for stack in stacks.values())
    for encoder in encoders:
        assert any(len(stack) >= 3 for stack in stacks_of(encoder).values())


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_tiny_output_depends_on_every_block(name: str) -> None:
    pipe = tiny_or_skip(name)
    output = run_tiny(pipe, name, num_inference_steps=2)
    for key, part in modules_of(pipe).items():
        for stack_name, stack in stacks_of(part).items():
            if not takes_part(name, key, stack_name):
                continue
            # Of the image that is shown to it, and of what it says, a few codes remain: small changes leave them.
            factor = 0.0 if (name, key) == ("glm_image_edit", "vision_language_encoder") else 1.02
            for block in list(stack)[: len(stack) - UNREAD_LAYERS.get((name, key), 0)]:
                kept = [parameter.detach().clone() for parameter in block.parameters()]
                with torch.no_grad():
                    for parameter in block.parameters():
                        parameter.mul_(factor)
                    assert not torch.equal(output, run_tiny(pipe, name, num_inference_steps=2)), f"{key}.{stack_name}"
                    for parameter, values in zip(block.parameters(), kept, strict=True):
                        parameter.copy_(values)
    assert torch.equal(output, run_tiny(pipe, name, num_inference_steps=2))


def test_tiny_wan_uses_both_denoisers_in_one_call() -> None:
    pipe = tiny("wan22")
    calls: list[str] = []
    handles = [
        getattr(pipe, key).register_forward_pre_hook(lambda module, args, key=key: calls.append(key))
        for key in ("transformer", "transformer_2")
    ]
    run_tiny(pipe, "wan22")
    for handle in handles:
        handle.remove()
    high = calls.count("transformer")
    assert len(calls) == 8, "two passes in each of 4 steps"
    assert 0 < high < 8
    assert calls == ["transformer"] * high + ["transformer_2"] * (8 - high)


def test_tiny_glm_generates_its_image_codes() -> None:
    model = tiny("glm_image").vision_language_encoder
    widths: list[int] = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args: widths.append(args[0].shape[1])
    )
    run_tiny(tiny("glm_image"), "glm_image")
    handle.remove()
    assert widths[0] > 1, "the prompt"
    assert widths[1:] == [1] * (6 * 6 + 2 * 2), "a sketch, the image, and one more"


def test_tiny_glm_edits_an_image() -> None:
    pipe = tiny("glm_image_edit")
    model = pipe.vision_language_encoder
    called: list[str] = []
    watched = {
        "vision": model.model.visual,
        "language": model.model.language_model,
        "text": pipe.text_encoder,
        "encode": pipe.vae.encoder,
        "denoise": pipe.transformer,
        "decode": pipe.vae.decoder,
    }
    handles = [m.register_forward_pre_hook(lambda *_, key=key: called.append(key)) for key, m in watched.items()]
    run_tiny(pipe, "glm_image_edit")
    for handle in handles:
        handle.remove()
    written = [key for key, previous in zip(called, [None, *called], strict=False) if key != previous]
    # The codes of the image are made twice: for the denoiser, and for the language model to go on from.
    assert written == ["vision", "language", "text", "encode", "denoise", "decode"]
    assert called.count("vision") == 2
    assert called.count("language") == 3 * 3 + 1, "the image, and one more"
    assert called.count("denoise") == 1 + 2 * 4, "keys and values of the image, then two passes in each step"


def test_tiny_audioldm2_generates_states() -> None:
    model = tiny("audioldm2").language_model
    calls: list[None] = []
    handle = model.register_forward_pre_hook(lambda module, args: calls.append(None))
    run_tiny(tiny("audioldm2"), "audioldm2")
    handle.remove()
    assert len(calls) == 2 * 8, "for the prompt and the negative one"


@pytest.mark.filterwarnings("ignore:.*upcast_vae.*:FutureWarning")  # that of diffusers, in its own call
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiny_sdxl_casts_its_vae_in_the_call(dtype: torch.dtype) -> None:
    pipe = tiny_or_skip("sdxl_img2img", dtype=dtype)
    found: list[torch.dtype] = []
    for part in (pipe.vae.encoder, pipe.vae.decoder):
        part.register_forward_pre_hook(lambda module, args: found.append(module.conv_in.weight.dtype))
    run_tiny(pipe, "sdxl_img2img")
    # It casts up for the encoder always, and for the decoder from float16 only.
    assert found == [torch.float32, torch.float32 if dtype == torch.float16 else dtype]
    assert {parameter.dtype for parameter in pipe.vae.parameters()} == {dtype}


def test_tiny_animatediff_casts_single_layers_of_its_vae() -> None:
    pipe = tiny_or_skip("animatediff_sdxl", dtype=torch.float16)
    found: list[torch.dtype] = []
    for part in (pipe.vae.post_quant_conv, pipe.vae.decoder.mid_block, pipe.vae.decoder.up_blocks[0]):
        part.register_forward_pre_hook(lambda module, args: found.append(next(module.parameters()).dtype))
    run_tiny(pipe, "animatediff_sdxl")
    assert found == [torch.float16, torch.float16, torch.float32]
    assert {parameter.dtype for parameter in pipe.vae.parameters()} == {torch.float16}


def test_tiny_ideogram_asks_both_networks_in_turns() -> None:
    pipe = tiny("ideogram4")
    calls: list[str] = []
    handles = [
        getattr(pipe, key).register_forward_pre_hook(lambda module, args, key=key: calls.append(key))
        for key in ("text_encoder", "transformer", "unconditional_transformer")
    ]
    run_tiny(pipe, "ideogram4")
    for handle in handles:
        handle.remove()
    assert calls == ["transformer", "unconditional_transformer"] * 4, "the text encoder itself is not called"


def test_tiny_edit_leaves_diffusers_as_it_was() -> None:
    pipe = tiny("qwen_image_edit")
    module = sys.modules[type(pipe).__module__]
    before = module.calculate_dimensions
    run_tiny(pipe, "qwen_image_edit", num_inference_steps=1)
    assert module.calculate_dimensions is before
    with pytest.raises(ValueError, match="prompt"):
        run_tiny(pipe, "qwen_image_edit", prompt=None)
    assert module.calculate_dimensions is before


@pytest.mark.filterwarnings("ignore:.*upcast_vae.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # Kandinsky 5 in its norms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_tiny_pipeline_runs_in_low_precision(name: str, dtype: torch.dtype) -> None:
    pipe = tiny_or_skip(name, dtype=dtype)
    found = {p.dtype for part in modules_of(pipe).values() for p in part.parameters()}
    assert dtype in found
    assert found <= {dtype, torch.float32}
    assert torch.isfinite(run_tiny(pipe, name)).all()


def test_float32_islands_and_tied_weights_stay() -> None:
    pipe = tiny_or_skip("wan22", dtype=torch.bfloat16)
    block = pipe.transformer.blocks[0]
    assert block.scale_shift_table.dtype == torch.float32
    assert block.attn1.to_q.weight.dtype == torch.bfloat16
    assert pipe.text_encoder.shared.weight is pipe.text_encoder.encoder.embed_tokens.weight


def test_tiny_longcat_can_rewrite_its_prompt() -> None:
    output = run_tiny(tiny("longcat"), "longcat", enable_prompt_rewrite=True, num_inference_steps=1)
    assert torch.isfinite(output).all()


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'sd4'; choose one of sd3, flux, ovis, longcat, qwen_image"):
        build_tiny("sd4")
    with pytest.raises(ValueError, match=r"'flux'; choose one of sd35m, ovis, longcat"):
        build_denoiser("flux")


def gemma_tokenizer() -> Any:
    return letter_tokenizer("GemmaTokenizerFast", start="<bos>", end="<eos>")


def llama_tokenizer() -> Any:
    return letter_tokenizer("LlamaTokenizerFast", start="<s>", end="</s>")


def clap_tokenizer() -> Any:
    return roberta_tokenizer(max_length=77)


@pytest.mark.parametrize(
    "make", [clip_tokenizer, t5_tokenizer, qwen_tokenizer, gemma_tokenizer, llama_tokenizer, clap_tokenizer]
)
def test_any_text_tokenises(make: Any) -> None:
    tokenizer = make()
    rows = tokenizer(TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert rows.input_ids.shape == (3, 77)
    assert rows.input_ids.max() < len(tokenizer)
    assert len({tuple(row) for row in rows.input_ids.tolist()}) == 3


def test_chat_template_takes_text_and_parts() -> None:
    tokenizer = qwen_tokenizer()
    processor = qwen_vl_processor(tokenizer)
    expected = "<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\n"
    for content in ("fox", [{"type": "text", "text": "fox"}]):
        message = [{"role": "user", "content": content}]
        assert tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == expected
    message = [{"role": "user", "content": [{"type": "text", "text": "fox"}]}]
    text = processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert text == expected
    rows = processor(text=[text, "a"], padding=True, return_tensors="pt")
    assert rows.input_ids.shape == rows.attention_mask.shape
    assert processor.batch_decode(rows.input_ids, skip_special_tokens=True)[1] == "a"


def test_letter_tokenizers_start_a_text_and_pad_behind_it() -> None:
    for tokenizer in (gemma_tokenizer(), llama_tokenizer()):
        rows = tokenizer(["fox"], padding="max_length", max_length=6, return_tensors="pt")
        assert tokenizer.convert_ids_to_tokens(rows.input_ids[0].tolist()) == [
            tokenizer.bos_token, "f", "o", "x", "<pad>", "<pad>",
        ]  # fmt: skip
        assert rows.attention_mask.tolist() == [[1, 1, 1, 1, 0, 0]]


def test_glm_processor_asks_for_a_sketch_and_an_image() -> None:
    try:
        processor = glm_processor()
    except ImportError as error:
        pytest.skip(str(error))
    message = [{"role": "user", "content": [{"type": "text", "text": "fox"}]}]
    rows = processor.apply_chat_template(
        [message],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"target_h": 64, "target_w": 96},
    )
    assert rows["image_grid_thw"].tolist() == [[1, 2, 3], [1, 6, 6]]
    text = processor.tokenizer.convert_ids_to_tokens(rows["input_ids"][0].tolist())
    assert "".join(text) == "fox<sop>2 3<eop><sop>6 6<eop><|image_start|>"


def test_demo_has_blocks_worth_streaming() -> None:
    pipe = build_demo()
    parts = modules_of(pipe)
    assert 200 * MB < stored_bytes(*parts.values()) < 350 * MB
    blocks = pipe.transformer.transformer_blocks
    assert len(blocks) >= 12
    assert min(stored_bytes(block) for block in blocks) > 5 * MB
    assert len(pipe.text_encoder_3.encoder.block) >= 8
    call = {**DEMO_CALL, "num_inference_steps": 1, "output_type": "pt"}
    image = pipe(**call, generator=torch.Generator("cpu").manual_seed(0)).images
    assert image.shape == (1, 3, DEMO_CALL["height"], DEMO_CALL["width"])
    assert torch.isfinite(image).all()
    assert image.std() > 0.05


@pytest.mark.parametrize("name", DENOISERS)
def test_denoiser_dry_runs_at_tiny_scale(name: str) -> None:
    try:
        model = build_denoiser(name, scale="tiny")
    except ImportError as error:
        pytest.skip(str(error))
    islands = {torch.float32} if name == "wan22" else set()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, *islands}
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    inputs = denoiser_inputs(name, model, device="cpu", dtype=torch.bfloat16, scale="tiny")
    output = model(**inputs)[0]
    assert output.shape == inputs["sample" if name == "sd15" else "hidden_states"].shape
    assert torch.isfinite(output).all()
    assert torch.equal(output, build_denoiser(name, scale="tiny")(**inputs)[0])
    assert not torch.equal(output, build_denoiser(name, scale="tiny", seed=1)(**inputs)[0])


def build_without_init_and_fail() -> None:
    with skip_init():
        nn.Linear(64, 64)
        nn.MultiheadAttention(8, 2)
        nn.Conv2d(3, 8, 3)
        with skip_init():
            weight = nn.Parameter(torch.zeros(4))
            assert nn.init.normal_(weight) is weight
        assert nn.init.ones_(weight).sum() == 0, "the outer one still skips"
        assert nn.init.ones_(torch.zeros(4)).sum() == 4, "buffers are initialised"
        assert nn.BatchNorm1d(3).running_var.sum() == 3
        raise RuntimeError("inside")


def test_skip_init_skips_and_restores() -> None:
    before = {name: dict(vars(sys.modules[name])) for name in INIT_IMPORTERS}
    resets = [layer.reset_parameters for layer in RESET_LAYERS]
    seeded = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"):
        build_without_init_and_fail()
    assert torch.equal(seeded, torch.get_rng_state()), "nothing was drawn"
    assert before == {name: dict(vars(sys.modules[name])) for name in INIT_IMPORTERS}
    assert resets == [layer.reset_parameters for layer in RESET_LAYERS]
    assert nn.Linear(64, 64).weight.std() > 0


def test_skip_init_leaves_other_threads_alone() -> None:
    found: list[torch.Tensor] = []
    with skip_init():
        kept = nn.init.ones_
        thread = threading.Thread(target=lambda: found.append(nn.init.ones_(nn.Parameter(torch.zeros(2)))))
        thread.start()
        thread.join()
    assert [values.tolist() for values in found] == [[1.0, 1.0]]
    # What a library imported inside holds on to works afterwards.
    assert kept(nn.Parameter(torch.zeros(2))).sum() == 2


class Everything(nn.Module):
    """A matrix longer than the pool, a norm, vectors, a tied weight, buffers and a channels-last weight."""

    def __init__(self) -> None:
        super().__init__()
        self.long = nn.Parameter(torch.empty(3, POOL_VALUES_CPU // 2 + 7, dtype=torch.bfloat16))
        self.linear = nn.Linear(64, 32)
        self.tied = nn.Linear(64, 32)
        self.tied.weight = self.linear.weight
        self.norm = nn.LayerNorm(32)
        self.conv = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
        self.count = nn.Parameter(torch.tensor([7]), requires_grad=False)
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("inv_freq", torch.arange(4.0), persistent=False)


def test_fill_normal_fills_all_and_only_parameters() -> None:
    with skip_init():
        module = Everything()
    linear = module.linear.weight
    linear.data.fill_(float("nan"))
    fill_normal_(module, std=0.05)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert module.linear.weight is linear is module.tied.weight
    for matrix in (module.long, module.linear.weight, module.conv.weight):
        assert matrix.detach().float().std().item() == pytest.approx(0.05, rel=0.1)
    rows = module.long.detach()
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[1], rows[2])
    assert module.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert (module.norm.weight == 1).all()
    assert 0 < module.norm.bias.abs().max() < 0.1
    assert module.count.item() == 7
    assert torch.equal(module.table, torch.arange(4.0))
    again = Everything()
    fill_normal_(again, std=0.05)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    fill_normal_(again, std=0.05, seed=1)
    assert not torch.equal(module.linear.weight, again.linear.weight)


def test_cast_keeps_computed_buffers_and_ties() -> None:
    module = Everything()
    cast_floating_(module, torch.float16)
    assert module.linear.weight.dtype == module.table.dtype == torch.float16
    assert module.linear.weight is module.tied.weight
    assert module.inv_freq.dtype == torch.float32
    assert module.count.dtype == torch.int64


@pytest.mark.parametrize(("code", "expected"), [("import layerstream.standins", ""), ("import diffusers", "diffusers")])
def test_importing_standins_does_not_import_diffusers(code: str, expected: str) -> None:
    # The second case proves that the check can fail.
    heavy = "print(','.join(m for m in ('diffusers', 'transformers', 'tokenizers') if m in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path[:0] = {sys.path!r}\n{code}\n{heavy}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert result.stdout.strip().split(",")[0] == expected
