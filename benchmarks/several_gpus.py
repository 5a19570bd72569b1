"""The predictions of docs/several_gpus.md: denoisers over the links of more GPUs than were measured, by the planner.

`python -m benchmarks.several_gpus` (or `make budget-table`) writes them again. Nothing is measured here: the time of a
resident pass, one link's speed and that of the way between two GPUs are an H200's; all else is worked out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.budget_table import Case, alone, table_row
from benchmarks.pages import write_parts
from benchmarks.true_size import models
from layerstream.arguments import Parser

PAGE = Path("docs/several_gpus.md")
LINK_GB_PER_S = 53.0  # of one GPU to its host, PCIe 5 with 16 lanes
WAY_GB_PER_S = 390.0  # between two GPUs, NVLink
NETWORK_GB_PER_S = 45.0  # of one network card of 400 Gbit/s
GPUS = (1, 2, 4, 8, 16)
GPUS_OF_A_HOST = 8
# Of a pass that waits for nothing, ms: benchmarks/results/stored_h200_20261129.md.
RESIDENT_MS: Mapping[str, float] = {"Ovis-Image-7B": 117.9, "LongCat-Image": 91.5}
BUDGETS: Mapping[str, int | None] = {"the least": None, "6 GiB": 6 * 2**30}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.several_gpus", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    options: argparse.Namespace = parser.parse_args(arguments)
    cases = [alone(Case(model), "transformer") for model in models() if model.name in RESIDENT_MS]
    write_parts(options.page, {"prediction": prediction_table(cases)}, "budget-table")
    return 0


def together_gb_per_s(links: Sequence[float], way: float = WAY_GB_PER_S) -> float:
    """What comes to a GPU over its own link, the first, and those of others, if they add up: what the others bring goes
    on over the way between the GPUs, by copies beside those over its own link (`transfer/route.py`).

    So at most: two links were measured to bring less (docs/several_gpus.md).
    """
    own, *others = links
    return min(own + sum(others), way) if others else own


def ways() -> list[tuple[str, str, float]]:
    """Where weights come from: (the way, GPUs, GB/s)."""
    of_a_host = [num for num in GPUS if num <= GPUS_OF_A_HOST]
    by_links = [(num, together_gb_per_s([LINK_GB_PER_S] * num)) for num in of_a_host]
    by_network = [(num, together_gb_per_s([NETWORK_GB_PER_S] * num)) for num in of_a_host]
    of_two_hosts = [LINK_GB_PER_S] * GPUS_OF_A_HOST + [NETWORK_GB_PER_S] * GPUS_OF_A_HOST
    return [
        *(("host memory, `links`" if num > 1 else "host memory", str(num), speed) for num, speed in by_links),
        ("host memory of two hosts", str(2 * GPUS_OF_A_HOST), together_gb_per_s(of_two_hosts)),
        ("other GPUs of the host, `store`", "2 to 8", WAY_GB_PER_S),
        *(("another host, over network cards", str(num), speed) for num, speed in by_network),
    ]


def prediction_table(cases: Sequence[Case]) -> list[str]:
    """A row for each way, a column for each denoiser and budget: times resident."""
    columns = [f"{case.model.name}, {budget}" for case in cases for budget in BUDGETS]
    lines = [
        table_row(["weights come from", "GPUs", "GB/s", *columns]),
        "|" + "---|" * (3 + len(columns)),
    ]
    for way, gpus, speed in ways():
        ratios = [f"{ratio(case, budget, speed):.2f} x" for case in cases for budget in BUDGETS.values()]
        lines.append(table_row([way, gpus, f"{speed:.0f}", *ratios]))
    return lines


def ratio(case: Case, budget_bytes: int | None, gb_per_s: float) -> float:
    """Of the time of a pass to that of one that waits for nothing."""
    ms_per_tflop = RESIDENT_MS[case.model.name] / (case.counts["transformer"].total_flops / 1e12)
    prediction = case.plan(budget_bytes, gb_per_s, ms_per_tflop).phase_of("transformer").prediction
    assert prediction is not None
    return prediction.ms_per_pass / RESIDENT_MS[case.model.name]


if __name__ == "__main__":
    sys.exit(main())
