"""diffusers and transformers, imported when one of their classes is first asked for."""

from importlib import import_module
from typing import Any


class Library:
    """A module that is imported at its first use, so that importing the stand-ins stays light.

    Its classes are `Any` to the type checker, whichever version is installed, and a class that the installed version
    does not have is an ImportError naming that version.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        module = import_module(self._name)
        try:
            return getattr(module, attribute)
        except AttributeError as error:
            version = getattr(module, "__version__", "(version unknown)")
            raise ImportError(f"{self._name} {version} has no {attribute}", name=self._name) from error


diffusers = Library("diffusers")
transformers = Library("transformers")
