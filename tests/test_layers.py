"""Imports go one way. Read from the source with `ast`, so that imports inside functions count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import layerstream

PACKAGE = Path(layerstream.__file__).parent

# A module imports only from strictly lower ranks; the modules of one folder may import each other.
RANKS = {
    "errors": 0,
    "_import_torch": 0,
    "_version": 0,
    "allocator": 0,
    "batched_copy": 0,
    "host_memory": 0,
    "interrupts": 0,
    "torch_private": -1,
    "blocks": 1,
    "budget": 1,
    "stats": 1,
    "tables": 1,
    "pace": 1,
    "schedule": 1,
    "device": 1,
    "entrances": 1,
    "outputs": 1,
    "gate": 1,
    "profiling": 3,
    "timeline": 2,
    "comparing": 1,
    "progress": 1,
    "references": 1,
    "remembered": 1,
    "saying": 1,
    "standins": 1,
    "absent": 2,
    "calls": 1,
    "lane": 2,
    "compiled": 2,
    "order": 2,
    "page_locks": 2,
    "summary": 2,
    "simulated": 2,
    "standstill": 3,
    "binding": 3,
    "intercept": 3,
    "plan": 3,
    "arguments": 3,
    "phases": 4,
    "report": 4,
    "units": 4,
    "home": 4,
    "host_store": 5,
    "route": 5,
    "changes": 4,
    "ledger": 5,
    "timing": 5,
    "unit": 6,
    "adapters": 5,
    "attachments": 7,
    "edits": 7,
    "pipeline_watch": 5,
    "transfer": 7,
    "exchange": 8,
    "residency": 8,
    "phase_changes": 9,
    "replay": 9,
    "components": 6,
    "decorating": 6,
    "passes": 10,
    "hooks": 11,
    "streamer": 12,
    "api": 13,
    "demo": 14,
    "testing": 14,
    "cli": 15,
    "__init__": 16,
    "__main__": 16,
}
STANDS_FOR_TORCH = "torch_private"  # who may import torch may import it
# Not only lower ranks: nothing of the package at all but themselves.
ALONE = {"allocator", "host_memory", "errors", "_version", "blocks", "stats", "tables", "pace", "order", "absent"}
ALONE |= {
    "schedule",
    "torch_private",
    "_import_torch",
    "standins",
    "progress",
    "references",
    "comparing",
    "calls",
}
PURE = {
    "errors",
    "_version",
    "blocks",
    "budget",
    "stats",
    "tables",
    "summary",
    "pace",
    "order",
    "plan",
    "phases",
    "schedule",
}
PURE |= {"report"}
LIBRARIES = {"diffusers", "transformers"}
MAY_IMPORT_LIBRARIES = {"standins", "demo", "cli"}
ONLY_IN_THE_REPOSITORY = "layerstream.standins.repository"
WRITES_DATA = {"binding", "absent", "standins"}  # stand-ins are built, not streamed, there
NAMES_CUDA = {"device", "allocator", "torch_private"}


def part_of(module: str) -> str:
    """The entry in RANKS: `layerstream.adapters.base` belongs to `adapters`."""
    return module.split(".")[1] if "." in module else "__init__"


def imports_of(tree: ast.AST, module: str) -> Iterator[str]:
    """Absolute names of all modules imported anywhere in the tree, also through `import_module`."""
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ("layerstream.__init__" if a.name == "layerstream" else a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield source
            # `from layerstream import compiled` imports a module.
            yield from (f"{source}.{alias.name}" for alias in node.names if source == "layerstream")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def dotted(node: ast.AST) -> str:
    """`torch.cuda.Stream` of an attribute chain, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def targets_of(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets = list(node.targets)
        elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For):
            targets = [node.target]
        else:
            continue
        while targets:
            target = targets.pop()
            if isinstance(target, ast.Tuple | ast.List):
                targets += target.elts
            else:
                yield target


def faults(source: str, module: str) -> list[str]:
    """What is wrong with a module, by the rules above."""
    tree = ast.parse(source)
    part = part_of(module)
    if part not in RANKS:
        return [f"{module} has no rank: give it one in RANKS"]
    found: list[str] = []
    imported = set(imports_of(tree, module))
    for name in sorted(imported):
        top = name.split(".")[0]
        if top == "layerstream":
            other = part_of(name)
            if name == "layerstream":
                continue  # of `from layerstream import x`; x itself is looked at
            if name.startswith(ONLY_IN_THE_REPOSITORY) and not module.startswith(ONLY_IN_THE_REPOSITORY):
                found.append(f"{module} imports {name}, which is in no wheel")
            if other not in RANKS:
                # A name of the package's __init__ rather than a module of its own.
                found.append(f"{module} imports {name}, which is no module with a rank")
            elif other == part:
                continue
            elif part in ALONE and other != STANDS_FOR_TORCH:
                found.append(f"{module} imports {name}, and should import nothing of the package")
            elif RANKS[other] >= RANKS[part]:
                found.append(f"{module} (rank {RANKS[part]}) imports {name} (rank {RANKS[other]})")
        if top == "torch" and part in PURE:
            found.append(f"{module} imports {name}, and should be pure")
        if top in LIBRARIES and part not in MAY_IMPORT_LIBRARIES:
            found.append(f"{module} imports {name}")
        if name.startswith("torch.cuda") and part not in NAMES_CUDA:
            found.append(f"{module} imports {name}")
    if part not in NAMES_CUDA and any(dotted(n).startswith("torch.cuda") for n in ast.walk(tree)):
        found.append(f"{module} names torch.cuda")
    if part not in WRITES_DATA:
        found += [
            f"{module} assigns {ast.unparse(t)}"
            for t in targets_of(tree)
            if isinstance(t, ast.Attribute) and t.attr == "data"
        ]
        found += [
            f"{module} sets .data through setattr"
            for n in ast.walk(tree)
            if isinstance(n, ast.Call) and dotted(n.func) == "setattr" and ast.unparse(n.args[1]) == "'data'"
        ]
    return found


def sources() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found.append((".".join(["layerstream", *parts]), path))
    return found


@pytest.mark.parametrize(("module", "path"), sources(), ids=[module for module, _ in sources()])
def test_module_keeps_to_its_layer(module: str, path: Path) -> None:
    assert faults(path.read_text(), module if path.stem != "__init__" else f"{module}.__init__") == []


def test_every_rank_has_a_module() -> None:
    parts = {part_of(module) for module, _ in sources()}
    assert parts == set(RANKS)


def test_the_package_itself_is_of_the_highest_rank() -> None:
    assert RANKS["__init__"] == max(RANKS.values())


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("plan", "from layerstream.transfer import Slot", "(rank 3) imports layerstream.transfer (rank 7)"),
        ("lane", "from layerstream.order import OrderLearner", "(rank 2) imports layerstream.order (rank 2)"),
        ("plan", "def f():\n    import layerstream.api", "(rank 3) imports layerstream.api (rank 13)"),
        ("intercept", "from layerstream import streamer", "(rank 3) imports layerstream.streamer (rank 12)"),
        ("intercept", "import layerstream", "(rank 3) imports layerstream.__init__ (rank 16)"),
        ("intercept", "from . import streamer", "(rank 3) imports layerstream.streamer (rank 12)"),
        ("intercept", "from .streamer import Streamer", "(rank 3) imports layerstream.streamer (rank 12)"),
        ("adapters.base", "from ..streamer import Streamer", "(rank 5) imports layerstream.streamer (rank 12)"),
        ("streamer", "from layerstream import offload", "imports layerstream.offload, which is no module with a rank"),
        ("standins.tiny", "from layerstream.errors import LayerstreamError", "should import nothing of the package"),
        ("standins.demo", "from layerstream.standins.repository import tiny", "which is in no wheel"),
        ("demo", "from layerstream.standins.repository.tiny import build_tiny", "which is in no wheel"),
        ("cli", "import_module('layerstream.standins.repository')", "which is in no wheel"),
        ("order", "from layerstream.errors import LayerstreamError", "should import nothing of the package"),
        ("order", "import torch", "should be pure"),
        ("plan", "def f():\n    from torch import nn", "should be pure"),
        ("streamer", "if TYPE_CHECKING:\n    import diffusers.hooks", "imports diffusers.hooks"),
        ("adapters.base", "def f():\n    return import_module('transformers')", "imports transformers"),
        ("adapters.base", "importlib.import_module('diffusers.models')", "imports diffusers.models"),
        ("transfer", "torch.cuda.synchronize()", "names torch.cuda"),
        ("transfer", "x: torch.cuda.Stream", "names torch.cuda"),
        ("transfer", "from torch.cuda import Stream", "imports torch.cuda"),
        ("transfer", "import torch.cuda", "imports torch.cuda"),
        ("streamer", "parameter.data = view", "assigns parameter.data"),
        ("streamer", "a, (b.data, c) = x", "assigns b.data"),
        ("streamer", "p.data += 1", "assigns p.data"),
        ("streamer", "setattr(p, 'data', view)", "sets .data through setattr"),
        ("newcomer", "", "has no rank"),
    ],
)
def test_the_check_can_fail(module: str, source: str, fault: str) -> None:
    (found,) = {f.partition(f"layerstream.{module} ")[2] for f in faults(source, f"layerstream.{module}")} or {""}
    assert fault in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plan", "from layerstream.blocks import UnitSpec\nfrom layerstream.errors import BudgetError"),
        ("adapters.registry", "from layerstream.adapters.base import Adapter\nfrom . import generic"),
        ("device", "import torch\ntorch.cuda.synchronize()"),
        ("binding", "p.data = view"),
        ("streamer", "x = p.data\ny.data_ptr()"),
        ("demo", "import diffusers"),
        ("standins.repository.tiny.video", "from layerstream.standins.repository.tiny.recipes import Recipe"),
        ("transfer", "'torch.cuda in a string or a comment'  # torch.cuda"),
        ("__main__", "from layerstream.cli import main"),
        ("__init__", "from layerstream.api import offload"),
    ],
)
def test_the_check_lets_pass_what_is_allowed(module: str, source: str) -> None:
    assert faults(source, f"layerstream.{module}") == []
