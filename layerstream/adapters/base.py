"""What an adapter is, and how its description becomes a layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from layerstream.errors import AdapterError
from layerstream.units import ComponentLayout, StackLayout


@dataclass(frozen=True)
class Adapter:
    """Says which blocks of a component stream. Describes; moves nothing.

    For most models the names of its stacks are all there is to say:

        layerstream.register_adapter("MyTransformer", Adapter(stacks=["layers"], is_repeated=True))

    Args:
        stacks: dotted names, inside the component, of the containers whose children are the blocks (an
            `nn.ModuleList`, usually), in the order they run. Empty: the component is one unit.
        is_repeated: the component runs many times a call (a denoiser), so its blocks are kept on the device first.
        resident: dotted names of single blocks that stay on the device.

    Subclass and override `find_stacks` where the names depend on the component.
    """

    stacks: Sequence[str] = ()
    is_repeated: bool = False
    resident: Sequence[str] = ()

    def find_stacks(self, component: nn.Module) -> Sequence[str]:
        """Dotted names of the stacks of this component, in the order they run."""
        return self.stacks

    def find_repeated(self, component: nn.Module) -> bool:
        """Whether this component runs many times a call."""
        return self.is_repeated

    def layout(self, name: str, component: nn.Module) -> ComponentLayout:
        """The component's stacks and blocks.

        Raises:
            AdapterError: a name does not exist in the component, or does not hold modules.
        """
        modules = dict(component.named_modules())
        for wanted in self.resident:
            if wanted not in modules:
                raise AdapterError(self._unknown(name, component, wanted, "resident block"))
        stacks = []
        for stack in self.find_stacks(component):
            if stack not in modules:
                raise AdapterError(self._unknown(name, component, stack, "stack"))
            prefix = f"{stack}." if stack else ""  # "": the component's own children are the blocks
            blocks = tuple(
                (f"{prefix}{child}", module)
                for child, module in modules[stack].named_children()
                if f"{prefix}{child}" not in self.resident and next(_weights(module), None) is not None
            )
            if not blocks and not len(list(modules[stack].children())):
                raise AdapterError(
                    f"stack `{stack}` of `{name}` ({type(component).__name__}) is a {type(modules[stack]).__name__} "
                    "without children. Name the container whose children are the blocks."
                )
            stacks.append(StackLayout(stack, blocks))
        return ComponentLayout(name, component, tuple(stacks), self.find_repeated(component))

    def _unknown(self, name: str, component: nn.Module, wanted: str, what: str) -> str:
        found = [n for n, m in component.named_modules() if isinstance(m, nn.ModuleList)]
        return (
            f"{what} `{wanted}` does not exist in `{name}` ({type(component).__name__}). "
            f"Its module lists are: {', '.join(found) or 'none'}."
        )


def _weights(module: nn.Module):  # type: ignore[no-untyped-def]  # a chain of two generators, used for emptiness
    yield from module.parameters()
    yield from module.buffers()
