"""Imports go one way. Read from the source with `ast`, so that imports inside functions count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import layerstream

PACKAGE = Path(layerstream.__file__).parent

# A folder imports only from strictly lower ranks, and so does a module beside the folders. Modules of one folder may
# import each other, one way.
RANKS = {
    "torch_private": 0,
    "_import_torch": 0,
    "_version": 0,
    "errors": 0,
    "finalisers": 0,
    "interrupts": 0,
    "blocks": 1,
    "budget": 1,
    "calls": 1,
    "codec": 1,
    "comparing": 1,
    "progress": 1,
    "saying": 1,
    "standins": 1,
    "stats": 1,
    "tables": 1,
    "arguments": 2,
    "weights": 2,
    "planning": 2,
    "device": 3,
    "host": 4,
    "hooks": 5,
    "model": 6,
    "transfer": 7,
    "engine": 8,
    "pipeline": 9,
    "report": 3,
    "api": 10,
    "demo": 11,
    "testing": 11,
    "cli": 12,
    "__init__": 13,
    "__main__": 13,
}
STANDS_FOR_TORCH = "torch_private"  # who may import torch may import it
# Not only lower ranks: nothing of the package at all but themselves.
ALONE = {
    "blocks",
    "calls",
    "comparing",
    "errors",
    "finalisers",
    "interrupts",
    "progress",
    "standins",
    "stats",
    "tables",
    "_version",
}
ALONE |= {"torch_private", "_import_torch", "device.batched_copy", "host.memory", "planning.order"}
ALONE |= {"planning.pace", "planning.schedule", "weights.absent", "weights.references"}
PURE = {"blocks", "budget", "errors", "planning", "report", "stats", "tables", "_version"}
LIBRARIES = {"diffusers", "transformers"}
MAY_IMPORT_LIBRARIES = {"standins", "demo", "cli"}
ONLY_IN_THE_REPOSITORY = "layerstream.standins.repository"
WRITES_DATA = {"weights.binding", "weights.absent", "standins"}  # stand-ins are built, not streamed, there
NAMES_CUDA = {"device.cuda", "device.cuda_packing", "device.allocator", "codec.launch", "torch_private"}


def part_of(module: str) -> str:
    """The entry in RANKS: `layerstream.model.units` belongs to `model`."""
    return module.split(".")[1] if "." in module else "__init__"


def is_one_of(module: str, names: set[str]) -> bool:
    """Whether a module, or the folder that it is in, is named."""
    return part_of(module) in names or module.removeprefix("layerstream.") in names


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
            elif other == part and (part in ALONE or not is_one_of(module, ALONE)):
                continue
            elif is_one_of(module, ALONE) and other != STANDS_FOR_TORCH:
                found.append(f"{module} imports {name}, and should import nothing of the package")
            elif RANKS[other] >= RANKS[part]:
                found.append(f"{module} (rank {RANKS[part]}) imports {name} (rank {RANKS[other]})")
        if top == "torch" and is_one_of(module, PURE):
            found.append(f"{module} imports {name}, and should be pure")
        if top in LIBRARIES and part not in MAY_IMPORT_LIBRARIES:
            found.append(f"{module} imports {name}")
        if name.startswith("torch.cuda") and not is_one_of(module, NAMES_CUDA):
            found.append(f"{module} imports {name}")
    if not is_one_of(module, NAMES_CUDA) and any(dotted(n).startswith("torch.cuda") for n in ast.walk(tree)):
        found.append(f"{module} names torch.cuda")
    if not is_one_of(module, WRITES_DATA):
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
    named = {module.removeprefix("layerstream.") for module, _ in sources()}
    for names in (ALONE, PURE, WRITES_DATA, NAMES_CUDA):
        assert names <= named | parts


def circle_in(imports: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; none, if they do not."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for other in sorted(imports.get(module, ())):
                if found := visit(other, [*path, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(imports) if (found := visit(module, []))), [])


@pytest.mark.parametrize("folder", sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()))
def test_modules_of_a_folder_import_each_other_one_way(folder: str) -> None:
    if folder == "standins":
        pytest.skip("its repository of stand-ins imports itself by name")
    imports: dict[str, set[str]] = {}
    for module, path in sources():
        if part_of(module) == folder and path.stem != "__init__":
            found = set(imports_of(ast.parse(path.read_text()), module))
            imports[module] = {name for name in found if name != module and part_of(name) == folder}
    assert circle_in(imports) == []


def test_a_circle_is_found() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_package_itself_is_of_the_highest_rank() -> None:
    assert RANKS["__init__"] == max(RANKS.values())


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("planning.plan", "from layerstream.transfer.unit import Slot", "(rank 2) imports layerstream.transfer.unit"),
        (
            "host.home",
            "from layerstream.model.units import divide",
            "(rank 4) imports layerstream.model.units (rank 6)",
        ),
        ("planning.plan", "def f():\n    import layerstream.api", "(rank 2) imports layerstream.api (rank 10)"),
        ("hooks.intercept", "from layerstream import engine", "(rank 5) imports layerstream.engine (rank 8)"),
        ("hooks.intercept", "import layerstream", "(rank 5) imports layerstream.__init__ (rank 13)"),
        ("hooks.intercept", "from .. import engine", "(rank 5) imports layerstream.engine (rank 8)"),
        ("hooks.intercept", "from ..engine.streamer import Streamer", "imports layerstream.engine.streamer (rank 8)"),
        ("model.adapters.base", "from ...engine.lane import Lane", "(rank 6) imports layerstream.engine.lane (rank 8)"),
        ("api", "from layerstream import offload", "imports layerstream.offload, which is no module with a rank"),
        ("standins.tiny", "from layerstream.errors import LayerstreamError", "should import nothing of the package"),
        ("standins.demo", "from layerstream.standins.repository import tiny", "which is in no wheel"),
        ("demo", "from layerstream.standins.repository.tiny import build_tiny", "which is in no wheel"),
        ("cli", "import_module('layerstream.standins.repository')", "which is in no wheel"),
        ("planning.order", "from layerstream.errors import LayerstreamError", "should import nothing of the package"),
        ("planning.order", "from layerstream.planning.pace import Pace", "should import nothing of the package"),
        ("planning.order", "import torch", "should be pure"),
        ("planning.plan", "def f():\n    from torch import nn", "should be pure"),
        ("engine.streamer", "if TYPE_CHECKING:\n    import diffusers.hooks", "imports diffusers.hooks"),
        ("model.adapters.base", "def f():\n    return import_module('transformers')", "imports transformers"),
        ("model.adapters.base", "importlib.import_module('diffusers.models')", "imports diffusers.models"),
        ("transfer.transfer", "torch.cuda.synchronize()", "names torch.cuda"),
        ("device.base", "x: torch.cuda.Stream", "names torch.cuda"),
        ("transfer.transfer", "from torch.cuda import Stream", "imports torch.cuda"),
        ("transfer.transfer", "import torch.cuda", "imports torch.cuda"),
        ("engine.streamer", "parameter.data = view", "assigns parameter.data"),
        ("engine.streamer", "a, (b.data, c) = x", "assigns b.data"),
        ("weights.references", "p.data += 1", "assigns p.data"),
        ("engine.streamer", "setattr(p, 'data', view)", "sets .data through setattr"),
        ("newcomer", "", "has no rank"),
    ],
)
def test_the_check_can_fail(module: str, source: str, fault: str) -> None:
    (found,) = {f.partition(f"layerstream.{module} ")[2] for f in faults(source, f"layerstream.{module}")} or {""}
    assert fault in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("planning.plan", "from layerstream.blocks import UnitSpec\nfrom layerstream.errors import BudgetError"),
        ("model.adapters.registry", "from layerstream.model.adapters.base import Adapter\nfrom . import generic"),
        ("device.cuda", "import torch\ntorch.cuda.synchronize()"),
        ("weights.absent", "from layerstream.torch_private import tree_leaves"),
        ("weights.binding", "p.data = view"),
        ("engine.streamer", "x = p.data\ny.data_ptr()"),
        ("demo", "import diffusers"),
        ("standins.repository.tiny.video", "from layerstream.standins.repository.tiny.recipes import Recipe"),
        ("transfer.transfer", "'torch.cuda in a string or a comment'  # torch.cuda"),
        ("__main__", "from layerstream.cli import main"),
        ("__init__", "from layerstream.api import offload"),
    ],
)
def test_the_check_lets_pass_what_is_allowed(module: str, source: str) -> None:
    assert faults(source, f"layerstream.{module}") == []
