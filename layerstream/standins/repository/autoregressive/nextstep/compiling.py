"""Functions that are compiled when their class is made, with a switch to run them as they are for a while."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

ENVIRONMENT = "ENABLE_TORCH_COMPILE"


def is_wanted() -> bool:
    """Whether the environment asks for compiled functions; without a word from it, it does."""
    return os.environ.get(ENVIRONMENT, "true").lower() in ("1", "true", "yes", "on")


class Compiler:
    """Compiles functions of classes.

    Args:
        is_enabled: False leaves each function as it is.
        backend: of `torch.compile`.
    """

    def __init__(self, *, is_enabled: bool, backend: str) -> None:
        self.is_enabled = is_enabled
        self.backend = backend
        self._is_on = True

    def subclass(self, base: type, **options: dict[str, Any]) -> type:
        """Return a class of the name of `base` with some of its functions compiled: `options` of each, by its name."""
        functions = {name: self._compiled(getattr(base, name), **given) for name, given in options.items()}
        return type(base.__name__, (base,), {"__module__": base.__module__, "__doc__": base.__doc__, **functions})

    def _compiled(self, function: Callable[..., Any], *, cudagraphs: bool = False, **options: Any) -> Any:
        if not self.is_enabled:
            return function
        if cudagraphs and self.backend == "inductor":
            options["options"] = {"triton.cudagraphs": True}
        compiled = torch.compile(function, backend=self.backend, **options)

        @wraps(function)
        def chosen(*args: Any, **kwargs: Any) -> Any:
            return compiled(*args, **kwargs) if self._is_on else function(*args, **kwargs)

        return chosen

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run functions as they are inside."""
        before, self._is_on = self._is_on, False
        try:
            yield
        finally:
            self._is_on = before
