"""`offload` as a decorator: functions of every kind that run inside a context made anew for each call."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from layerstream.errors import ArgumentError, brief
from layerstream.model.components import is_plain

T = TypeVar("T", bound=Callable[..., Any])

# Given the arguments of a call, and whether the call is one use, for which others wait: what it runs in.
Around = Callable[[tuple[Any, ...], str, bool], contextlib.AbstractContextManager[object]]


def decorated_target(target: T, around: Around) -> T:
    """A class, whose `__call__` is decorated from now on, or a function decorated.

    Raises:
        ArgumentError: it is neither, or a class whose objects cannot be called.
    """
    if not callable(target) or (not isinstance(target, type) and not is_plain(target)):
        raise ArgumentError(
            f"a LayerStreamer decorates a class or a function, not {brief(target)}: to run a pipeline, call the "
            "pipeline itself; to stream a pipeline, `with layerstream.offload(pipe):`."
        )
    if isinstance(target, type):
        if not any("__call__" in vars(cls) for cls in target.__mro__):
            raise ArgumentError(
                f"class {target.__name__} has no `__call__` that could run streamed. Decorate its methods: "
                "`@layerstream.offload()` before each; the pipeline is their first argument."
            )
        target.__call__ = _decorated(target.__call__, around)  # type: ignore[method-assign]
        return target
    return _decorated(target, around)  # type: ignore[return-value]


def _decorated(function: Callable[..., Any], around: Around) -> Callable[..., Any]:
    """The function with each call of it, or what it returns while that runs, inside `around(...)`.

    A plain function is one use of its pipeline. What gives up its thread in between (generators, coroutines) is not: it
    would hold up the thread that it waits for. Each call of the pipeline that it makes is one.
    """
    name = getattr(function, "__qualname__", type(function).__name__)
    if inspect.isasyncgenfunction(function):

        @functools.wraps(function)
        async def generate_async(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            with around(args, name, False):
                inner = function(*args, **kwargs)
                try:
                    step = inner.__anext__()
                    while True:
                        try:
                            value = await step
                        except StopAsyncIteration:
                            return
                        try:
                            sent = yield value
                        except GeneratorExit:
                            raise
                        except BaseException as error:
                            step = inner.athrow(error)
                        else:
                            step = inner.asend(sent)
                finally:
                    await inner.aclose()

        return generate_async
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generate(*args: Any, **kwargs: Any) -> Any:
            with around(args, name, False):
                return (yield from function(*args, **kwargs))

        return generate
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def run(*args: Any, **kwargs: Any) -> Any:
            with around(args, name, False):
                return await function(*args, **kwargs)

        return run

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with around(args, name, True):
            return function(*args, **kwargs)

    return call
