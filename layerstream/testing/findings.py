"""What a check finds, and what of it an adapter can say: the texts are written here."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from layerstream.engine.streamer import Streamer
from layerstream.testing.readers import outermost_method, running_code, weights_read
from layerstream.testing.report import MOST_NAMED, Finding
from layerstream.transfer.unit import StreamedUnit

# From this call on all of a call is foreseen.
SETTLED = 3


class Findings:
    """What one check has found; `add` keeps each finding once.

    Attributes:
        used: names of the blocks that streamed calls used.
        has_one_order: whether blocks run in the same order in each call.
        entrances: by component, found by themselves or wanted.
        resident: by component, blocks whose weights are read from outside.
    """

    def __init__(self, num_calls: int) -> None:
        self._num_calls = num_calls
        self._found: dict[Finding, None] = {}
        self.used: set[str] = set()
        self.has_one_order = True
        self.entrances: dict[str, list[str]] = {}
        self.resident: dict[str, list[str]] = {}
        self._outside: Counter[tuple[str, str, bool]] = Counter()  # by component, code, and whether that is a method

    @property
    def all(self) -> tuple[Finding, ...]:
        """In the order in which they were found."""
        return tuple(self._found)

    def add(self, kind: Literal["wrong", "slow", "hint"], text: str) -> None:
        """Something is to be changed; see `Finding`."""
        self._found.setdefault(Finding(kind, text))

    def read_outside(self, engine: Streamer, unit: int) -> None:
        """A weight of `unit` is read outside of its block's forward, in a call that should be settled."""
        spec = engine._units[unit].spec
        weights = weights_read(engine)
        reader = running_code()
        what = ", ".join(f"`{name}`" for name in weights[:MOST_NAMED]) or f"weights of `{spec.name}`"
        if not spec.is_block:
            self.add("hint", f"{what}, outside of blocks, is read by {reader} between two calls of `{spec.component}`")
            return
        block = spec.block_name.removeprefix(f"{spec.component}.")
        _note(self.resident, spec.component, block)
        self.add(
            "slow",
            f"weights of `{spec.block_name}` are read outside of its block's forward, by {reader}: {what}. Each time "
            f'all of it is loaded. Name it in resident ("{block}"), or read them inside the forward',
        )

    def not_foreseen(self, unit: StreamedUnit) -> None:
        """A block is needed that was not expected, in a call that should be settled."""
        why = (
            "although blocks run in the same order in each call. This is a fault of layerstream"
            if self.has_one_order
            else "since blocks run in another order in each call; if what runs depends on the input, so it must be"
        )
        self.add("slow", f"`{unit.spec.block_name}` was not foreseen from call {SETTLED} on, {why}")

    def found_entrance(self, component: str, entrance: str) -> None:
        """A method was found that enters the component, and that no adapter names."""
        _note(self.entrances, component, entrance)
        path, _, method = entrance.rpartition(".")
        owner = f"{component}.{path}" if path else component
        self.add(
            "hint",
            f'`{owner}` was entered by `{method}`, which was found by itself; name it in entry_points ("{entrance}")',
        )

    def entered_from_outside(self, engine: Streamer, component: str) -> None:
        """A block runs, or a weight is read, in a settled call, and no method that is watched has led there."""
        method = outermost_method(engine, component)
        self._outside[component, running_code() if method is None else f"`{method}`", method is not None] += 1

    def say_what_is_outside(self) -> None:
        """Of one budget's calls."""
        for (component, reader, is_method), count in self._outside.items():
            if is_method:
                self.add(
                    "hint",
                    f"`{component}` is used in {reader}, which is not watched: each block that it calls is a phase by "
                    "itself. Name it in entry_points if each call of it is one pass (not a loop of them)",
                )
            elif count > 2 * (self._num_calls - SETTLED + 1):  # once or twice a call, an embedding say, costs little
                self.add(
                    "slow",
                    f"blocks or weights of `{component}` are used by {reader}, which is no method of it: each use is a "
                    "phase by itself. Call them in a method of the model, and name that in entry_points",
                )
        self._outside.clear()


def _note(found: dict[str, list[str]], component: str, name: str) -> None:
    names = found.setdefault(component, [])
    if name not in names:
        names.append(name)
