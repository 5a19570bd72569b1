"""Private names of torch: each is there or can be gone without, and none is used anywhere else."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import layerstream
from layerstream.torch_private import NAMES, PrivateName

PACKAGE = Path(layerstream.__file__).parent
OWNER = "torch_private.py"
# Attributes of tensors and modules, not of torch: what every subclass of them sees.
_OF_OBJECTS = {"_version", "_cdata", "_parameters", "_buffers", "_modules", "_apply", "_is_view", "_base"}


def version() -> tuple[int, int]:
    major, minor = re.findall(r"\d+", torch.__version__)[:2]
    return int(major), int(minor)


def as_version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


@pytest.mark.parametrize("private", NAMES, ids=lambda private: private.name)
def test_each_is_there_in_the_versions_that_it_was_seen_in(private: PrivateName) -> None:
    assert private.what
    has_what_it_is_in = torch.version.cuda is not None or not private.is_of_cuda
    if has_what_it_is_in and as_version(private.since) <= version() <= as_version(private.until):
        assert private.find() is not None, f"{private.name} is gone: {private.without or 'nothing does without it'}"
    elif private.find() is None:
        assert private.without, f"{private.name} is gone, and nothing does without it"


def test_what_does_not_exist_is_not_found() -> None:
    assert PrivateName("torch._C._no_such_thing", "").find() is None
    assert PrivateName("torch._no_such.thing", "").find() is None


OPTIONAL = [each for each in NAMES if each.without and not each.is_of_cuda]


# Without these torch's own code does not run either.
_NEEDED_BY_TORCH = {
    "torch.nn.Module._wrapped_call_impl",
    "torch._C._dynamo.eval_frame.set_eval_frame",
    "torch.nn.modules.module._global_forward_hooks",
    "torch.nn.modules.module._global_forward_pre_hooks",
}


def test_the_engine_does_without_any_of_them() -> None:
    run_without(OPTIONAL)


@pytest.mark.slow
@pytest.mark.parametrize("private", OPTIONAL, ids=lambda private: private.name)
def test_the_engine_does_without_each(private: PrivateName) -> None:
    run_without([private])


def run_without(missing: list[PrivateName]) -> None:
    """Stream a model in a process of its own, in which torch has none of these names."""
    names = [each.name for each in missing if each.name not in _NEEDED_BY_TORCH]
    code = f"""
import warnings
import torch, torch._dynamo.eval_frame
warnings.simplefilter("error")
for name in {names}:
    *path, last = name.split(".")
    found = torch
    for part in path[1:]:
        found = getattr(found, part)
    if hasattr(found, last):
        delattr(found, last)
import layerstream
from layerstream.torch_private import NAMES
assert not [each.name for each in NAMES if each.name in {names} and each.find() is not None]
from tests.fakes import adversary, assert_equal, assert_restored, describe, run, toy, twin
model = toy()
expected, before = run(twin(model), 4), describe(model)
with layerstream.offload(model, vram_budget="min", device=adversary()), torch.no_grad():
    assert_equal(run(model, 4), expected)
assert_restored(model, before)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=PACKAGE.parent)


def private_names_in(source: str) -> Iterator[str]:
    """Chains such as `torch._C._x`, and imports such as `from torch._dynamo import y`, with a private part."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "torch")
        elif isinstance(node, ast.Attribute):
            chain = ast.unparse(node)
            if re.fullmatch(r"torch(\.\w+)+", chain):
                yield chain
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"torch(\.\w+)+", node.value)
        ):
            yield node.value


def is_private(name: str) -> bool:
    return any(
        part.startswith("_") and not part.startswith("__") and part not in _OF_OBJECTS for part in name.split(".")
    )


# A snapshot of the allocator is torch's documented format for its memory viewer.
_ALLOWED = {"torch.cuda.memory._snapshot"}


@pytest.mark.parametrize(
    "path", [path for path in sorted(PACKAGE.rglob("*.py")) if "standins" not in path.parts], ids=lambda path: path.name
)
def test_private_names_are_used_by_way_of_one_module(path: Path) -> None:
    if path.name != OWNER:
        found = {name for name in private_names_in(path.read_text()) if is_private(name)}
        assert not found - _ALLOWED, f"look these up in {OWNER}"


def test_the_scan_can_fail() -> None:
    for source in ("import torch\ntorch._C.x()", "from torch._dynamo import y", "import torch._inductor"):
        assert any(map(is_private, private_names_in(source)))
    assert not any(map(is_private, private_names_in("import torch\ntorch.nn.Module.__call__\nx._version")))
