"""The harness: `python -m benchmarks run | suite | list | plots | timeline`.

Exit codes: 0 all measured and equal, 1 something of ours failed or differed, 2 wrong arguments or no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import suite
from benchmarks.cases import CASES, FORMS, forms_of
from benchmarks.cell import Cell
from benchmarks.methods import METHODS, OURS, MissingPeerError
from benchmarks.pages import NoPlaceError
from benchmarks.records import command_line
from layerstream.arguments import Parser, budget, positive

RESULTS = Path("benchmarks/results")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "list":
        _list()
        return 0
    if options.command == "plots":
        from benchmarks import plots  # matplotlib takes its time

        try:
            plots.make(options.results, options.readme, options.page)
        except (plots.NoResultsError, NoPlaceError) as exc:
            parser.error(str(exc))
        return 0
    if options.command == "timeline":
        from benchmarks import timelines

        starts, ends = options.starts or [None], options.ends or [None]
        if len(starts) != len(ends):
            parser.error(f"{len(starts)} --from and {len(ends)} --to; more than one panel needs both for each")
        try:
            lines = timelines.make(options.trace, options.picture, list(zip(starts, ends, strict=True)))
        except timelines.NoTimelineError as exc:
            parser.error(str(exc))
        print("\n".join(lines))
        return 0
    device = options.device or ("cuda" if options.scale == "full" else suite.default_device())
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --scale tiny --device cpu tries the harness on the simulated device")
    command = command_line(arguments)
    common = {
        "scale": options.scale,
        "device": device,
        "passes": options.passes,
        "steps": options.steps,
        "call_seconds": options.call_seconds,
        "tells_first_call": not options.skips_first_call,
    }
    if options.command == "run":
        method = METHODS[options.method]
        forms = forms_of(options.case)
        options.form = options.form or forms[0]
        if options.form not in forms:
            parser.error(f"{options.case} is measured only as {', '.join(forms)}")
        if options.form not in method.forms:
            parser.error(f"{method.name} runs only as {', '.join(method.forms)}")
        if method.needs_budget and options.vram_budget is None:
            parser.error(f"{method.name} needs --vram-budget")
        if options.vram_budget is not None and not method.takes_budget:
            parser.error(f"{method.name} takes no --vram-budget")
        if "%" in str(options.vram_budget):
            parser.error(f"--vram-budget {options.vram_budget} is another size on another GPU; results go by sizes")
        try:
            method.check()
        except MissingPeerError as exc:
            parser.error(str(exc))
        measured = options.case, options.form
        cell = Cell(*measured, method.name, "", options.vram_budget, is_mapped=options.is_mapped, **common)
        first, last = (Cell(*measured, "resident", "", **common) for _ in range(2))
        wanted = [first] if method.name == "resident" else [first, cell, last]
        topic = f"{options.case}-{options.form}-{options.method}"
        refused = suite.refusal(cell) if method.name in OURS else None
        if refused is not None:
            parser.error(refused)
    else:
        methods = options.methods or [name for name in METHODS if name not in (options.without or ())]
        wanted = suite.together(options.names, methods, options.budgets, **common)
        without = ["without", *options.without] if options.without else []
        topic = options.topic or "-".join([*options.names, *(options.methods or without)])
        if all(cell.method == "resident" for cell in wanted):
            named = ", ".join(options.methods or options.budgets or methods)
            parser.error(f"{', '.join(options.names)} measures none of {named}")
        wanted = suite.in_turns(wanted, options.rounds)
    done = suite.run(
        wanted,
        topic=topic,
        command=command,
        output=options.output,
        cell_seconds=options.cell_seconds,
        seconds=options.seconds,
    )
    return 0 if suite.are_all_good(done) else 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    run = commands.add_parser("run", help="one measurement, resident before and after it")
    run.add_argument("--case", choices=CASES, required=True)
    run.add_argument("--form", choices=FORMS, help="default: the case's first")
    run.add_argument("--method", choices=METHODS, default="layerstream")
    run.add_argument("--vram-budget", type=budget, metavar="SIZE", help='"5GiB", "auto" or "min"')
    run.add_argument(
        "--mapped", dest="is_mapped", action="store_true", help="the weights stay in the mapped file they are read from"
    )
    named = commands.add_parser("suite", help="sets of measurements, resident first and last of each")
    named.add_argument("names", nargs="+", choices=suite.suites(), metavar="NAME", help="see `list`")
    some = named.add_mutually_exclusive_group()
    some.add_argument("--without", type=_methods, metavar="A,B", help="all methods but these")
    some.add_argument("--methods", type=_methods, metavar="A,B", help="only these, and resident")
    named.add_argument("--topic", metavar="NAME", help="of the files (default: the suites and the methods)")
    named.add_argument(
        "--rounds", type=positive, default=1, metavar="N", help="all of it so often, in turns; the medians are told"
    )
    named.add_argument("--budgets", type=_budgets, metavar="A,B", help="of methods that take one only these")
    for each in (run, named):
        each.add_argument("--scale", choices=["full", "tiny"], default="full")
        each.add_argument("--device", choices=["cuda", "cpu"], help="cpu: the simulated one (default: the GPU)")
        each.add_argument(
            "--passes", type=positive, metavar="N", help="timed passes of a denoiser (default: 10, or the case's)"
        )
        each.add_argument("--steps", type=positive, metavar="N", help="of a pipeline's call (default: the case's)")
        each.add_argument(
            "--call-seconds", type=float, default=120, metavar="S", help="longer calls of peers are extrapolated"
        )
        each.add_argument(
            "--skip-first-call",
            dest="skips_first_call",
            action="store_true",
            help="of a pipeline with layerstream: calls of a few steps come first, and are not told",
        )
        each.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
        each.add_argument("--cell-seconds", type=float, default=240, metavar="S", help="limit of each measurement")
        each.add_argument("--seconds", type=float, metavar="S", help="limit of all of them")
    commands.add_parser("list", help="cases, forms, methods and suites")
    plots = commands.add_parser("plots", help="pictures and the tables of the README and of a page, from the files")
    plots.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    plots.add_argument("--readme", type=Path, default=Path("README.md"), metavar="FILE")
    plots.add_argument(
        "--page", type=Path, default=Path("benchmarks/README.md"), metavar="FILE", help="the long table's"
    )
    timeline = commands.add_parser("timeline", help="a picture of what `streamer.trace` wrote")
    timeline.add_argument("trace", type=Path, metavar="TRACE.json[.gz]")
    timeline.add_argument("picture", type=Path, metavar="PICTURE.png")
    for name, dest, default in (("--from", "starts", "the first span's start"), ("--to", "ends", "the last one's end")):
        timeline.add_argument(
            name,
            dest=dest,
            type=float,
            action="append",
            metavar="MS",
            help=f"default: {default}; given again for another panel",
        )
    return parser


def _methods(text: str) -> list[str]:
    return _names(text, list(METHODS), "no method")


def _budgets(text: str) -> list[str]:
    known = sorted({e.vram_budget for entries in suite.suites().values() for e in entries if e.vram_budget})
    return _names(text, known, "no suite has")


def _names(text: str, known: Sequence[str], refusal: str) -> list[str]:
    """The names in "A,B", all of which are known."""
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"{refusal} {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def _list() -> None:
    print("cases:  ", ", ".join(CASES))
    print("forms:  ", ", ".join(FORMS))
    print("methods:", ", ".join(METHODS))
    print("suites:")
    for name, cells in suite.suites().items():
        print(f"  {name:<24} {len(cells)} measurements")


if __name__ == "__main__":
    sys.exit(main())
