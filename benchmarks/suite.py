"""Named sets of measurements, each in a process of its own, with results written as they come.

What a worker process does not give back in time is a record with the error, and the others go on. Workers are forked
from a server that has imported the libraries, so that each begins in a second rather than in half a minute.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import queue
import re
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from benchmarks import cell as measuring
from benchmarks import repeats
from benchmarks.cases import FORMS, WITH_PEERS, Form, is_shared
from benchmarks.cell import Cell
from benchmarks.methods import METHODS, OURS
from benchmarks.records import FACTS, NOT_BEGUN, Record, are_good
from benchmarks.results import write

# What the server imports before it forks, by the case.
_PRELOADED = ("benchmarks.cell", "diffusers.hooks", "transformers.models.t5.modeling_t5")
_PRELOADED_FOR = {
    "sd35m": ("diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",),
    "ovis": ("diffusers.pipelines.ovis_image.pipeline_ovis_image",),
    "longcat": ("diffusers.pipelines.longcat_image.pipeline_longcat_image",),
    "longcat-rewrite": ("diffusers.pipelines.longcat_image.pipeline_longcat_image",),
    "nextstep": ("layerstream.standins.repository.autoregressive.nextstep.build",),
    "nextstep-static": ("layerstream.standins.repository.autoregressive.nextstep.build",),
    "mammoth": ("layerstream.standins.repository.autoregressive.mammoth.build",),
    "glm": (
        "diffusers.pipelines.glm_image.pipeline_glm_image",
        "transformers.models.glm_image.modeling_glm_image",
    ),
    "qwen": ("diffusers.models.transformers.transformer_qwenimage",),
    "wan22": ("diffusers.models.transformers.transformer_wan",),
}
_TELL, _FRAMES = signal.SIGUSR1, 4  # asks a worker where it is, and how much of that is told
_PREPARING_SECONDS = 300.0  # limit of drawing and writing a case's weights; large ones take half a minute
_SWEEP = ("min", "4GiB", "6GiB", "8GiB", "10GiB", "12GiB", "auto")
_PIPELINE_SWEEP = ("6GiB", "10GiB", "auto")  # whole calls take long; `-sweep` has all
# Where peers take a budget: what ours is compared with at like memory.
_PEER_BUDGETS = {"sd35m": ("2GiB",), "ovis": ("5GiB", "10GiB"), "longcat": ("4GiB", "10GiB")}
# Suites of what takes long and has no peers here: resident once, and the budgets that say most.
_OURS: Mapping[str, tuple[str, Form, Sequence[str]]] = {
    "nextstep-static-tokens": ("nextstep-static", "pipeline", ("6GiB", "16GiB", "auto")),
    "nextstep-tokens": ("nextstep", "pipeline", ("6GiB", "16GiB", "24GiB", "auto")),
    "mammoth-call": ("mammoth", "pipeline", ("12GiB", "24GiB")),
    "glm-call": ("glm", "pipeline", ("12GiB", "24GiB")),
    "qwen-denoiser": ("qwen", "denoiser", ("12GiB", "24GiB")),
    "sd15-denoiser": ("sd15", "denoiser", ("min", "auto")),
    "wan22-denoiser": ("wan22", "denoiser", ("12GiB",)),
    "longcat-rewrite": ("longcat-rewrite", "pipeline", ("12GiB",)),
}
# Where a step's two passes are paired, and what the bus leaves of it: by case and form, the budgets.
_PAIRS: Mapping[tuple[str, Form], Sequence[str]] = {
    ("ovis", "denoiser"): ("min", "5GiB", "6GiB"),
    ("longcat", "denoiser"): ("min", "4GiB", "5GiB"),
    ("ovis", "pipeline"): ("4GiB", "6GiB"),
    ("longcat", "pipeline"): ("4GiB", "6GiB"),
    ("qwen", "denoiser"): ("12GiB",),
    ("wan22", "denoiser"): ("8GiB",),
}
# Packed, and beside the same raw: by case and form, the method and its budgets.
_PACKED: Mapping[tuple[str, Form], Sequence[tuple[str, str]]] = {
    ("ovis", "denoiser"): [
        ("packed", "min"),
        ("packed", "8GiB"),
        ("packed_auto", "8GiB"),
        ("layerstream", "8GiB"),
        ("packed_paired", "min"),
    ],
    ("longcat", "denoiser"): [("packed", "min"), ("packed", "7GiB"), ("layerstream", "7GiB"), ("packed_paired", "min")],
    ("sd35m", "denoiser"): [("packed", "min"), ("packed", "2GiB"), ("layerstream", "2GiB")],
    ("qwen", "denoiser"): [("packed_paired", "8GiB"), ("packed_paired", "12GiB")],
    ("nextstep", "pipeline"): [("packed", "6GiB"), ("packed", "16GiB"), ("packed", "24GiB")],
    ("glm", "pipeline"): [("packed", "12GiB")],
    ("mammoth", "pipeline"): [("packed", "12GiB")],
    ("sd35m", "pipeline"): [("packed", "4GiB"), ("packed", "6GiB")],
    ("ovis", "pipeline"): [
        ("packed_paired", "6GiB"),
        ("packed_paired", "4GiB"),
        ("packed", "6GiB"),
        ("packed", "4GiB"),
    ],
    ("longcat", "pipeline"): [
        ("packed_paired", "6GiB"),
        ("packed_paired", "4GiB"),
        ("packed", "6GiB"),
        ("packed", "4GiB"),
    ],
}
# From another GPU's memory, and beside the same from the host.
_STORED: Mapping[tuple[str, Form], Sequence[tuple[str, str]]] = {
    ("ovis", "denoiser"): [("stored", "min"), ("stored", "3GiB"), ("stored_apart", "min"), ("layerstream", "min")],
    ("longcat", "denoiser"): [("stored", "min"), ("stored", "3GiB"), ("stored_apart", "min"), ("layerstream", "min")],
    ("nextstep", "pipeline"): [("stored", "6GiB")],
}
# Over two links, and beside the same over one.
_LINKS: Mapping[tuple[str, Form], Sequence[tuple[str, str]]] = {
    ("ovis", "denoiser"): [("links", "min"), ("links_packed", "min"), ("layerstream", "min")],
    ("longcat", "denoiser"): [("links", "min"), ("links_packed", "min"), ("layerstream", "min")],
}
# Two replicas, and one alone.
_REPLICAS: Mapping[tuple[str, Form], Sequence[tuple[str, str]]] = {
    ("ovis", "denoiser"): [("layerstream", "6GiB"), ("replicas", "6GiB")],
}
# Slow ones last, where a limit of time ends.
_PEERS = ("vllm_omni", "flextensor", "mmgp", "model_offload", "diffusers_leaf", "diffusers_block", "sequential")


class Entry(NamedTuple):
    """A measurement of a suite."""

    case: str
    form: Form
    method: str
    vram_budget: str | None = None
    is_mapped: bool = False


def suites() -> dict[str, list[Entry]]:
    """Measurements by the name of the suite. Resident comes first of each case and form, and last with peers."""
    found: dict[str, list[Entry]] = {}
    for case in WITH_PEERS:
        quick, whole = [], []
        for form in FORMS:
            resident = [Entry(case, form, "resident")]
            sweep = [Entry(case, form, "layerstream", budget) for budget in _SWEEP]
            like_peers = [Entry(case, form, "layerstream", budget) for budget in _PEER_BUDGETS[case]]
            mapped = [Entry(case, form, "layerstream", "6GiB", is_mapped=True)]
            peers = [
                Entry(case, form, name, budget)
                for name in _PEERS
                if form in METHODS[name].forms
                for budget in _budgets_of(name, case, form)
            ]
            ours = [*sweep, *(entry for entry in like_peers if entry not in sweep), *mapped]
            if form == "pipeline":
                ours = [Entry(case, form, "layerstream", budget) for budget in _PIPELINE_SWEEP]
            found[f"{case}-{form}"] = [*resident, *ours, *peers, *resident]
            found[f"{case}-{form}-sweep"] = [*resident, *sweep, *resident]
            found[f"{case}-{form}-peers"] = [*resident, *like_peers, *peers, *resident]
            quick += [*resident, Entry(case, form, "layerstream", "6GiB"), *resident]
            whole += found[f"{case}-{form}"]
        found[f"{case}-quick"] = quick
        found[case] = whole
    for (case, form), budgets in _PAIRS.items():
        resident, paired = Entry(case, form, "resident"), [Entry(case, form, "paired", budget) for budget in budgets]
        found[f"{case}-{form}-pairs"] = [resident, *paired, resident]
    kinds = {"packed": _PACKED, "stored": _STORED, "links": _LINKS, "replicas": _REPLICAS}
    for kind, measured in kinds.items():
        for (case, form), each in measured.items():
            resident = Entry(case, form, "resident")
            found[f"{case}-{form}-{kind}"] = [resident, *(Entry(case, form, *one) for one in each), resident]
    for form in FORMS:
        found[f"{form}s"] = [entry for case in WITH_PEERS for entry in found[f"{case}-{form}"]]
    for name, (case, form, budgets) in _OURS.items():
        resident = Entry(case, form, "resident")
        found[name] = [resident, *(Entry(case, form, "layerstream", budget) for budget in budgets)]
    return found


def _budgets_of(peer: str, case: str, form: Form) -> Sequence[str | None]:
    """Those that a peer is given; one, where a whole call takes long, and of mmgp, which takes as long under any."""
    if not METHODS[peer].takes_budget:
        return (None,)
    return _PEER_BUDGETS[case] if (peer, form) == ("flextensor", "denoiser") else _PEER_BUDGETS[case][-1:]


def run(
    cells: Sequence[Cell],
    *,
    topic: str,
    command: str,
    output: Path,
    cell_seconds: float,
    seconds: float | None = None,
    tell: Callable[[str], None] = print,
) -> list[Record]:
    """Measure the cells one after another; the files in `output` are whole after each.

    Args:
        cell_seconds: after so long a measurement is ended, and is a record with that error.
        seconds: for all of them but the last resident ones; what would begin later is a record with that error.
    """
    started = time.monotonic()
    done: list[Record] = []
    context = _server(tuple(dict.fromkeys(cell.case for cell in cells)))
    # Case by case: the weights of one at a time are large enough.
    by_case = {case: [c for c in cells if c.case == case] for case in dict.fromkeys(c.case for c in cells)}
    for of_case in by_case.values():
        with tempfile.TemporaryDirectory(dir=_fast_folder(), prefix="bench-") as home:
            # What is the denoiser alone is the pipeline's denoiser, too.
            most = max(of_case, key=lambda cell: cell.form == "pipeline")
            missing = None
            try:
                if is_shared(most.case) or any(cell.is_mapped for cell in of_case):
                    _in_process(context, measuring.prepare, (replace(most, folder=home),), _PREPARING_SECONDS)
            except _WorkerError as exc:
                missing = f"no weights could be made: {exc}"
            last = {cell.form: cell for cell in of_case}
            first = {cell.form: cell for cell in reversed(of_case)}
            for each in of_case:
                left = None if seconds is None else seconds - (time.monotonic() - started)
                is_last_resident = each is last[each.form] and each.method == "resident"  # ratios are to both
                is_last_resident &= each is not first[each.form]  # where it is measured once, nothing follows in time
                placed = replace(each, folder=home)
                if missing is not None:
                    record = _failed(placed, command, missing, done)
                elif left is not None and left <= 0 and not is_last_resident:
                    record = _failed(placed, command, f"{NOT_BEGUN}: the suite's {seconds:.0f} s were over", done)
                else:
                    limit = cell_seconds if left is None or is_last_resident else min(cell_seconds, left)
                    record = _one(context, placed, command, limit, done)
                record["cell_s"] = round(time.monotonic() - started - sum(r["cell_s"] for r in done), 1)
                done.append(record)
                rate(done)
                write(done, output, topic)
                tell(summary(record))
    return done


def rate(done: Sequence[Record]) -> None:
    """Give each record its ratio to the median of the resident measurements of its case and form (of two, the mean)."""
    for each in done:
        alike = [r for r in done if (r["case"], r["form"], r["method"]) == (each["case"], each["form"], "resident")]
        for name, ratio in (
            ("ms_per_pass", "ratio_to_resident"),
            ("seconds", "ratio_to_resident"),
            ("seconds_first_call", "ratio_first_call"),
        ):
            known = [r[name] for r in alike if r.get(name)]
            if known and each.get(name):
                each[ratio] = round(each[name] / statistics.median(known), 4)
    repeats.limit(done)


def summary(record: Record) -> str:
    """A line for the terminal."""
    budget = f" {record['vram_budget']}" if record.get("vram_budget") else ""
    budget += " mapped" if record.get("is_mapped") else ""
    head = f"{record['case']} {record['form']} {record['method']}{budget}:"
    if record.get("error"):
        return f"{head} {record['error']}"
    amount = f"{record['ms_per_pass']} ms a pass" if record["ms_per_pass"] else f"{record['seconds']} s a call"
    ratio = f", {record['ratio_to_resident']} x" if record.get("ratio_to_resident") else ""
    if record.get("token_s"):
        amount += f", {record['token_s']:.4f} s a token"
        ratio += f", tokens {record['token_ratio']} x" if record.get("token_ratio") else ""
    for kind in (*repeats.KINDS, "call"):
        ratio += f", {record[f'{kind}_of_limit']} x the limit of a {kind}" if record.get(f"{kind}_of_limit") else ""
    peak = f", {record['peak_reserved_bytes'] / 1e9:.2f} GB reserved" if record.get("peak_reserved_bytes") else ""
    return f"{head} {amount}{ratio}{peak}, enter {record['enter_s']} s, equal {record['equal']}"


def are_all_good(records: Sequence[Record]) -> bool:
    """Whether all ran and nothing differed. A peer that cannot run here is no failure of the harness."""
    return are_good([r for r in records if r["method"] in ("resident", *OURS)]) and all(
        r["equal"] is not False for r in records
    )


def refusal(cell: Cell) -> str | None:
    """Why our plan for this cell does not fit its budget; None if it does, as far as it can be known before it runs."""
    answer: str | None = _in_process(_server((cell.case,)), measuring.refusal, (cell,), seconds=120)
    return answer


# ---- processes


@functools.cache
def _server(cases: tuple[str, ...]) -> Any:
    """Where workers come from: a fork server, unless a process forked from it cannot use the GPU."""
    # To ask whether there is a GPU initialises CUDA, unless torch asks the management library; no fork survives that.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOADED, *(name for case in cases for name in _PRELOADED_FOR.get(case, ()))])
    if torch.cuda.is_available():
        try:
            _in_process(context, _touch_gpu, (), seconds=120)
        except _WorkerError:
            return multiprocessing.get_context("spawn")
    return context


def _touch_gpu() -> None:
    torch.zeros(1, device="cuda")


def _one(context: Any, each: Cell, command: str, seconds: float, done: Sequence[Record]) -> Record:
    try:
        record: Record = _in_process(context, measuring.measure, (each, command), seconds)
    except _WorkerError as exc:
        record = _failed(each, command, str(exc), done)
    return record


class _WorkerError(Exception):
    """A worker gave nothing back."""


def _in_process(context: Any, function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> Any:
    """`function(*arguments)` in a process of its own.

    Raises:
        _WorkerError: it took longer than `seconds`, or the process died.
    """
    answers = context.Queue()
    with tempfile.NamedTemporaryFile("r", prefix="bench-", suffix=".stack") as stack:
        worker = context.Process(target=_work, args=(answers, stack.name, function, arguments))
        worker.start()
        end = time.monotonic() + seconds
        try:
            while True:
                try:
                    kind, answer = answers.get(timeout=0.1)
                    break
                except queue.Empty:
                    if time.monotonic() > end:
                        where = _whereabouts(worker, stack)
                        worker.kill()
                        raise _WorkerError(f"ended after {seconds:.0f} s{where}") from None
                    if not worker.is_alive() and answers.empty():
                        raise _WorkerError(f"the process died (exit code {worker.exitcode})") from None
        finally:
            worker.join(timeout=5)  # it also gives its memory back
            if worker.is_alive():
                worker.kill()
                worker.join()
    if kind == "error":
        raise _WorkerError(answer)
    return answer


def _whereabouts(worker: Any, stack: IO[str]) -> str:
    """The innermost calls of a worker that has not answered, as ", in f (a.py:1), in g (b.py:2)"; "" if unknown."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker.pid, _TELL)
    time.sleep(1.0)  # a handler in C writes it, whatever the worker's Python waits for
    frames = re.findall(r'File "(?:.*/)?(.+)", line (\d+) in (.+)', stack.read())
    return "".join(f", in {name} ({file}:{line})" for file, line, name in frames[:_FRAMES])


def _work(answers: Any, stack: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    faulthandler.register(_TELL, Path(stack).open("w"), all_threads=False)  # noqa: SIM115 (as long as this process lives)
    try:
        answers.put(("answer", function(*arguments)))
    except Exception as exc:
        answers.put(("error", repr(exc)[:1000]))
    answers.close()
    answers.join_thread()
    os._exit(0)  # the next one waits for this one's memory, which the system takes back faster by itself


def _failed(each: Cell, command: str, error: str, done: Sequence[Record]) -> Record:
    """The record of a measurement that gave none; what is known of the machine is taken from those before it."""
    known = {name: done[0][name] for name in FACTS if name in done[0]} if done else {}
    return {**measuring.empty_record(each, command), **known, "error": error}


def _fast_folder() -> str | None:
    """Memory, where there is enough for a case; else where temporary files are."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 40e9 else None


def expand(
    name: str, methods: Sequence[str] | None = None, budgets: Sequence[str] | None = None, **common: Any
) -> Iterator[Cell]:
    """The cells of the suite `name`; only those of `methods`, and of these `budgets` or without one, if given."""
    for entry in suites()[name]:
        is_method = methods is None or entry.method in (*methods, "resident")
        if is_method and (budgets is None or entry.vram_budget is None or entry.vram_budget in budgets):
            yield Cell(entry.case, entry.form, entry.method, "", entry.vram_budget, is_mapped=entry.is_mapped, **common)


def together(
    names: Sequence[str], methods: Sequence[str] | None, budgets: Sequence[str] | None, **common: Any
) -> list[Cell]:
    """The cells of several suites: each once, between the resident ones of its case and form."""
    cells = [cell for name in names for cell in expand(name, methods, budgets, **common)]
    found: list[Cell] = []
    for case, form in dict.fromkeys((cell.case, cell.form) for cell in cells):
        alike = [cell for cell in cells if (cell.case, cell.form) == (case, form)]
        others = dict.fromkeys(cell for cell in alike if cell.method != "resident")
        last = alike[-1:] if alike[-1].method == "resident" and len(alike) > 1 else []
        found += [alike[0], *others, *last]
    return found


def in_turns(cells: Sequence[Cell], rounds: int) -> list[Cell]:
    """All of them so often, one round after another, each case and form by itself; what is resident at the end of a
    round is so at the next one's beginning, and runs once there."""
    found: list[Cell] = []
    for case, form in dict.fromkeys((cell.case, cell.form) for cell in cells):
        alike = [cell for cell in cells if (cell.case, cell.form) == (case, form)]
        for number in range(rounds):
            is_again = number > 0 and len(alike) > 1 and alike[0].method == alike[-1].method == "resident"
            found += [replace(cell, round=number) for cell in alike[int(is_again) :]]
    return found


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
