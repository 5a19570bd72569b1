"""The models that there are at true size, by name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from layerstream.standins.repository.full_size import glm, longcat, ovis, qwen, sd15, sd35m, wan22
from layerstream.standins.repository.full_size.specs import DenoiserSpec, PipelineSpec

_Spec = TypeVar("_Spec")

_MODULES: Mapping[str, Any] = {
    "sd35m": sd35m,
    "ovis": ovis,
    "longcat": longcat,
    "glm": glm,
    "qwen": qwen,
    "wan22": wan22,
    "sd15": sd15,
}
DENOISER_SPECS: Mapping[str, DenoiserSpec] = MappingProxyType(
    {name: module.DENOISER for name, module in _MODULES.items()}
)
PIPELINE_SPECS: Mapping[str, PipelineSpec] = MappingProxyType(
    {name: module.PIPELINE for name, module in _MODULES.items() if hasattr(module, "PIPELINE")}
)


def spec_of(specs: Mapping[str, _Spec], name: str, kind: str) -> _Spec:
    """Return the entry `name`.

    Raises:
        ValueError: there is none; lists those that there are.
    """
    if name not in specs:
        raise ValueError(f"no {kind} is named {name!r}; choose one of {', '.join(specs)}")
    return specs[name]
