"""The matrix of versions takes what it says, and its page tells what was run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from layerstream.standins import TINY_PIPELINES
from tools import versions

PYTHON = "{}.{}".format(*sys.version_info)


def test_the_oldest_set_is_the_lower_bounds_of_the_project() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    project = tomllib.loads((versions.ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    oldest = dict(pin.lower().split("==") for pin in versions.SETS["oldest"].pins)
    for requirement in [*project["dependencies"], *extras["diffusers"], *extras["demo"]]:
        if not requirement.startswith("layerstream"):
            name, bound = requirement.lower().split(">=")
            assert re.match(rf"{re.escape(bound)}(\.|$)", oldest[name]), requirement
    assert project["requires-python"] == f">={versions.SETS['oldest'].python}"


def test_every_version_of_every_set_is_pinned() -> None:
    pins = [pin for wanted in versions.SETS.values() for pin in wanted.pins]
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z]+==[0-9.]+", pin)] == []
    for wanted in versions.SETS.values():
        assert set(versions.SHOWN) <= {pin.partition("==")[0] for pin in wanted.pins}


@pytest.mark.parametrize("test", [*versions.TESTS, *versions.NOT_TESTS])
def test_the_quick_tests_exist(test: str) -> None:
    path, _, function = test.partition("::")
    assert f"def {function}" in (versions.ROOT / path).read_text()


def test_the_quick_pipelines_exist() -> None:
    assert set(versions.PIPELINES) < set(TINY_PIPELINES)


TEST_FILE = """
import pytest

@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", ["sd3", "ovis", "no pipeline"])
def test_parameters(name, number): pass

def test_without(): pass
"""


def test_tests_of_other_pipelines_are_left_out(tmp_path: Path) -> None:
    assert "sd3" in versions.PIPELINES
    assert "ovis" in set(TINY_PIPELINES) - set(versions.PIPELINES)
    (tmp_path / "test_some.py").write_text(TEST_FILE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tools.quick_pipelines"]
    environment = {**os.environ, "PYTHONPATH": str(versions.ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert "5 passed, 2 deselected" in done.stdout


@pytest.mark.parametrize(
    ("printed", "code", "result"),
    [
        ("..s [100%]\n= 2 passed, 1 skipped, 4 deselected, 5 warnings in 3.20s (0:00:03) =", 0, "2 passed, 1 skipped"),
        (
            "FAILED tests/test_a.py::test_b[x-min] - ValueError: 1\nERROR tests/test_a.py::test_b[x-min]\n"
            "ERROR tests/test_a.py::test_c[x|y]\n"
            "1 failed, 2 passed, 1 error in 3s",
            1,
            "1 failed, 2 passed, 1 error: `test_b[x-min]`, `test_c[x\\|y]`",
        ),
        ("....F..", -9, "stopped with exit code -9"),
        ("", 4, "stopped with exit code 4"),
        ("2 errors in 3.20s", 2, "stopped with exit code 2"),
    ],
)
def test_what_pytest_says_becomes_a_cell(printed: str, code: int, result: str) -> None:
    assert versions.result_of(printed, code) == result


def test_a_python_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setattr(versions, "ENVIRONMENTS", tmp_path)
    line = versions.row("next", versions.VersionSet("3.99", "none yet", ("torch==9.9",)))
    assert line.startswith("| next | 3.99 | - | - | - | - | not run: no Python 3.99 was found")


def test_an_environment_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(versions, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(versions, "TOOLS", ("pip",))
    monkeypatch.setattr(versions, "find_python", lambda version: Path(sys.executable))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(versions.NotRunError, match=r"not run: does not install \(ERROR: .*no-such-package"):
        versions.environment("One Set", versions.VersionSet(PYTHON, "", ("no-such-package==1",)))
    python = tmp_path / "one-set" / "bin" / "python"
    kept = tmp_path / "one-set" / "kept"
    kept.touch()
    pip = versions.installed_in(python)["pip"]
    # The right Python is there, so that it is not made anew; and nothing has to be installed.
    assert versions.environment("One Set", versions.VersionSet(PYTHON, "", (f"Pip=={pip}",))) == python
    assert kept.exists()
    with pytest.raises(versions.NotRunError, match="does not install"):
        versions.environment("One Set", versions.VersionSet(PYTHON, "", (f"Pip=={pip}.1",)))


def test_rows_that_did_not_run_stay(tmp_path: Path) -> None:
    page = tmp_path / "versions.md"
    first, second, *_ = versions.SETS
    versions.write_page({first: f"| {first} | old |", second: f"| {second} | old |"}, page)
    versions.write_page({second: f"| {second} | new |"}, page)
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ") and "Python" not in line]
    assert rows == [f"| {first} | old |", f"| {second} | new |"]


def test_the_page_is_of_the_sets_of_today(tmp_path: Path) -> None:
    again = tmp_path / "versions.md"
    again.write_text(versions.PAGE.read_text())
    versions.write_page({}, again)
    assert again.read_text() == versions.PAGE.read_text()
    lines = [line.strip("| ").split(" | ") for line in versions.PAGE.read_text().splitlines() if line.startswith("| ")]
    header, rows = lines[0], {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[1:]}
    assert header == ["set", "Python", *versions.SHOWN, "result", "date"]
    assert list(rows) == list(versions.SETS)
    for name, wanted in versions.SETS.items():
        assert rows[name]["Python"].startswith(wanted.python)
        if not rows[name]["result"].startswith("not run"):
            pins = dict(pin.split("==") for pin in wanted.pins)
            for library in versions.SHOWN:
                assert rows[name][library].partition("+")[0] == pins[library], (name, library)
