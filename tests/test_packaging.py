"""What is shipped, what importing costs, and whether the documentation says what is there."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

import layerstream
from layerstream import standins
from layerstream.model.adapters import registry
from layerstream.standins import build_tiny, repository

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
HEAVY = ("diffusers", "transformers", "accelerate", "peft", "PIL", "torch._dynamo", "torch._inductor")
REPOSITORY = ROOT / "layerstream" / "standins" / "repository"
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


def run_without_numpy(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that finds no numpy, and in which warnings are errors."""
    program = f"import sys\nsys.path[:0] = [{str(ROOT)!r}]\nsys.modules['numpy'] = None\n{code}"
    command = [sys.executable, "-W", "error", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_importing_and_streaming_without_numpy_is_silent() -> None:
    done = run_without_numpy("""
import layerstream, torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

model, x = Model(), torch.ones(1, 64)
with torch.inference_mode():
    resident = model(x)
    with layerstream.offload(model, vram_budget="min", device="cpu") as streamer:
        print(torch.equal(model(x), resident), streamer.stats().num_loads > 3)
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True True\n", "")


def test_the_check_for_silence_can_fail() -> None:
    done = run_without_numpy("import torch")
    assert "Failed to initialize NumPy" in done.stderr
    assert done.returncode == 1


def test_licence_and_types_are_in_the_source() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert (Path(layerstream.__file__).parent / "py.typed").is_file()


def shipped() -> set[str]:
    """What the wheel should hold of the package, as paths from the root."""
    paths = [*(ROOT / "layerstream").rglob("*.py"), ROOT / "layerstream" / "py.typed"]
    return {path.relative_to(ROOT).as_posix() for path in paths if REPOSITORY not in path.parents}


@pytest.mark.slow
def test_wheel_and_source_distribution(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("build")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("layerstream", "tests", "benchmarks", "examples", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    # The wheel is built from the source distribution.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    (wheel,), (archive,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        texts = {n.rsplit("/")[-1]: opened.read(n).decode() for n in names if ".dist-info/" in n}
    assert {name for name in names if ".dist-info/" not in name} == shipped()
    assert "LICENSE" in texts
    assert "layerstream = layerstream.cli:main" in texts["entry_points.txt"]
    assert f"Version: {layerstream.__version__}\n" in texts["METADATA"]
    with tarfile.open(archive) as tar:
        members = {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}
    assert {name for name in members if name.endswith((".py", ".typed"))} == shipped()
    assert {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"} <= members


def test_stand_ins_of_the_repository_are_not_shipped() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    setuptools = pytest.importorskip("setuptools")
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packages = setuptools.find_packages(str(ROOT), **found)
    assert {name.replace(".", "/") for name in packages} == {str(Path(path).parent) for path in shipped()}
    assert "layerstream/standins/demo.py" in shipped()
    assert "layerstream/standins/repository/__init__.py" not in shipped()


def test_names_of_the_repository_are_found_in_a_checkout() -> None:
    assert sorted(standins._IN_REPOSITORY) == sorted(repository.__all__)
    for name in repository.__all__:
        assert getattr(standins, name) is getattr(repository, name)
    assert not hasattr(standins, "build_small")


def test_an_installed_package_says_what_is_only_in_the_repository(tmp_path: Path) -> None:
    for path in shipped():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}]
from layerstream.standins import *
from layerstream import standins
print(standins.__file__, build_demo.__name__)
try:
    from layerstream.standins import build_tiny
except ImportError as error:
    print(error)
try:
    standins.run_tiny
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    found, *errors = done.stdout.splitlines()
    assert found == f"{tmp_path / 'layerstream' / 'standins' / '__init__.py'} build_demo"
    assert [error.partition(" ")[0] for error in errors] == ["build_tiny", "run_tiny"]
    assert all("is only in the repository of layerstream" in e and "pip install --editable" in e for e in errors)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_need_no_checkout(path: Path) -> None:
    taken = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in taken if node.module == "layerstream.standins" for alias in node.names}
    assert names <= set(standins.__all__)
    assert "layerstream.standins.repository" not in path.read_text()


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
