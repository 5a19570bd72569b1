"""What is shipped, what importing costs, and whether the documentation says what is there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import layerstream
from layerstream.adapters import registry
from layerstream.standins import build_tiny

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HEAVY = ("diffusers", "transformers", "accelerate", "peft", "PIL", "torch._dynamo", "torch._inductor")
NOT_RUN = "<!-- not run by the tests"


def heavy_after(code: str) -> list[str]:
    """The heavy modules that a fresh interpreter has after running `code`."""
    program = f"import sys\nsys.path[:0] = [{str(ROOT)!r}]\n{code}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return result.stdout.split()


def python_blocks(page: Path) -> list[str]:
    """The page's Python code, except blocks under a comment that says they are not run."""
    found = re.findall(r"(<!--[^\n]*-->\n)?```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return [code for comment, code in found if not comment.startswith(NOT_RUN)]


@pytest.mark.parametrize("code", ["import layerstream", "import layerstream.cli"])
def test_importing_is_light(code: str) -> None:
    assert heavy_after(code) == []


def test_the_check_of_imports_can_fail() -> None:
    assert "torch._dynamo" in heavy_after("import layerstream\nimport torch._dynamo")


def test_licence_and_types_are_in_the_source() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert (Path(layerstream.__file__).parent / "py.typed").is_file()


@pytest.mark.slow
def test_wheel(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "layerstream", source / "layerstream", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        texts = {n.rsplit("/")[-1]: archive.read(n).decode() for n in names if ".dist-info/" in n}
    for path in (ROOT / "layerstream").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names
    assert "layerstream/py.typed" in names
    assert "LICENSE" in texts
    assert "layerstream = layerstream.cli:main" in texts["entry_points.txt"]
    assert f"Version: {layerstream.__version__}\n" in texts["METADATA"]
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "examples/"))]


def test_everything_set_up_installs_is_pinned() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    lines = [s for s in (ROOT / "constraints.txt").read_text().splitlines() if not s.startswith("#")]
    pins = [re.fullmatch(r"([A-Za-z0-9._-]+)==[0-9a-z.]+( ; python_version >= \"3\.\d+\")?", s) for s in lines]
    assert all(pins), [s for s, pin in zip(lines, pins, strict=True) if not pin]
    pinned = {re.sub("[-_.]+", "-", pin[1]).lower() for pin in pins if pin}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras: dict[str, Any] = project["project"]["optional-dependencies"]
    wanted = [
        *project["project"]["dependencies"],
        *extras["diffusers"],
        *extras["demo"],
        *project["build-system"]["requires"],
    ]
    wanted += project["dependency-groups"]["dev"]
    names = {re.split(r"[\[<>=~!; ]", requirement)[0].lower() for requirement in wanted} - {"layerstream"}
    assert names <= pinned


def test_commands_in_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    code = "\n".join(s for found in re.findall(r"```sh\n(.*?)```|`([^`\n]+)`", readme, flags=re.DOTALL) for s in found)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = set(re.findall(r"\bmake ([a-z-]+)", code))
    assert {"demo", "test"} <= used <= targets
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == targets
    demos = [line for line in code.splitlines() if "layerstream demo" in line or line.startswith("--")]
    options = set(re.findall(r"--[a-z-]+", "\n".join(demos)))
    help_ = subprocess.run(
        [sys.executable, "-m", "layerstream", "demo", "--help"], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert options
    assert [option for option in options if option not in help_] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text()
    titles = {page.name: page.read_text().splitlines()[0].removeprefix("# ") for page in folder.glob("2*.md")}
    listed = {name: title for title, name in re.findall(r"^- \[(.+)\]\((.+)\)$", index, flags=re.MULTILINE)}
    assert titles
    assert listed == titles


def test_every_error_is_explained() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    public = [getattr(layerstream, name) for name in layerstream.__all__]
    errors = {e.__name__ for e in public if isinstance(e, type) and issubclass(e, Exception)}
    assert set(re.findall(r"^### (\w+)", page, flags=re.MULTILINE)) == errors - {"LayerstreamError"}


def test_the_adapter_of_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    (code,) = python_blocks(ROOT / "docs" / "adapters.md")
    _run(code, {})
    statement = re.search(
        r"^class Painter.*?^layerstream\.register_adapter[^\n]*$", code, flags=re.DOTALL | re.MULTILINE
    )
    assert statement is not None
    assert len(statement[0].splitlines()) < 20


def test_the_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    names: dict[str, Any] = {"pipe": build_tiny("sd3")}
    for code in python_blocks(ROOT / "docs" / "quickstart.md"):
        _run(code, names)
    out = capsys.readouterr().out
    assert "vram_budget 1000 B is too small" in out
    assert "blocks streamed, " in out
    assert "peak reserved" in out
    assert names["image"].size == (32, 32)


def _run(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, "<documentation>", "exec"), names)
