"""Writes docs/pairing.md: which tiny pipelines' passes are paired, at which share of their steps, and why others' not.

`python -m tools.pairing`, or `make pairing-table`; takes five minutes. Each pipeline runs resident and streamed, with
pairing on, whatever it would gain, on the simulated device; results that differ are an error.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import layerstream
from layerstream.device.simulated import SimulatedDevice
from layerstream.engine.streamer import Streamer
from layerstream.standins import TINY_PIPELINES, build_tiny, run_tiny
from layerstream.testing import harsh_device

PAGE = Path(__file__).parent.parent / "docs" / "pairing.md"
STEPS, CALLS = 12, 3
_FEWEST = 4  # calls of a component that runs in steps; text encoders run twice
HEAD = """# Passes that are paired

`make pairing-table` writes this page: the tiny pipelines of the tests, each called {calls} times with {steps} steps,
with `pairing="auto"` as if every pairing gained something. *calls*: of the component in one call of the pipeline.
*paired*: the share of those in the last call that came as pairs, one load for both. All results are those of the
resident pipeline, bit for bit ([how](design.md#two-passes-one-load)).

| pipeline | component | calls | paired | why not |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """A component that runs many times in a call of its pipeline.

    Attributes:
        share: of its calls that came as pairs.
    """

    pipeline: str
    component: str
    num_calls: int
    share: float
    reason: str

    def __str__(self) -> str:
        share = f"{100 * self.share:.0f} %" if self.share else ""
        return f"| {self.pipeline} | {self.component} | {self.num_calls} | {share} | {self.reason} |"


class DifferentError(Exception):
    """A pipeline whose passes may be paired gives another result."""


def rows_of(name: str) -> list[Row]:
    """Run one pipeline; a row for each component that is called four times or more.

    Raises:
        DifferentError: a result is not the resident pipeline's.
        ImportError: the installed diffusers has no such pipeline.
    """
    pipe = build_tiny(name)
    counts = _counts(pipe, name)
    expected = [run_tiny(pipe, name, seed=seed, num_inference_steps=STEPS) for seed in range(CALLS)]
    device: SimulatedDevice = harsh_device()
    with (
        mock.patch.object(Streamer, "_find_no_gain", return_value=""),
        layerstream.offload(pipe, vram_budget="min", device=device, pairing="auto") as streamer,
        device.checking(),
    ):
        num_paired = 0
        for seed, each in enumerate(expected):
            before = streamer.stats().num_paired_passes
            if not torch.equal(run_tiny(pipe, name, seed=seed, num_inference_steps=STEPS), each):
                raise DifferentError(f"{name}, call {seed}")
            num_paired = streamer.stats().num_paired_passes - before
        reasons = streamer.report().pairing
    pairs = [component for component in counts if not reasons.get(component, "-")]
    share = 2 * num_paired / (sum(counts[component] for component in pairs) or 1)
    unwatched = "runs once, as its adapter says"
    return [
        Row(name, each, count, share, "")
        if each in pairs
        else Row(name, each, count, 0.0, reasons.get(each, unwatched))
        for each, count in counts.items()
    ]


def _counts(pipe: Any, name: str) -> dict[str, int]:
    """How often each component is called in one call of the pipeline, of those called often."""
    counted: Counter[str] = Counter()
    parts = {key: part for key, part in pipe.components.items() if isinstance(part, nn.Module)}
    handles = [
        part.register_forward_pre_hook(lambda module, args, key=key: counted.update([key]))
        for key, part in parts.items()
    ]
    run_tiny(pipe, name, num_inference_steps=STEPS)
    for handle in handles:
        handle.remove()
    return {key: count for key, count in counted.items() if count >= _FEWEST}


def main(names: Sequence[str] = TINY_PIPELINES) -> int:
    """Write the page."""
    warnings.simplefilter("ignore")
    lines: list[str] = []
    for name in names:
        try:
            rows = rows_of(name)
        except ImportError as exc:
            print(f"{name}: {exc}", file=sys.stderr)
            continue
        lines += map(str, rows)
        print(*rows, sep="\n", flush=True)
    PAGE.write_text(HEAD.format(calls=CALLS, steps=STEPS) + "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
