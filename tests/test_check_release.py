"""A release is refused unless tag, version and changelog agree."""

from __future__ import annotations

from pathlib import Path

import pytest

import layerstream
from tools import check_release

CHANGELOG = """# Changelog

Some words.

## [Unreleased]

## [0.2.0] - 2027-01-31

### Added

- Something.

## [0.1.0] - 2026-12-01

- The first.
"""


def project(root: Path, changelog: str = CHANGELOG, version: str = "0.2.0") -> Path:
    (root / "layerstream").mkdir()
    (root / "layerstream" / "_version.py").write_text(f'"""Words."""\n\n__version__ = "{version}"\n')
    (root / "CHANGELOG.md").write_text(changelog)
    return root


def test_a_release_whose_parts_agree_is_let_through(tmp_path: Path) -> None:
    assert check_release.problems(project(tmp_path), "v0.2.0") == []


@pytest.mark.parametrize(
    ("tag", "version", "old", "new", "problem"),
    [
        ("0.2.0", "0.2.0", "", "", "the tag '0.2.0' is not of the form v1.2.3."),
        ("v0.2", "0.2.0", "", "", "the tag 'v0.2' is not of the form"),
        ("v0.2.0", "0.1.0", "", "", "_version.py says 0.1.0, the tag 0.2.0."),
        ("v0.3.0", "0.3.0", "", "", "no entry for 0.3.0 (its latest release is 0.2.0)"),
        ("v0.1.0", "0.1.0", "", "", "no entry for 0.1.0 (its latest release is 0.2.0)"),
        ("v0.2.0", "0.2.0", "## [Unreleased]\n", "## [Unreleased]\n- More.\n", "has entries under Unreleased"),
        ("v0.2.0", "0.2.0", "## [Unreleased]\n", "", "does not begin with `## [Unreleased]`"),
        ("v0.2.0", "0.2.0", " - 2027-01-31", "", "gives 0.2.0 no date (it says None)"),
        ("v0.2.0", "0.2.0", "2027-01-31", "2027-02-31", "gives 0.2.0 no date (it says 2027-02-31)"),
        ("v0.2.0", "0.2.0", "2027-01-31", "20270131", "gives 0.2.0 no date (it says 20270131)"),
        ("v0.2.0", "0.2.0", "### Added\n\n- Something.\n", "", "says nothing about 0.2.0"),
        ("v0.2.0", "0.2.0", CHANGELOG.partition("## [0.2")[2], "", "it has no release"),
    ],
)
def test_what_does_not_agree_is_named(tmp_path: Path, tag: str, version: str, old: str, new: str, problem: str) -> None:
    assert old in CHANGELOG
    changelog = CHANGELOG.replace(old, new, 1) if old else CHANGELOG
    found = check_release.problems(project(tmp_path, changelog, version), tag)
    assert [p for p in found if problem in p], found


def test_the_projects_own_files_are_read() -> None:
    assert check_release.version_of(check_release.ROOT) == layerstream.__version__
    assert check_release.sections_of(check_release.ROOT)[0][0] == "Unreleased"


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_release.main([]) == 2
    assert "usage" in capsys.readouterr().err
    assert check_release.main(["v999.0.0"]) == 1
    assert f"says {layerstream.__version__}, the tag 999.0.0" in capsys.readouterr().err
