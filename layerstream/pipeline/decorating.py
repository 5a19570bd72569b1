"""`offload` as a decorator: functions of every kind that run inside a context made anew for each call."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import AsyncGenerator, Callable
from typing import Any

# Given the arguments of a call, and whether the call is one use, for which others wait: what it runs in.
Around = Callable[[tuple[Any, ...], str, bool], contextlib.AbstractContextManager[object]]


def decorated(function: Callable[..., Any], around: Around) -> Callable[..., Any]:
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
