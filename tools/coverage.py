"""Writes docs/coverage.md: every model class of the installed diffusers, what streams of it, and how it is tested.

`python -m tools.coverage`, or `make coverage`; takes a minute. Classes are built on the meta device from their default
config, or as a tiny pipeline has them where the defaults do not build, and divided by the library's own code.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerstream.errors import LayerstreamError
from layerstream.model.components import layouts_of
from layerstream.model.units import divide
from layerstream.standins.repository.tiny.pipelines import RECIPES
from layerstream.standins.repository.tiny.recipes import Recipe
from layerstream.standins.repository.tiny.variants import NOT_SWEPT, RECIPES_OF_VARIANTS
from layerstream.standins.weights import skip_init
from tools.coverage_configs import CANNOT, CONFIGS

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
LIBRARIES = ("diffusers", "transformers", "torch")
_BASES = ("ModelMixin", "LegacyModelMixin", "DiffusionPipeline")
_MIB = 2**20
_SHOWN = 8  # of the stacks of a class
HEAD = """# Coverage

`make coverage` writes this page: the model classes of diffusers and the encoders that its pipelines use, what streams
of each by the library's own code, and how it is tested. Made with {versions}.

- *stacks*: the lists of blocks that stream, and the number of blocks; in the order in which they were found. A large
  embedding or projection beside them is a unit of its own.
- *weights*, *largest unit*: in bfloat16, as the class is built from its default config, which is that of no checkpoint
  for some. *tiny*: built as a tiny pipeline has it, since the defaults do not build; sizes are left out then. Blocks of
  240 MiB or more are cut into pieces.
- *in stacks*: the share of the bytes that streams. The rest is the base, which comes and goes as a whole.
- *tested*: the tiny pipelines that have it (`tests/test_pipelines.py`), and how many of the swept ones do
  (`tests/test_variants.py`); *layout only*: no more than this page.

| | classes | with stacks | in a tiny pipeline | swept | layout only | no layout |
|---|---|---|---|---|---|---|
"""
COLUMNS = "| class | stacks | weights | largest unit | in stacks | tested |\n|---|---|---|---|---|---|\n"


@dataclass(frozen=True)
class Row:
    """A class on the page; `reason` says why there is no more to say of it."""

    name: str
    stacks: tuple[str, ...] = ()
    weights_bytes: int = 0
    largest_bytes: int = 0
    stack_bytes: int = 0
    is_tiny: bool = False
    reason: str = ""

    def line(self, tested: str) -> str:
        """The row of the table."""
        if self.reason:
            return f"| {self.name} | {self.reason} | - | - | - | {tested} |"
        share = f"{100 * self.stack_bytes / self.weights_bytes:.0f} %" if self.weights_bytes else "-"
        sizes = ("tiny", "tiny") if self.is_tiny else (_mib(self.weights_bytes), _mib(self.largest_bytes))
        shown = [*self.stacks[:_SHOWN], *(["…"] if len(self.stacks) > _SHOWN else [])]
        stacks = ", ".join(shown) or ("none" if self.weights_bytes else "no weights")
        return f"| {self.name} | {stacks} | {sizes[0]} | {sizes[1]} | {share} | {tested} |"


def _mib(num_bytes: int) -> str:
    if num_bytes >= 1024 * _MIB:
        return f"{num_bytes / _MIB / 1024:.1f} GiB"
    return f"{num_bytes / _MIB:.1f} MiB" if num_bytes >= 0.1 * _MIB else f"{num_bytes / 1024:.1f} KiB"


def model_classes() -> dict[str, dict[str, type[nn.Module]]]:
    """Every model class that diffusers defines, by kind and name."""
    diffusers = importlib.import_module("diffusers")
    found: dict[str, dict[str, type[nn.Module]]] = {
        kind: {} for kind in ("Transformers and priors", "U-Nets", "ControlNets", "Autoencoders", "Other parts")
    }
    for module in _modules("diffusers.models", "diffusers.pipelines"):
        for name, value in vars(module).items():
            is_model = isinstance(value, type) and issubclass(value, diffusers.ModelMixin) and name not in _BASES
            if is_model and value.__module__ == module.__name__:
                found[_kind(name, module.__name__)][name] = value
    return {kind: dict(sorted(classes.items())) for kind, classes in found.items()}


def _modules(*roots: str) -> Iterator[Any]:
    for root in roots:
        for info in pkgutil.walk_packages(importlib.import_module(root).__path__, f"{root}."):
            try:
                yield importlib.import_module(info.name)
            except (ImportError, OSError):  # helpers that want further packages; they define no models
                continue


def _kind(name: str, module: str) -> str:
    if "controlnet" in name.lower():
        return "ControlNets"
    if ".transformers." in module or "Prior" in name or name == "UTransformer2DModel":
        return "Transformers and priors"
    if "UNet" in name or name in ("UVit2DModel", "UniDiffuserModel", "WuerstchenDiffNeXt"):
        return "U-Nets"
    if (".autoencoders." in module and "Vocoder" not in name) or name == "PaellaVQModel":
        return "Autoencoders"
    return "Other parts"


@cache
def pipeline_classes() -> dict[str, type]:
    """Every pipeline class that diffusers exports and that can be imported here."""
    diffusers = importlib.import_module("diffusers")
    found = {}
    for name in sorted(dir(diffusers)):
        if "Pipeline" in name and name not in _BASES:
            try:
                value = getattr(diffusers, name)
            except (ImportError, OSError, RuntimeError):
                continue
            if isinstance(value, type) and issubclass(value, diffusers.DiffusionPipeline):
                found[name] = value
    return found


def encoder_classes(pipelines: Iterable[type]) -> dict[str, type[nn.Module]]:
    """Classes of transformers that the constructors of pipelines name: encoders of text, images and sound."""
    transformers = importlib.import_module("transformers")
    found: dict[str, type[nn.Module]] = {}
    for pipeline in pipelines:
        for annotation in _annotations(pipeline):
            for part in (annotation, *_arguments(annotation)):
                is_model = isinstance(part, type) and issubclass(part, transformers.PreTrainedModel)
                if is_model and not part.__name__.endswith("PreTrainedModel"):
                    found[part.__name__] = part
    return dict(sorted(found.items()))


def _annotations(pipeline: type) -> Iterator[Any]:
    scope = vars(importlib.import_module(pipeline.__module__))
    for parameter in inspect.signature(pipeline).parameters.values():
        value = parameter.annotation
        if isinstance(value, str):
            try:
                value = eval(value, dict(scope))
            except (NameError, TypeError, SyntaxError):
                continue
        yield value


def _arguments(annotation: Any) -> Iterator[Any]:
    for argument in getattr(annotation, "__args__", ()):
        yield argument
        yield from _arguments(argument)


def parts_of(recipe: Recipe) -> dict[str, nn.Module]:
    """The modules that a tiny pipeline is made of."""
    with skip_init():
        parts = recipe.parts()
    wanted = set(inspect.signature(pipeline_classes()[recipe.class_name]).parameters)
    return {key: part for key, part in parts.items() if isinstance(part, nn.Module) and key in wanted}


def describe(name: str, cls: type[nn.Module], example: nn.Module | None) -> Row:
    """Build a class and divide it.

    Args:
        example: of a tiny pipeline, for classes whose defaults do not build.
    """
    if name in CANNOT:
        return Row(name, reason=f"cannot be built: {CANNOT[name]}")
    module, error = _built(name, cls)
    is_tiny = module is None
    module = example if module is None else module
    if module is None:
        return Row(name, reason=f"cannot be built: {error}")
    try:
        layouts = layouts_of({"model": module.to(torch.bfloat16)})
        division = divide(layouts, is_preview=True)
    except (LayerstreamError, AttributeError) as failed:
        return Row(name, reason=f"cannot be divided: {type(failed).__name__}, {failed}".replace("|", r"\|"))
    units = [unit.spec for unit in division.units]
    # Of the units: an embedding that is tied to a head is a stack of the layout, but stays in the base.
    blocks: dict[str, set[str]] = {}
    for unit in units:
        if unit.stack is not None:
            blocks.setdefault(unit.stack, set()).add(unit.block_name)
    return Row(
        name=name,
        stacks=tuple(f"`{stack}` {len(names)}" for stack, names in blocks.items()),
        weights_bytes=sum(unit.num_bytes for unit in units),
        largest_bytes=max((unit.num_bytes for unit in units), default=0),
        stack_bytes=sum(unit.num_bytes for unit in units if unit.is_block),
        is_tiny=is_tiny,
    )


def _built(name: str, cls: type[nn.Module]) -> tuple[nn.Module | None, str]:
    """A module on the meta device, or the error in one line."""
    try:
        with torch.device("meta"), skip_init():
            if name in CONFIGS:
                return CONFIGS[name](cls), ""
            config_class = getattr(cls, "config_class", None)
            return (cls(config_class()) if config_class else cls()), ""
    except Exception as error:  # whatever a class does with defaults that nobody uses
        text = " ".join(str(error).split()).replace("|", r"\|")
        return None, f"{type(error).__name__}, {text[:100]}"


@dataclass(frozen=True)
class Tested:
    """Which tiny pipelines and which swept classes have a class in them."""

    tiny: tuple[str, ...] = ()
    swept: tuple[str, ...] = ()

    def text(self) -> str:
        """The cell of the table."""
        said = [f"tiny {', '.join(self.tiny[:3])}{' …' * (len(self.tiny) > 3)}"] if self.tiny else []
        said += [f"{len(self.swept)} swept"] if self.swept else []
        return "; ".join(said) or "layout only"


def tested_classes() -> tuple[dict[str, Tested], dict[str, nn.Module]]:
    """By class name, what tests it, and one module of it."""
    tested: dict[str, Tested] = {}
    examples: dict[str, nn.Module] = {}
    named = [(name, recipe, True) for name, recipe in RECIPES.items()]
    named += [(name, recipe, False) for name, recipe in RECIPES_OF_VARIANTS.items()]
    for name, recipe, is_tiny in named:
        for part in parts_of(recipe).values():
            for module in [part, *_inner(part)]:
                kind = type(module).__name__
                examples.setdefault(kind, module)
                known = tested.get(kind, Tested())
                if is_tiny and name not in known.tiny:
                    known = Tested((*known.tiny, name), known.swept)
                elif not is_tiny and name not in known.swept:
                    known = Tested(known.tiny, (*known.swept, name))
                tested[kind] = known
    return tested, examples


def _inner(part: nn.Module) -> list[nn.Module]:
    """Models inside of a part: a text model in a vision-language one, say."""
    return [m for m in part.modules() if m is not part and hasattr(m, "config")]


def page() -> str:
    """The text of the page."""
    tested, examples = tested_classes()
    groups: dict[str, Mapping[str, type[nn.Module]]] = {**model_classes()}
    groups["Encoders of transformers"] = encoder_classes(pipeline_classes().values())
    rows = {
        kind: [describe(name, cls, examples.get(name)) for name, cls in classes.items()]
        for kind, classes in groups.items()
    }
    versions = ", ".join(f"{library} {version(library).partition('+')[0]}" for library in LIBRARIES)
    text = HEAD.format(versions=versions)
    for kind, found in rows.items():
        how = [tested.get(row.name, Tested()) for row in found]
        counts = (
            len(found),
            sum(bool(row.stacks) for row in found),
            sum(bool(each.tiny) for each in how),
            sum(bool(each.swept) for each in how),
            sum(each == Tested() and not row.reason for row, each in zip(found, how, strict=True)),
            sum(bool(row.reason) for row in found),
        )
        text += f"| {kind} | {' | '.join(map(str, counts))} |\n"
    for kind, found in rows.items():
        text += f"\n## {kind}\n\n{COLUMNS}"
        text += "".join(row.line(tested.get(row.name, Tested()).text()) + "\n" for row in found)
    return text + _pipelines_text()


def _pipelines_text() -> str:
    pipelines = pipeline_classes()
    tiny = {recipe.class_name for recipe in RECIPES.values()}
    swept = [name for name in pipelines if name in RECIPES_OF_VARIANTS]
    others = {name: NOT_SWEPT.get(name, "not built tiny yet") for name in pipelines if name not in swept}
    tested = [name for name in others if name in tiny]
    text = "\n## Pipelines\n\n"
    text += f"Of {len(pipelines)} classes that can be imported here, {len(swept)} are swept: each runs resident and "
    text += "streamed, with the least budget and with a middle one, on the adversarial device, and is compared.\n\n"
    text += ", ".join(swept) + ".\n"
    if tested:
        text += "\nAs a tiny pipeline only: " + ", ".join(tested) + ".\n"
    text += "\n| not swept | why |\n|---|---|\n"
    return text + "".join(f"| {name} | {why} |\n" for name, why in others.items() if name not in tested)


def classes_on(text: str) -> dict[str, list[str]]:
    """The names of classes on a page, by section; for the test that it is of the installed diffusers."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in text.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif section and line.startswith("| ") and not line.startswith(("| class ", "| not swept ")):
            found.setdefault(section, []).append(line.split(" | ")[0].removeprefix("| "))
    return found


def main() -> None:
    """Write the page."""
    logging.disable(logging.WARNING)  # of deprecated classes, one each
    warnings.simplefilter("ignore")
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
