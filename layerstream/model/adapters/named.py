"""Adapters of models that structure does not tell all of, by the name of their class: nothing is imported.

Most of these are remote code, which is in no library. What structure does tell, their stacks, is found as in any other
model. A class that only has the same name, and not the children, is described as any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from layerstream.model.adapters.base import has_method
from layerstream.model.adapters.generic import GenericAdapter, stacks_in


@dataclass(frozen=True)
class NamedAdapter(GenericAdapter):
    """The generic rules, and what is said beside.

    Args:
        children: names that the component must have, to be the model that is meant.
        passes: methods by which it is entered, beside its forward; codes of a model differ in which of them it has.
        models: children that are components themselves; codes differ in these, too.
        is_whole: it is one component, whatever it is made of.
    """

    children: Sequence[str] = ()
    passes: Sequence[str] = ()
    models: Sequence[str] = ()
    is_whole: bool = False

    def fits(self, component: nn.Module) -> bool:
        """Whether the component is the model that is meant, or only has its name."""
        names = {name for name, child in component.named_children() if child is not None}
        return names.issuperset(self.children)

    def find_parts(self, component: nn.Module) -> Sequence[str]:
        if self.is_whole:
            return ()
        if not self.models:
            return super().find_parts(component)
        children = dict(component.named_children())
        return [name for name in self.models if name in children and _has_weights(children[name])]

    def find_entry_points(self, component: nn.Module) -> Sequence[str]:
        found = [name for name in self.passes if has_method(component, name)]
        return list(dict.fromkeys([*super().find_entry_points(component), *found]))


class StreamedTokenizer(NamedAdapter):
    """Encodes and decodes as an autoencoder does, and is no small one: its transformers stream."""

    def find_stacks(self, component: nn.Module) -> Sequence[str]:
        return stacks_in(component)


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


NAMED: Mapping[str, NamedAdapter] = MappingProxyType(
    {
        # stepfun-ai/NextStep-1.1. A token: image_out_projector, image_head.sample, image_in_projector, and the layers
        # by `forward_model` (code of August 2025) or by `forward`, as a method (`inference/`).
        "NextStep": NamedAdapter(
            children=("layers", "image_head"),
            passes=(
                "prepare_inputs_embeds",
                "forward_model",
                "forward",
                "image_out_projector.forward",
                "image_head.sample",
                "image_in_projector.forward",
            ),
        ),
        # bytedance-research/MammothModa2: its own forward is not what runs. The refiner is a child in the Preview only.
        "Mammothmoda2Model": NamedAdapter(
            children=("llm_model", "gen_transformer", "gen_vae"),
            models=("llm_model", "gen_tokenizer", "gen_vae", "gen_image_condition_refiner", "gen_transformer"),
        ),
        # Its tokenizer: two vision transformers of 0.3 B each, and used for edits only.
        "VisualDiscreteTokenizer": StreamedTokenizer(children=("encoder",)),
        # diffusers' video autoencoder with a transformer of 36 layers, 4.5 GiB of 4.9, for a decoder.
        "AutoencoderKLMiniMaxH3": StreamedTokenizer(children=("encoder", "decoder")),
        # deepseek-ai/Janus: no forward, and no pipeline around it. What takes turns for a token is one phase, so that
        # the projectors do not drive the language model out.
        "MultiModalityCausalLM": NamedAdapter(
            children=("language_model", "gen_head", "gen_vision_model"),
            is_whole=True,
            passes=(
                "language_model.forward",
                "language_model.model.forward",
                "gen_head.forward",
                "prepare_gen_img_embeds",
                "prepare_inputs_embeds",
                "gen_vision_model.encode",
                "gen_vision_model.decode_code",
            ),
        ),
    }
)
