"""The `layerstream` command: arguments and printing only.

Exit codes: 0 done (and the images identical), 1 the images differ, 2 wrong arguments or nothing could be run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from layerstream import demo
from layerstream._version import __version__
from layerstream.arguments import Parser, budget, positive
from layerstream.budget import format_bytes
from layerstream.device.cuda import find_device
from layerstream.errors import LayerstreamError
from layerstream.pipeline.options import PACKINGS, PAIRINGS

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    Raises:
        SystemExit: from argparse, after --help or wrong arguments.
    """
    options = _parser().parse_args(argv)
    try:
        return _demo(options)
    except LayerstreamError as exc:
        problem = str(exc)
    except torch.OutOfMemoryError as exc:
        problem = f"the device is out of memory ({exc}). Make the image smaller, or free what else is there."
    print(f"layerstream: {' '.join(problem.split())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="layerstream", description="Run diffusion pipelines on GPUs too small for them.")
    parser.add_argument("--version", action="version", version=f"layerstream {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    command = commands.add_parser(
        "demo",
        help="run a pipeline resident and streamed, and compare the images bit by bit",
        description="Runs a pipeline with all its weights on the device, then again with a part of them, and compares "
        "the images bit by bit. Without --model: an offline stand-in with random weights. Without a GPU: on a "
        "simulated device.",
    )
    add = command.add_argument
    add("--model", metavar="ID_OR_PATH", help="a diffusers model: a folder, or an id on the hub")
    add("--dtype", choices=_DTYPES, help="of the weights (default: bfloat16 for --model, float32 for the stand-in)")
    add("--prompt", metavar="TEXT", help="(default: a lighthouse)")
    add("--steps", type=positive, metavar="N", help="denoising steps (default: the pipeline's own)")
    add("--height", type=positive, metavar="PIXELS", help="(default: the pipeline's own)")
    add("--width", type=positive, metavar="PIXELS", help="(default: the pipeline's own)")
    add("--seed", type=int, default=0, help="of the image (default: 0)")
    add("--device", help='"cuda:0", or "cpu" for the simulated device (default: the GPU, if there is one)')
    add(
        "--vram-budget",
        type=budget,
        metavar="SIZE",
        help='"8GiB", "50%%" of the device, "auto" or "min" (default: a third of the weights\' size)',
    )
    add(
        "--pairing",
        choices=PAIRINGS,
        default="off",
        help="auto: the two passes of a step of guidance share their loads, once the second can be foreseen "
        "(default: off)",
    )
    add(
        "--packing",
        choices=PACKINGS,
        default="off",
        help="auto, or ahead: weights cross the bus losslessly packed, and are decoded on the device (default: off)",
    )
    add(
        "--store",
        nargs="+",
        metavar="GPU",
        help='other GPUs in whose memory the weights are, such as "cuda:1"; "cpu" at the end: the host takes the rest '
        "(default: host memory)",
    )
    add("--links", nargs="+", metavar="GPU", help="other GPUs that carry a share of each load (default: none)")
    add("--skip-resident", action="store_true", help="run streamed only; nothing is compared")
    add("--output", type=_writable, metavar="FILE", help="where to save the image (default: demo-NAME.png)")
    return parser


def _writable(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no file in an existing folder")
    return path


def _demo(options: argparse.Namespace) -> int:
    device = find_device(options.device)
    output = options.output or Path(f"demo-{Path(options.model).name if options.model else 'standin'}.png")
    dtype = options.dtype or ("bfloat16" if options.model else "float32")
    is_simulated = device.type == "cpu"
    print(f"layerstream {__version__}, torch {torch.__version__}, device: {'simulated' if is_simulated else device}")

    started = time.perf_counter()
    pipe = demo.load_pipeline(options.model, _DTYPES[dtype])
    call = demo.make_call(
        pipe,
        is_standin=options.model is None,
        seed=options.seed,
        prompt=options.prompt,
        num_inference_steps=options.steps,
        height=options.height,
        width=options.width,
    )
    what = options.model or "an offline stand-in with random weights"
    print(f"{type(pipe).__name__}: {what}, {dtype}, ready after {time.perf_counter() - started:.1f} s\n")
    _print_parts(demo.describe(pipe))

    resident = None
    if not options.skip_resident:
        resident = demo.run_resident(pipe, call, str(device))
        if resident is None:
            print(f"resident    does not fit on {device} (out of memory); streamed only\n")
    streamed = demo.run_streamed(
        pipe,
        call,
        str(device),
        options.vram_budget,
        pairing=options.pairing,
        packing=options.packing,
        store=options.store,
        links=options.links,
    )
    _print_runs(resident, streamed, is_simulated=is_simulated)

    is_different = resident is not None and not demo.are_identical(resident.image, streamed.image)
    if resident is None:
        print("not compared: there is no resident image")
    elif is_different:
        print(f"DIFFERENT images: {demo.difference(resident.image, streamed.image)}. Please report this.")
    else:
        print(f"identical images: all {streamed.image.numel():,} values, bit for bit")
    demo.save_png(streamed.image, output)
    print(f"saved {output}{'' if options.model else ' (random weights paint noise)'}")
    return 1 if is_different else 0


def _print_parts(parts: Sequence[demo.Part]) -> None:
    print(f"{'component':<16} {'class':<30} {'weights':>10}  in blocks, which can stream")
    for part in parts:
        blocks = f"{format_bytes(part.block_bytes)} in {part.num_blocks}: {', '.join(part.stacks)}"
        size = format_bytes(part.num_bytes)
        print(f"{part.name:<16} {part.class_name:<30} {size:>10}  {blocks if part.num_blocks else '-'}")
    in_blocks = format_bytes(sum(p.block_bytes for p in parts))
    total = format_bytes(sum(p.num_bytes for p in parts))
    print(f"{'all':<16} {'':<30} {total:>10}  {in_blocks} in {sum(p.num_blocks for p in parts)}\n")


def _print_runs(resident: demo.Run | None, streamed: demo.StreamedRun, *, is_simulated: bool) -> None:
    stats = streamed.stats
    size = format_bytes(streamed.budget) if isinstance(streamed.budget, int) else streamed.budget
    if resident is not None:
        print(f"resident    {resident.seconds:.2f} s, all weights on the device")
    print(f"streamed    {streamed.seconds:.2f} s, vram_budget {size}")
    print(f"  loads     {stats.num_loads} ({format_bytes(stats.loaded_bytes)}), {stats.num_demand_loads} not foreseen")
    print(f"  stalls    {stats.num_stalls} ({stats.stall_ms:.1f} ms{', simulated' if is_simulated else ''})")
    print(f"  enter     {stats.enter_s:.2f} s, exit {stats.exit_s:.2f} s")
    print("with a call to warm up before it:")
    for line in streamed.report.splitlines():
        print(f"  {line}".rstrip())
    if is_simulated:
        print("These times are of a simulated device (host memory, no bus): they say nothing about a GPU.")
    print()
