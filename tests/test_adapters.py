"""Which stacks are found in real classes and toy ones, and how a user's adapter takes over."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.errors import AdapterError, brief
from layerstream.model.adapters import registry
from layerstream.model.adapters.base import Adapter
from layerstream.model.adapters.generic import GenericAdapter
from layerstream.model.adapters.named import NAMED
from layerstream.model.adapters.registry import adapter_for, register_adapter
from layerstream.model.components import layouts_of
from layerstream.model.units import divide
from layerstream.testing import check_adapter
from tests.fakes import adversary


@pytest.fixture(autouse=True)
def clean_registry() -> Iterator[None]:
    before = dict(registry._REGISTERED)
    yield
    registry._REGISTERED.clear()
    registry._REGISTERED.update(before)


def found(component: nn.Module) -> list[str]:
    return list(GenericAdapter().find_stacks(component))


def block_names(component: nn.Module, adapter: Adapter | None = None) -> list[str]:
    layout = (adapter or GenericAdapter()).layout("net", component)
    return [name for stack in layout.stacks for name, _ in stack.blocks]


# ---- real classes, on the meta device: a description needs no weights


def diffusion_model(name: str, **config: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    cls = getattr(diffusers, name)  # imported here: some modules make tensors when they are imported
    with torch.device("meta"):
        return cls(**config)


SD3 = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 16,
}
FLUX = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
}
VAE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "layers_per_block": 2,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(
    ("name", "config", "stacks"),
    [
        ("SD3Transformer2DModel", SD3, ["transformer_blocks"]),
        ("FluxTransformer2DModel", FLUX, ["transformer_blocks", "single_transformer_blocks"]),
        ("WanTransformer3DModel", WAN, ["blocks"]),
    ],
)
def test_denoisers(name: str, config: dict[str, Any], stacks: list[str]) -> None:
    model = diffusion_model(name, **config)
    layout = GenericAdapter().layout("transformer", model)
    assert [s.name for s in layout.stacks] == stacks
    assert layout.is_repeated
    for stack in layout.stacks:
        container = model.get_submodule(stack.name)
        assert stack.blocks == tuple((f"{stack.name}.{i}", block) for i, block in enumerate(container))


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderTiny"])
def test_autoencoders_stay_whole(name: str) -> None:
    model = diffusion_model(name, **(VAE if name == "AutoencoderKL" else {}))
    assert found(model) == []
    assert not GenericAdapter().find_repeated(model)


def test_unet_by_its_nested_stacks() -> None:
    model = diffusion_model(
        "UNet2DConditionModel",
        sample_size=16,
        block_out_channels=(32, 64),
        cross_attention_dim=16,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        transformer_layers_per_block=2,
    )
    stacks = found(model)
    assert "down_blocks" not in stacks, "unlike children are looked into"
    assert {"down_blocks.0.attentions.0.transformer_blocks", "down_blocks.0.resnets", "down_blocks.1.resnets"} <= set(
        stacks
    )
    assert "mid_block.attentions.0.transformer_blocks" in stacks
    assert GenericAdapter().find_repeated(model)
    assert len(block_names(model)) == len(set(block_names(model)))
    GenericAdapter().layout("unet", model)


def test_blocks_of_sdxl_are_a_small_part_of_it() -> None:
    # Two slots of the largest block are the least that works; where one block is half the model, nothing is gained.
    model = diffusion_model("UNet2DConditionModel", **SDXL)
    layout = GenericAdapter().layout("unet", model)
    total = sum(p.numel() for p in model.parameters())
    largest, name = max((sum(p.numel() for p in m.parameters()), n) for s in layout.stacks for n, m in s.blocks)
    assert largest <= 0.2 * total, f"{name} is {largest / total:.0%} of the model"


CASCADE = {
    "conditioning_dim": 16,
    "block_out_channels": (8, 16),
    "num_attention_heads": (-1, 2),
    "down_num_layers_per_block": (2, 3),
    "up_num_layers_per_block": (3, 2),
    "block_types_per_layer": (
        ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
        ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
    ),
    "clip_text_pooled_in_channels": 8,
}


def test_blocks_of_several_classes_that_take_turns() -> None:
    cascade = diffusion_model("StableCascadeUNet", **CASCADE)
    assert found(cascade) == ["down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1"]
    assert [len(s.blocks) for s in GenericAdapter().layout("prior", cascade).stacks] == [4, 9, 9, 4]


def test_blocks_of_wuerstchen() -> None:
    pipeline = pytest.importorskip("diffusers").WuerstchenPriorPipeline  # whose module is not always in the same place
    cls = vars(importlib.import_module(pipeline.__module__))["WuerstchenPrior"]
    with torch.device("meta"):
        model = cls(c_in=4, c=32, c_cond=16, c_r=8, depth=3, nhead=2)
    assert found(model) == ["blocks"]
    assert len(block_names(model)) == 9


NETS = {
    "ControlNetModel": {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 8,
        "conditioning_embedding_out_channels": (4, 8),
    },
    "SD3ControlNetModel": SD3,
    "FluxControlNetModel": FLUX,
    "T2IAdapter": {"channels": [32, 32], "num_res_blocks": 2},
}


def several(name: str, nets: Sequence[nn.Module]) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    multi = {
        "ControlNetModel": lambda: importlib.import_module("diffusers.models.controlnets").MultiControlNetModel,
        "SD3ControlNetModel": lambda: diffusers.SD3MultiControlNetModel,
        "FluxControlNetModel": lambda: diffusers.FluxMultiControlNetModel,
        "T2IAdapter": lambda: diffusers.MultiAdapter,
    }
    return multi[name]()(nets)


@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed.*:FutureWarning")  # diffusers', of a class of its own
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("count", [2, 3])
def test_nets_of_a_multi_control_net_are_divided_as_each_by_itself(name: str, count: int) -> None:
    nets = [diffusion_model(name, **NETS[name]) for _ in range(count)]
    multi = several(name, nets)
    (container,) = (child for child, _ in multi.named_children())
    assert found(nets[0])
    assert found(multi) == [f"{container}.{number}.{stack}" for number in range(count) for stack in found(nets[0])]


def test_a_multi_control_net_is_foreseen_and_equal() -> None:
    torch.manual_seed(0)
    name = "ControlNetModel"
    cls = getattr(pytest.importorskip("diffusers"), name)
    nets = several(name, [cls(**NETS[name]).eval() for _ in range(2)])
    randomise(nets)
    images = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def call(nets: Any) -> Any:
        return nets(torch.ones(1, 4, 8, 8), 5, torch.ones(1, 3, 8), list(images), [1.0, 0.5], return_dict=False)

    report = check_adapter(nets, call)
    assert not report.findings


def test_a_cascade_is_foreseen_and_equal() -> None:
    torch.manual_seed(0)
    model = pytest.importorskip("diffusers").StableCascadeUNet(**CASCADE).eval()
    randomise(model)

    def call(model: Any) -> Any:
        return model(torch.ones(1, 16, 8, 8), torch.ones(1), torch.ones(1, 1, 8), return_dict=False)

    report = check_adapter(model, call)
    assert not report.findings


MINIMAX = {
    "latent_channels": 4,
    "block_out_channels": (4, 4, 4, 4, 4, 4),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "decoder_num_layers": 4,
    "decoder_num_attention_heads": 2,
    "decoder_attention_head_dim": 16,
}


def test_an_autoencoder_that_decodes_by_a_large_transformer() -> None:
    model = diffusion_model("AutoencoderKLMiniMaxH3", **MINIMAX)
    assert "decoder.transformer_blocks" in adapter_for(model).find_stacks(model)
    assert not adapter_for(model).find_repeated(model)
    assert {"encode", "decode"} <= set(adapter_for(model).layout("vae", model).entry_points)


@pytest.mark.parametrize("is_tiled", [False, True])
def test_an_autoencoder_that_decodes_by_a_large_transformer_is_foreseen_and_equal(is_tiled: bool) -> None:
    torch.manual_seed(0)
    model = pytest.importorskip("diffusers").AutoencoderKLMiniMaxH3(**MINIMAX).eval()
    randomise(model)
    if is_tiled:
        model.enable_tiling(32, 32, 16, 16)  # sides of tiles and of what two share: 9 tiles
    latents = torch.randn(1, 4, 7, 4, 4, generator=torch.Generator().manual_seed(1))
    report = check_adapter(model, lambda model: model.decode(latents).sample)
    assert not report.findings


def randomise(module: nn.Module) -> None:
    """Also what starts as zeros, behind which nothing would be seen."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.1)


def text_encoder(name: str, config: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    cls, config_cls = getattr(transformers, name), getattr(transformers, config)
    with torch.device("meta"):
        return cls(config_cls(**options))


QWEN = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize(
    ("name", "config", "options", "ends", "counts"),
    [
        (
            "T5EncoderModel",
            "T5Config",
            {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2},
            ["encoder.block"],
            [3],
        ),
        (
            "CLIPTextModel",
            "CLIPTextConfig",
            {
                "vocab_size": 64,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
            },
            ["encoder.layers"],  # inside `text_model` in some versions of transformers
            [3],
        ),
        ("Qwen3Model", "Qwen3Config", {**QWEN, "head_dim": 16}, ["layers"], [3]),
        (
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5_VLConfig",
            {
                "text_config": {
                    **QWEN,
                    "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]},
                },
                "vision_config": {
                    "depth": 2,
                    "hidden_size": 32,
                    "intermediate_size": 32,
                    "num_heads": 2,
                    "out_hidden_size": 32,
                },
            },
            # The merger's first layer is larger than any block of this small build, so it is a unit of its own.
            ["visual.blocks", "language_model.layers", "merger.mlp.0"],
            [2, 3, 1],
        ),
    ],
)
def test_text_encoders(name: str, config: str, options: dict[str, Any], ends: Sequence[str], counts: list[int]) -> None:
    model = text_encoder(name, config, **options)
    layout = GenericAdapter().layout("text_encoder", model)
    assert len(layout.stacks) == len(ends)
    for stack, end in zip(layout.stacks, ends, strict=True):
        assert stack.name == end or stack.name.endswith(f".{end}")
    assert [len(s.blocks) for s in layout.stacks] == counts
    assert not layout.is_repeated


# ---- structure


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.inner:
            x = layer(x)
        return x


class OtherBlock(Block):
    pass


def net(**children: nn.Module) -> nn.Module:
    root = nn.Module()
    for name, child in children.items():
        root.add_module(name, child)
    return root


def blocks(count: int = 3, cls: type[Block] = Block, width: int = 4) -> nn.ModuleList:
    return nn.ModuleList(cls(width) for _ in range(count))


def test_stacks_in_the_order_of_definition_as_far_out_as_possible() -> None:
    assert found(net(down=blocks(), head=nn.Linear(2, 2), inner=net(up=blocks()))) == ["down", "inner.up"]


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 3, enable_nested_tensor=False)


def test_transformer_encoder_and_decoder_are_not_taken_apart() -> None:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2), 3)
    assert found(net(encoder=encoder(), decoder=decoder, blocks=blocks())) == ["blocks"]
    # A list of whole encoders is a list of blocks as any other.
    assert found(net(encoders=nn.ModuleList([encoder(), encoder()]))) == ["encoders"]


class EncoderSubclass(nn.TransformerEncoder):
    pass


@pytest.mark.parametrize("cls", [nn.TransformerEncoder, EncoderSubclass])
def test_component_that_is_a_transformer_encoder_is_not_taken_apart(cls: type[nn.TransformerEncoder]) -> None:
    assert found(cls(nn.TransformerEncoderLayer(8, 2), 3, enable_nested_tensor=False)) == []


def test_list_of_lists_is_looked_into() -> None:
    assert found(net(stages=nn.ModuleList([blocks(2), blocks(3)]))) == ["stages.0", "stages.1"]


def test_list_of_unlike_children_is_looked_into() -> None:
    assert found(net(mixed=nn.ModuleList([Block(), OtherBlock()]))) == ["mixed.0.inner", "mixed.1.inner"]


def test_unlike_children_that_the_author_calls_blocks_are_a_stack() -> None:
    class Net(nn.Module):
        _no_split_modules = ("Block",)
        _repeated_blocks = ("OtherBlock",)

        def __init__(self) -> None:
            super().__init__()
            self.mixed = nn.ModuleList([Block(), OtherBlock(), Block()])
            self.partly = nn.ModuleList([Block(), nn.Linear(4, 4)])

    assert found(Net()) == ["mixed", "partly.0.inner"]


@pytest.mark.parametrize("declared", [None, "Block", ["Block", 3], {"Block"}])
def test_odd_declarations_of_blocks_do_no_harm(declared: Any) -> None:
    root = net(blocks=blocks())
    type(root)
    cls = type("Net", (nn.Module,), {"_no_split_modules": declared})
    outer = cls()
    outer.inner = root
    assert found(outer) == ["inner.blocks"]


def test_blocks_that_take_turns_are_a_stack_where_none_is_inside() -> None:
    layers = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4)])
    assert found(net(layers=layers)) == ["layers"]
    assert found(net(layers=layers[:3])) == [], "one of a class is a layer, as in a feed-forward"
    assert found(net(layers=nn.ModuleList([*layers, *blocks(2)]))) == ["layers.5.inner", "layers.6.inner"]
    never_called = nn.ModuleList([*layers, nn.ModuleList([nn.Linear(4, 4)]), nn.ModuleList([nn.Linear(4, 4)])])
    assert found(net(layers=never_called)) == []


def test_models_in_a_list_beside_other_weights_are_blocks() -> None:
    class Part(Block):
        def save_pretrained(self) -> None: ...

    assert found(net(models=blocks(2, Part))) == ["models.0.inner", "models.1.inner"]
    assert found(net(models=blocks(2, Part), head=nn.Linear(4, 4))) == ["models"]
    assert found(net(models=blocks(2))) == ["models"]
    first, second = Part(), Part()
    assert found(net(models=nn.ModuleList([first, first, second]))) == ["models.0.inner", "models.2.inner"]
    second.inner[1] = first.inner[1]
    sharing = net(models=nn.ModuleList([first, second]))
    assert found(sharing) == ["models"]
    assert len(divide([GenericAdapter().layout("net", sharing)]).units) == 3


def test_a_single_child_is_no_stack() -> None:
    assert found(net(one=nn.ModuleList([Block()]))) == ["one.0.inner"]


def test_children_without_weights_do_not_count() -> None:
    root = net(
        list=nn.ModuleList([Block(), nn.Identity(), Block()]), dropouts=nn.ModuleList([nn.Dropout(), nn.Dropout()])
    )
    assert found(root) == ["list"]
    assert block_names(root) == ["list.0", "list.2"]


def test_lists_of_far_smaller_modules_are_left_in_the_base() -> None:
    root = net(blocks=blocks(3, width=64), gates=nn.ModuleList(nn.Linear(2, 2) for _ in range(3)))
    assert found(root) == ["blocks"]


def test_a_block_listed_several_times_is_one_block() -> None:
    shared = Block()
    root = net(blocks=nn.ModuleList([shared, Block(), shared]))
    assert block_names(root) == ["blocks.0", "blocks.1"]
    assert len(divide([GenericAdapter().layout("net", root)]).units) == 2


def test_no_stacks() -> None:
    for root in (nn.Linear(2, 2), nn.Module(), nn.Sequential(nn.Linear(2, 2), nn.ReLU())):
        layout = GenericAdapter().layout("net", root)
        assert layout.stacks == ()


def test_every_layout_can_be_divided() -> None:
    root = net(stages=nn.ModuleList([blocks(2), blocks(3)]), mixed=nn.ModuleList([Block(), OtherBlock()]))
    units = divide([GenericAdapter().layout("net", root)]).units
    assert sum(len(u.binding.tensors) for u in units) == len(list(root.parameters()))


# ---- a user's adapter


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = blocks(2)
        self.second = blocks(3)
        self.mixed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.empty = nn.ModuleList()
        self.activation = nn.ReLU()


class Child(Model):
    pass


def test_stacks_by_name_in_the_order_given() -> None:
    layout = Adapter(stacks=["second", "mixed"], is_repeated=True).layout("net", Model())
    assert [s.name for s in layout.stacks] == ["second", "mixed"]
    assert [n for n, _ in layout.stacks[1].blocks] == ["mixed.0", "mixed.1"]
    assert layout.is_repeated
    assert (layout.name, Adapter().layout("x", Model()).is_repeated) == ("net", False)


def test_without_stacks_the_component_is_one_unit() -> None:
    layout = Adapter().layout("net", Model())
    assert layout.stacks == ()
    assert [u.spec.name for u in divide([layout]).units] == ["net (base)"]


def test_resident_blocks_are_not_blocks() -> None:
    model = Model()
    adapter = Adapter(stacks=["first", "second"], resident=["first.0", "second.2"])
    assert block_names(model, adapter) == ["first.1", "second.0", "second.1"]
    base = divide([adapter.layout("net", model)]).units[0]
    names = {b.name for b in base.binding.tensors}
    assert {"net.first.0.inner.0.weight", "net.second.2.inner.1.bias"} <= names


def test_a_stack_that_is_to_be_resident_is_part_of_the_base() -> None:
    adapter = Adapter(stacks=["first", "second"], resident=["first"])
    assert block_names(Model(), adapter) == ["second.0", "second.1", "second.2"]
    base = divide([adapter.layout("net", Model())]).units[0]
    assert "net.first.1.inner.0.weight" in {b.name for b in base.binding.tensors}


def test_a_part_of_a_block_cannot_be_resident() -> None:
    with pytest.raises(AdapterError) as error:
        Adapter(stacks=["first"], resident=["first.1.inner"]).layout("net", Model())
    assert str(error.value) == (
        "resident block `first.1.inner` of `net` (Model) is inside the block `first.1`, and streams with it. Name "
        "`first.1`, or leave it out."
    )


@pytest.mark.parametrize("argument", ["stacks", "resident", "entry_points"])
def test_of_a_container_only_the_parts_are_named(argument: str) -> None:
    with pytest.raises(AdapterError) as error:
        Adapter(parts=["first"], **{argument: ["second"]})  # type: ignore[arg-type]
    assert str(error.value) == (
        f"Adapter(parts=..., {argument}=...): a container is taken apart into its parts, and each is streamed by the "
        "adapter of its own class. Register one for that class, and leave it out here."
    )


def test_find_stacks_may_depend_on_the_component() -> None:
    class Even(Adapter):
        def find_stacks(self, component: nn.Module) -> Sequence[str]:
            return [
                n for n, m in component.named_children() if isinstance(m, nn.ModuleList) and len(m) % 2 == 0 and len(m)
            ]

        def find_repeated(self, component: nn.Module) -> bool:
            return isinstance(component, Child)

    assert block_names(Model(), Even()) == ["first.0", "first.1"]
    assert [Even().layout("net", m()).is_repeated for m in (Model, Child)] == [False, True]


@pytest.mark.parametrize(
    ("adapter", "what"),
    [
        (Adapter(stacks=["third"]), "stack `third`"),
        (Adapter(stacks=["first"], resident=["first.9"]), "resident block `first.9`"),
    ],
)
def test_unknown_names(adapter: Adapter, what: str) -> None:
    with pytest.raises(AdapterError) as error:
        adapter.layout("net", Model())
    lists = "first, first.0.inner, first.1.inner, second, second.0.inner, second.1.inner, second.2.inner, empty"
    assert str(error.value) == f"{what} does not exist in `net` (Model). Its module lists are: {lists}."


def test_unknown_name_where_there_are_no_lists() -> None:
    with pytest.raises(AdapterError, match=r"does not exist in `net` \(Linear\)\. Its module lists are: none\.$"):
        Adapter(stacks=["blocks"]).layout("net", nn.Linear(2, 2))


@pytest.mark.parametrize(("stack", "kind"), [("activation", "ReLU"), ("empty", "ModuleList")])
def test_stack_without_children(stack: str, kind: str) -> None:
    with pytest.raises(AdapterError) as error:
        Adapter(stacks=[stack]).layout("net", Model())
    assert str(error.value) == (
        f"stack `{stack}` of `net` (Model) is a {kind} without children. "
        "Name the container whose children are the blocks."
    )


def test_stack_inside_another_is_refused_when_divided() -> None:
    layout = Adapter(stacks=["first", "first.0.inner"]).layout("net", Model())
    with pytest.raises(AdapterError, match="overlap"):
        divide([layout])


def test_the_component_itself_as_a_stack() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    names = block_names(model, Adapter(stacks=[""], resident=["1"]))
    assert names == ["0"]


# ---- layers with experts


class Layer(nn.Module):
    """A layer that has the given children: wide ones, and norms."""

    def __init__(self, *names: str, norms: Sequence[str] = ("norm",), width: int = 64) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, Block(width))
        for name in norms:
            self.add_module(name, nn.LayerNorm(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    "names",
    [
        ("self_attn", "mlp", "gen_mlp"),  # MammothModa2
        ("self_attn", "mlp", "mlp_moe_gen"),  # Bagel
        ("attn", "und_mlp", "gen_mlp"),
        ("attn_und", "attn_gen", "ffn_und", "ffn_gen"),
    ],
)
def test_layers_with_experts_are_divided(names: Sequence[str]) -> None:
    model = net(layers=nn.ModuleList([Layer(*names, norms=("norm", "norm_moe_gen")) for _ in range(2)]))
    assert block_names(model) == [f"layers.{i}.{name}" for i in range(2) for name in names]
    (stack,) = GenericAdapter().layout("net", model).stacks
    assert stack.name == "layers"
    base, *_ = divide([GenericAdapter().layout("net", model)]).units
    assert {b.name.rsplit(".", 2)[-2] for b in base.binding.tensors} == {"norm", "norm_moe_gen"}
    assert block_names(model, Adapter(stacks=["layers"])) == ["layers.0", "layers.1"], "what a user names is as it says"


def test_only_those_layers_of_a_stack_that_have_experts_are_divided() -> None:
    layers = nn.ModuleList([Layer("attn", "mlp"), Layer("attn", "mlp", "gen_mlp")])
    layers[0].gen_mlp = None
    assert block_names(net(layers=layers)) == ["layers.0", "layers.1.attn", "layers.1.mlp", "layers.1.gen_mlp"]


def other_class(layer: Layer) -> None:
    layer.gen_mlp = nn.Linear(64, 64)


def weights_of_its_own(layer: Layer) -> None:
    layer.bias = nn.Parameter(torch.zeros(64, 64))


def never_called(layer: Layer) -> None:
    layer.attn = nn.ModuleList([Block(64)])


def compiled_whole(layer: Layer) -> None:
    layer.compile(backend="eager")


@pytest.mark.parametrize("change", [other_class, weights_of_its_own, never_called, compiled_whole])
def test_layers_of_which_that_cannot_be_told_stay_whole(change: Callable[[Layer], None]) -> None:
    layers = nn.ModuleList([Layer("attn", "mlp", "gen_mlp") for _ in range(2)])
    for layer in layers:
        change(layer)
    assert block_names(net(layers=layers)) == ["layers.0", "layers.1"]


@pytest.mark.parametrize(
    "names", [("attn", "mlp"), ("attn", "mlp", "mlp2"), ("attn", "gen_attn2", "mlp"), ("gen_mlp",)]
)
def test_layers_without_experts_stay_whole(names: Sequence[str]) -> None:
    assert block_names(net(layers=nn.ModuleList([Layer(*names) for _ in range(2)]))) == ["layers.0", "layers.1"]


# ---- the registry


def test_registered_by_class_and_by_name() -> None:
    by_class, by_name = Adapter(stacks=["first"]), Adapter(stacks=["second"])
    register_adapter(Model, by_class)
    register_adapter("OtherBlock", by_name)
    assert adapter_for(Model()) is by_class
    assert adapter_for(OtherBlock()) is by_name
    assert isinstance(adapter_for(Block()), GenericAdapter)


def test_subclasses_take_the_adapter_of_the_nearest_class() -> None:
    for_model, for_child, for_any = Adapter(stacks=["first"]), Adapter(stacks=["second"]), Adapter()
    register_adapter("Module", for_any)
    register_adapter("Model", for_model)
    assert adapter_for(Child()) is for_model
    register_adapter(Child, for_child)
    assert adapter_for(Child()) is for_child
    assert adapter_for(Model()) is for_model
    assert adapter_for(nn.Linear(1, 1)) is for_any


def test_a_later_registration_replaces_an_earlier() -> None:
    first, second = Adapter(stacks=["first"]), Adapter(stacks=["second"])
    register_adapter(Model, first)
    register_adapter(Model, second)
    assert adapter_for(Model()) is second


def test_a_later_registration_by_name_replaces_an_earlier_by_class() -> None:
    first, second = Adapter(stacks=["first"]), Adapter(stacks=["second"])
    register_adapter(Model, first)
    register_adapter("Model", second)
    assert adapter_for(Model()) is second


class TokenModel(nn.Module):
    """With the children that an adapter of a name looks for."""

    def __init__(self, *children: str) -> None:
        super().__init__()
        for child in children:
            self.add_module(child, blocks())

    def forward_model(self) -> None: ...


def named_as(name: str, *children: str) -> nn.Module:
    model = TokenModel(*children)
    model.__class__ = type(name, (TokenModel,), {})
    return model


def test_adapters_that_come_with_the_package_are_found_by_name_and_children() -> None:
    model = named_as("NextStep", "layers", "image_head")
    assert adapter_for(model) is NAMED["NextStep"]
    assert adapter_for(model).layout("net", model).entry_points == ("forward_model",)
    assert isinstance(adapter_for(named_as("NextStep", "layers")), GenericAdapter)
    assert adapter_for(named_as("NextStep", "layers")) not in NAMED.values()
    child = named_as("NextStep", "layers", "image_head")
    child.__class__ = type("MyNextStep", (type(child),), {})
    assert adapter_for(child) is NAMED["NextStep"]


def test_a_registered_adapter_goes_before_one_that_comes_with_the_package() -> None:
    model = named_as("NextStep", "layers", "image_head")
    own = Adapter(stacks=["layers"])
    register_adapter("NextStep", own)
    assert adapter_for(model) is own
    register_adapter(type(model), Adapter())
    assert adapter_for(model) is not own


def test_mammoth_of_both_editions() -> None:
    shared = ["llm_model", "gen_transformer", "gen_vae"]
    adapter = NAMED["Mammothmoda2Model"]
    assert list(adapter.find_parts(named_as("Mammothmoda2Model", *shared))) == [
        "llm_model",
        "gen_vae",
        "gen_transformer",
    ]
    preview = named_as("Mammothmoda2Model", *shared, "gen_image_condition_refiner")
    assert "gen_image_condition_refiner" in adapter.find_parts(preview)


def test_large_layers_that_are_to_be_no_units() -> None:
    model = net(embed=nn.Embedding(100, 16), layers=blocks(3), head=nn.Linear(16, 100))
    assert block_names(model, Adapter(stacks=["layers"])) == ["embed", "layers.0", "layers.1", "layers.2", "head"]
    adapter = Adapter(stacks=["layers"], resident=["embed", "head"])
    assert block_names(model, adapter) == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize("method", ["forward", "first.forward", "third.forward", "first.0.foward"])
def test_entry_points_that_do_not_exist(method: str) -> None:
    with pytest.raises(AdapterError) as error:
        Adapter(stacks=["second"], entry_points=[method]).layout("net", Model())
    assert str(error.value) == f"`net` (Model) has no method {method} to enter by."
    Adapter(stacks=["second"], entry_points=["first.0.forward"]).layout("net", Model())


def test_adapters_of_names_say_which_children_they_mean_and_nothing_is_imported() -> None:
    assert {"NextStep", "Mammothmoda2Model", "MultiModalityCausalLM"} <= set(NAMED)
    for adapter in NAMED.values():
        assert adapter.children, "else any class of that name would be taken for it"


@pytest.mark.parametrize("target", [3, None, int, Adapter, ["Model"]])
def test_bad_target(target: Any) -> None:
    with pytest.raises(AdapterError) as error:
        register_adapter(target, Adapter())
    assert str(error.value) == f"register_adapter needs a subclass of torch.nn.Module or a class name, not {target!r}."
    assert registry._REGISTERED == {}


def test_a_module_in_the_place_of_its_class() -> None:
    with pytest.raises(AdapterError) as error:
        register_adapter(Model(), Adapter())  # type: ignore[arg-type]
    assert str(error.value) == (
        "register_adapter needs a subclass of torch.nn.Module or a class name, not an instance of Model. Give its "
        "class: type(model)."
    )
    assert registry._REGISTERED == {}


@pytest.mark.parametrize("name", ["", "models.Model", "My Model", "<class 'Model'>", "9lives"])
def test_a_name_that_no_class_has(name: str) -> None:
    with pytest.raises(AdapterError) as error:
        register_adapter(name, Adapter())
    assert str(error.value) == (
        f"register_adapter needs the name of a class by itself, as type(model).__name__ gives it, not {name!r}."
    )
    assert registry._REGISTERED == {}


@pytest.mark.parametrize("adapter", [None, Adapter, ["blocks"], "blocks", Model()])
def test_bad_adapter(adapter: Any) -> None:
    with pytest.raises(AdapterError) as error:
        register_adapter(Model, adapter)
    assert str(error.value) == (
        f"register_adapter needs an Adapter instance, not {brief(adapter)}. Adapter(stacks=[...]) makes one."
    )
    assert "\n" not in str(error.value)
    assert registry._REGISTERED == {}


@pytest.mark.parametrize("argument", ["stacks", "resident", "entry_points", "parts"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("layers", "'layers' is a string. Write ['layers']."),
        (None, "None is no list of names."),
        (3, "3 is no list of names."),
        ({"layers"}, "{'layers'} is no list of names."),
        (iter(["layers"]), "is no list of names."),
        (["layers", 3], "3 is no name."),
        ([None], "None is no name."),
        ([nn.ModuleList([nn.Linear(2, 2)])], "ModuleList( (0): Linear(in_fea... (67 characters) is no name."),
    ],
    ids=range(8),
)
def test_what_is_no_list_of_names_is_refused_when_the_adapter_is_made(argument: str, value: Any, message: str) -> None:
    with pytest.raises(AdapterError) as error:
        Adapter(**{argument: value})
    assert str(error.value).startswith(f"Adapter({argument}=...): ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


class Says(Adapter):
    """Finds whatever it is made to find."""

    def __init__(self, **found: Any) -> None:
        super().__init__()
        object.__setattr__(self, "found", found)

    def find_stacks(self, component: nn.Module) -> Sequence[str]:
        return self.found.get("stacks", ())  # type: ignore[attr-defined,no-any-return]

    def find_entry_points(self, component: nn.Module) -> Sequence[str]:
        return self.found.get("entry_points", ())  # type: ignore[attr-defined,no-any-return]

    def find_parts(self, component: nn.Module) -> Sequence[str]:
        return self.found.get("parts", ())  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("what", ["stacks", "entry_points", "parts"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("first", "'first' is a string. Write ['first']."),
        (None, "None is no list of names."),
        ({"first"}, "{'first'} is no list of names."),
        ([3], "3 is no name."),
    ],
)
def test_what_an_adapter_finds_that_is_no_list_of_names(what: str, value: Any, message: str) -> None:
    register_adapter(Model, Says(**{what: value}))
    with pytest.raises(AdapterError) as error:
        layouts_of({"net": Model()})
    assert str(error.value) == f"Says.find_{what}() of Model: {message}"


def test_a_stack_that_is_named_twice() -> None:
    with pytest.raises(AdapterError) as error:
        Adapter(stacks=["first", "second", "first"])
    assert str(error.value) == "Adapter(stacks=...): `first` is named twice. Each block is to be listed once."
    with pytest.raises(AdapterError) as error:
        Says(stacks=["first", "first"]).layout("net", Model())
    assert str(error.value) == "Says.find_stacks() of Model: `first` is named twice. Each block is to be listed once."


def test_entry_points_that_are_named_twice_are_one() -> None:
    adapter = Says(stacks=["second"], entry_points=["first.0.forward", "first.0.forward"])
    assert adapter.layout("net", Model()).entry_points == ("first.0.forward",)


def test_an_entry_point_that_is_found_and_does_not_exist() -> None:
    with pytest.raises(AdapterError) as error:
        Says(entry_points=["decode"]).layout("net", Model())
    assert str(error.value) == "`net` (Model) has no method decode to enter by."


def test_a_generator_of_names_is_read_once() -> None:
    layout = Says(stacks=(name for name in ("first", "second"))).layout("net", Model())
    assert [stack.name for stack in layout.stacks] == ["first", "second"]


# ---- what structure finds twice, and names that are none


class _Shared(nn.Module):
    """An expert that all layers share, and a block in two lists."""

    def __init__(self) -> None:
        super().__init__()
        expert = nn.Linear(64, 64)
        self.layers = nn.ModuleList()
        for _ in range(4):
            layer = nn.Module()
            layer.attn, layer.mlp, layer.gen_mlp = nn.Linear(64, 64), nn.Linear(64, 64), expert
            self.layers.append(layer)
        self.down = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.up = nn.ModuleList([nn.Linear(64, 64), self.down[0]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer.gen_mlp(x) + layer.mlp(layer.attn(x))
        for block in [*self.down, *self.up]:
            x = torch.tanh(block(x))
        return x


@pytest.mark.parametrize("budget", ["min", "auto"])
def test_a_module_that_runs_in_several_places_is_one_block(budget: str) -> None:
    model, x = _Shared().eval(), torch.randn(2, 64)
    expected = model(x)
    names = block_names(model)
    assert len(names) == len(set(names))
    with layerstream.offload(model, vram_budget=budget, device=adversary()), torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), expected)


@pytest.mark.parametrize("method", ["layers", "state_dict", "named_modules", "to"])
def test_a_child_and_what_every_module_has_are_no_entry_points(method: str) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    with pytest.raises(AdapterError, match=f"has no method {method} to enter by"):
        Adapter(stacks=["layers"], entry_points=[method]).layout("net", model)


def test_whether_it_is_repeated_is_true_or_false() -> None:
    with pytest.raises(AdapterError, match=r"is_repeated=...\): 'no' is neither True nor False"):
        Adapter(is_repeated="no")  # type: ignore[arg-type]


def test_inner_blocks_that_do_not_exist() -> None:
    class Divided(Adapter):
        def find_inner(self, block: nn.Module) -> list[str]:
            return ["nope"]

    model = nn.Module()
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    with pytest.raises(AdapterError, match=r"find_inner\(\) of Sequential names nope, which `layers.0` does not have"):
        Divided(stacks=["layers"]).layout("net", model)
