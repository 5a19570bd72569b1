"""Runs the quick tests with the oldest and newest Python, torch and diffusers, and writes docs/versions.md.

`python -m tools.versions` for all, `python -m tools.versions oldest` for some, `--list` for their names. Each set of
versions has an environment of its own in `.versions`, which is made anew when its requirements have changed. Rows of
sets that did not run keep their last result.
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
from dataclasses import dataclass, field
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
    "tests/test_streamer.py",
    "tests/test_calls.py",
    "tests/test_changes.py",
    "tests/test_changes_lora.py",
    "tests/test_cli.py",
    "tests/test_pipelines.py",
)
# Of tests that run once for each tiny pipeline: these, one of each kind of denoiser.
PIPELINES = ("sd3", "flux", "qwen_image", "wan22", "sdxl_img2img", "pixart", "glm_image")
TOOLS = ("pytest", "pytest-timeout", "hypothesis", "psutil")
HEAD = """# Versions

`make versions` runs the quick part of the tests in an environment for each row and writes this page. It takes engine,
binding, absent tensors, compiling, the simulated device, changes while streaming, the command line, and of the tests of
pipelines {pipelines}. Warnings of other versions' own code are no errors there. A pipeline that a version does not have
yet is skipped. Where pip offers only CUDA builds of torch, as on x86-64 Linux without another index, those ran, on
the CPU.

| set | Python | torch | diffusers | transformers | peft | result | date |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class VersionSet:
    """What is installed for one row.

    Attributes:
        python: such as "3.10".
        pins: what is installed beside `TOOLS`, exact.
        why: which bound the row is.
    """

    python: str
    why: str
    pins: tuple[str, ...] = field(default_factory=tuple)


SETS = {
    "oldest": VersionSet(
        "3.10",
        "the lower bounds of pyproject.toml",
        (
            *("torch==2.6.0", "diffusers==0.35.0", "transformers==4.56.0", "accelerate==1.0.0", "safetensors==0.4.5"),
            *("peft==0.17.0", "sentencepiece==0.2.0", "protobuf==4.25.8", "Pillow==10.0.0"),
        ),
    ),
    "newest for Python 3.10": VersionSet(
        "3.10",
        "the newest that still install with the oldest Python",
        ("torch==2.14.1", "diffusers==0.41.0", "transformers==5.20.2", "accelerate", "peft", "sentencepiece"),
    ),
    "last transformers 4": VersionSet(
        "3.12",
        "the last of transformers 4, which many pin",
        ("torch==2.9.1", "diffusers==0.36.0", "transformers==4.57.6", "accelerate", "peft", "sentencepiece"),
    ),
    "newest": VersionSet(
        "3.13",
        "the newest Python found, and the newest of everything",
        ("torch==2.15.0", "diffusers==0.42.1", "transformers==5.24.0", "accelerate", "peft", "sentencepiece"),
    ),
    "Python 3.14": VersionSet(
        "3.14",
        "the next Python",
        ("torch==2.15.0", "diffusers==0.42.1", "transformers==5.24.0", "accelerate", "peft", "sentencepiece"),
    ),
}


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
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == version:
            return python
    raise NotRunError(f"not run: no Python {version} on this machine")


def environment(name: str, wanted: VersionSet) -> Path:
    """The interpreter of the set's environment, made or made anew where needed.

    Raises:
        NotRunError: there is no such Python, or the versions do not install together.
    """
    folder = ENVIRONMENTS / re.sub(r"[^a-z0-9.]+", "-", name.lower())
    python = folder / "bin" / "python"
    made_of = folder / "requirements.json"
    requirements = [*wanted.pins, *TOOLS]
    if made_of.is_file() and json.loads(made_of.read_text()) == requirements:
        return python
    subprocess.run([str(find_python(wanted.python)), "-m", "venv", "--clear", str(folder)], check=True)
    command = [str(python), "-m", "pip", "install", "--quiet", *requirements]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise NotRunError(f"not run: does not install ({errors[0] if errors else 'see pip'})")
    made_of.write_text(json.dumps(requirements))
    return python


def versions_in(python: Path) -> dict[str, str]:
    """The installed versions of `SHOWN`, and of Python."""
    code = (
        "import json, platform; from importlib.metadata import version; "
        f"print(json.dumps({{'Python': platform.python_version(), **{{n: version(n) for n in {SHOWN!r}}}}}))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def run_tests(name: str, python: Path) -> str:
    """Run the quick tests; the last line of pytest without its time."""
    # Parameters that are other pipelines are left out, also in combination with further parameters.
    command = [
        str(python),
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
        "-p",
        "tools.quick_pipelines",
    ]
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = ENVIRONMENTS / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower())}.log"
    with log.open("w") as output:
        subprocess.run([*command, *TESTS], cwd=ROOT, env=settings, stdout=output, stderr=subprocess.STDOUT)
    last = log.read_text().strip().splitlines()[-1]
    return re.sub(r" in [\d.]+s.*$", "", last.strip("= "))


def row(name: str, wanted: VersionSet) -> str:
    """Run one set; its line of the table."""
    try:
        python = environment(name, wanted)
        found = versions_in(python)
        result = run_tests(name, python)
    except NotRunError as error:
        found, result = {"Python": wanted.python, **dict.fromkeys(SHOWN, "")}, str(error)
    shown = [found["Python"], *(found[library] for library in SHOWN)]
    return "| " + " | ".join([name, *shown, result, date.today().isoformat()]) + " |"


def write_page(rows: dict[str, str]) -> None:
    """Write the page with these lines in the order of `SETS`; lines of other sets stay as they are."""
    kept = PAGE.read_text().splitlines() if PAGE.is_file() else []
    before = {line.split(" | ")[0].removeprefix("| "): line for line in kept if line.startswith("| ")}
    lines = [rows.get(name) or before.get(name) for name in SETS]
    why = "\n".join(f"- *{name}*: {wanted.why}." for name, wanted in SETS.items())
    table = "\n".join(line for line in lines if line)
    PAGE.write_text(f"{HEAD.format(pipelines=', '.join(PIPELINES))}{table}\n\n{why}\n")


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
        write_page(rows)
    return 1 if any("failed" in line or "error" in line for line in rows.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
