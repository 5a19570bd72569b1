"""The models that there are at true size, by name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

from layerstream.standins.repository.full_size import longcat, ovis, sd35m
from layerstream.standins.repository.full_size.specs import DenoiserSpec, PipelineSpec

_Spec = TypeVar("_Spec")

DENOISER_SPECS: Mapping[str, DenoiserSpec] = MappingProxyType(
    {"sd35m": sd35m.DENOISER, "ovis": ovis.DENOISER, "longcat": longcat.DENOISER}
)
PIPELINE_SPECS: Mapping[str, PipelineSpec] = MappingProxyType(
    {"sd35m": sd35m.PIPELINE, "ovis": ovis.PIPELINE, "longcat": longcat.PIPELINE}
)


def spec_of(specs: Mapping[str, _Spec], name: str, kind: str) -> _Spec:
    """Return the entry `name`.

    Raises:
        ValueError: there is none; lists those that there are.
    """
    if name not in specs:
        raise ValueError(f"no {kind} is named {name!r}; choose one of {', '.join(specs)}")
    return specs[name]
