"""Hooks and the release workflow run what the Makefile has, with the versions that constraints.txt pins."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def loaded(name: str) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / name).read_text())


def test_hooks_are_targets_of_the_makefile() -> None:
    (repository,) = loaded(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    assert set(hooks) == {"ruff", "ruff-format", "mypy"}
    for hook in hooks.values():
        make, _, target = hook["entry"].split()
        assert (make, hook["language"], hook["pass_filenames"]) == ("make", "system", False)
        assert target in TARGETS
        assert "additional_dependencies" not in hook


@pytest.mark.parametrize(("target", "tool"), [("rules", "ruff"), ("format", "ruff"), ("types", "mypy")])
def test_those_targets_run_the_pinned_tools(target: str, tool: str) -> None:
    recipe = re.search(
        rf"^{target}: \$\(INSTALLED\)\n\t\$\(BIN\)/python -m (\w+)", (ROOT / "Makefile").read_text(), re.M
    )
    assert recipe is not None
    assert recipe[1] == tool
    assert re.search(rf"^{tool}==[0-9.]+ ;", (ROOT / "constraints.txt").read_text(), re.M)


def test_a_release_passes_everything_before_it_is_published() -> None:
    workflow = loaded(".github/workflows/release.yml")
    check, publish = workflow["jobs"]["check"], workflow["jobs"]["publish"]
    runs = [step["run"] for step in check["steps"] if "run" in step]
    assert runs[0] == 'python -m tools.check_release "$GITHUB_REF_NAME"'
    (make,) = (run for run in runs if run.startswith("make "))
    assert set(make.split()[1:]) == {"test", "lint", "types", "wheel"}
    assert set(make.split()[1:]) <= TARGETS
    assert publish["needs"] == "check"
    assert publish["permissions"] == {"id-token": "write"}
    assert not [step for step in publish["steps"] if "run" in step], "what was tried is published as it is"
    # YAML reads `on` as true.
    assert workflow[True] == {"push": {"tags": ["v[0-9]+.[0-9]+.[0-9]+"]}}
