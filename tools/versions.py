"""Runs the quick tests with the oldest and newest Python, torch and diffusers, and writes docs/versions.md.

`python -m tools.versions` for all, `python -m tools.versions oldest` for some, `--list` for their names. Each set of
versions has an environment of its own in `.versions`, which is brought up to date when its requirements have changed.
Rows of sets that are not asked for keep their last result.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENVIRONMENTS = ROOT / ".versions"
PAGE = ROOT / "docs" / "versions.md"
SHOWN = ("torch", "diffusers", "transformers", "peft")

# What differs between versions of torch, diffusers and Python is how modules, tensors and hooks behave: binding, absent
# tensors, interception, compiling, whole calls. What is pure, such as the planner, is left out.
TESTS = (
    "tests/test_public_api.py",
    "tests/test_binding.py",
    "tests/test_absent.py",
    "tests/test_compiled.py",
    "tests/test_compile_streaming.py",
    "tests/test_simulated.py",
    "tests/test_host_store.py",
    "tests/test_lane.py",
    "tests/test_edits.py",
    "tests/test_references.py",
    "tests/test_changes.py",
    "tests/test_changes_lora.py",
    "tests/test_cli.py",
    "tests/test_pipelines.py",
    # transformers moves the parts of its encoders about
    "tests/test_entry_points.py::test_a_part_of_a_text_encoder",
    "tests/test_entry_points.py::test_blocks_driven_from_outside",
    "tests/test_entry_points.py::test_clip_skip",
    "tests/test_entry_points.py::test_skipped_layers",
    "tests/test_entry_points.py::test_weights_read_between_calls",
)
# Of those: budgets, sizes and a check of the tests themselves, which are alike whatever the versions, and take long.
NOT_TESTS = (
    "tests/test_pipelines.py::test_the_budget_holds",
    "tests/test_pipelines.py::test_any_budget_any_sizes_in_one_context",
    "tests/test_changes.py::test_a_change_that_does_not_fit_the_budget_ends_streaming",
    "tests/test_public_api.py::test_the_import_check_can_fail",
)
# Of tests that run once for each tiny pipeline: these, one of each kind of denoiser.
PIPELINES = ("sd3", "flux", "qwen_image", "wan22", "sdxl_img2img", "pixart")
TOOLS = ("pytest", "pytest-timeout", "hypothesis", "psutil")
HEAD = """# Versions

`make versions` runs the quick part of the tests in an environment for each row and writes this page. The part takes
what differs between versions, namely how modules, tensors and hooks behave: binding, absent tensors, host memory,
compiling, whole calls, changes and edits while streaming, parts that are called directly, and of the tests that run for
each pipeline those of {pipelines}. Warnings of other versions' own
code are no errors there. A pipeline that a version does not have yet is skipped. No row uses a GPU: tests run on the
simulated device, whatever build of torch pip takes. `make test` runs everything with the versions of `constraints.txt`.

| set | Python | torch | diffusers | transformers | peft | result | date |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class VersionSet:
    """What is installed for one row.

    Attributes:
        python: such as "3.10".
        why: which bound the row is.
        pins: what is installed beside `TOOLS`, exact.
    """

    python: str
    why: str
    pins: tuple[str, ...]


_NEWEST = (
    *("torch==2.14.1", "diffusers==0.42.1", "transformers==5.23.0", "accelerate==1.15.0", "safetensors==0.8.0"),
    *("peft==0.21.2", "sentencepiece==0.2.3", "Pillow==13.0.0"),
)
SETS = {
    "oldest": VersionSet(
        "3.10",
        "the lower bounds of pyproject.toml",
        (
            *("torch==2.6.0", "diffusers==0.35.0", "transformers==4.56.0", "accelerate==1.0.0", "safetensors==0.4.5"),
            *("peft==0.17.0", "sentencepiece==0.2.0", "protobuf==4.25.8", "Pillow==10.0.0"),
            "ftfy==6.3.1",  # Wan's pipeline of diffusers 0.35 needs it
        ),
    ),
    "oldest torch": VersionSet(
        "3.10",
        "the oldest Python and torch, with the newest diffusers and transformers that install beside them",
        (
            *("torch==2.6.0", "diffusers==0.41.0", "transformers==5.20.2", "accelerate==1.15.0", "safetensors==0.8.0"),
            *("peft==0.21.2", "sentencepiece==0.2.3", "protobuf==4.25.8", "Pillow==10.0.0"),
        ),
    ),
    "newest": VersionSet("3.13", "the newest of everything that is of use together", _NEWEST),
    "Python 3.14": VersionSet("3.14", "the next Python", _NEWEST),
}
# What is published and in no row, with the reason.
LEFT_OUT = (
    "transformers 5.24: it installs, but loads adapters only with peft 0.22, which is not published yet.",
    "torch 2.15: what it requires conflicts with itself on the index (2026-11-28); its row of 2026-11-25 had no other "
    "failures than those of reference counts, which are mended.",
    "diffusers 0.42 with Python 3.10: published for Python 3.11 and newer only.",
)


class NotRunError(Exception):
    """Why a set could not be run."""


def find_python(version: str) -> Path:
    """An interpreter of this version: on the path, or among pyenv's.

    Raises:
        NotRunError: there is none.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    named = shutil.which(f"python{version}")
    for python in [*sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True), *([Path(named)] if named else [])]:
        if _is_python(python, version):
            return python
    raise NotRunError(f"not run: no Python {version} was found on the path or in pyenv")


def _is_python(python: Path, version: str) -> bool:
    if not python.is_file():
        return False
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return done.returncode == 0 and done.stdout.strip() == version


def environment(name: str, wanted: VersionSet) -> Path:
    """The interpreter of the set's environment, made or brought up to date where needed.

    Raises:
        NotRunError: there is no such Python, or the versions do not install together.
    """
    folder = ENVIRONMENTS / _file_name(name)
    python = folder / "bin" / "python"
    if not _is_python(python, wanted.python):  # otherwise kept: torch with CUDA takes gigabytes
        subprocess.run([str(find_python(wanted.python)), "-m", "venv", "--clear", str(folder)], check=True)
    requirements = [*wanted.pins, *TOOLS]
    if not _is_installed(requirements, python):
        command = [str(python), "-m", "pip", "install", "--quiet", *requirements]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise NotRunError(f"not run: does not install ({errors[0] if errors else 'see pip'})")
    return python


def _is_installed(requirements: Sequence[str], python: Path) -> bool:
    found = {_normal(name): version.partition("+")[0] for name, version in installed_in(python).items()}
    wanted = dict(requirement.partition("==")[::2] for requirement in requirements)
    return all(_normal(name) in found and version in ("", found[_normal(name)]) for name, version in wanted.items())


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_in(python: Path) -> dict[str, str]:
    """The versions of all packages in the environment of `python`, and of Python itself."""
    code = (
        "import json, platform; from importlib.metadata import distributions; "
        "print(json.dumps({d.metadata['Name']: d.version for d in distributions()}"
        " | {'Python': platform.python_version()}))"
    )
    done = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def run_tests(name: str, python: Path) -> str:
    """Run the quick tests; how many passed, failed and so on, and the names of those that failed."""
    plugins = ("-p", "no:cacheprovider", "-p", "tools.quick_pipelines")
    left_out = [f"--deselect={test}" for test in NOT_TESTS]
    command = [str(python), "-m", "pytest", "-q", "-W", "default", *plugins, *left_out, *TESTS]
    log = ENVIRONMENTS / f"{_file_name(name)}.log"
    with log.open("w") as output:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return result_of(log.read_text(), done.returncode)


def result_of(printed: str, code: int) -> str:
    """What pytest printed and its exit code, as a cell of the table."""
    lines = printed.strip().splitlines()
    counts = re.findall(r"\d+ (?:passed|failed|skipped|xfailed|xpassed|errors?)\b", lines[-1] if lines else "")
    if not counts or code not in (0, 1):
        return f"stopped with exit code {code}"
    failed = dict.fromkeys(re.findall(r"^(?:FAILED|ERROR) \S+?::(\S+)", printed, flags=re.MULTILINE))
    named = ", ".join(f"`{test}`" for test in failed).replace("|", r"\|")  # a bar would end the cell
    return ", ".join(counts) + (f": {named}" if named else "")


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())


def row(name: str, wanted: VersionSet) -> str:
    """Run one set; its line of the table."""
    try:
        python = environment(name, wanted)
        found = installed_in(python)
        result = run_tests(name, python)
    except NotRunError as error:
        found, result = {"Python": wanted.python, **dict.fromkeys(SHOWN, "-")}, str(error)
    shown = [found["Python"], *(found[library] for library in SHOWN)]
    return "| " + " | ".join([name, *shown, result, date.today().isoformat()]) + " |"


def write_page(rows: dict[str, str], page: Path) -> None:
    """Write the page with these lines in the order of `SETS`; lines of other sets stay as they are."""
    kept = page.read_text().splitlines() if page.is_file() else []
    before = {line.split(" | ")[0].removeprefix("| "): line for line in kept if line.startswith("| ")}
    lines = [rows.get(name) or before.get(name) for name in SETS]
    why = "\n".join(f"- *{name}*: {wanted.why}." for name, wanted in SETS.items())
    table = "\n".join(line for line in lines if line)
    left_out = "\n".join(f"- {told}" for told in LEFT_OUT)
    head = HEAD.format(pipelines=", ".join(PIPELINES))
    page.write_text(f"{head}{table}\n\n{why}\n\nIn no row:\n\n{left_out}\n")


def main(arguments: Sequence[str]) -> int:
    """Run the sets named; 0 if all passed or could not be run, 1 if tests failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.versions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="SET", help="(default: all)")
    parser.add_argument("--list", action="store_true", help="the sets' names, and stop")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(SETS):
        parser.error(f"no set is named {', '.join(sorted(unknown))}; there are {', '.join(SETS)}")
    if options.list:
        print("\n".join(SETS))
        return 0
    ENVIRONMENTS.mkdir(exist_ok=True)
    rows = {}
    for name in options.names or SETS:
        rows[name] = row(name, SETS[name])
        print(rows[name], flush=True)
        write_page(rows, PAGE)
    return 1 if any(re.search(r"\d (failed|error)|stopped", line) for line in rows.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
