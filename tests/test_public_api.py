"""The public names are exactly these, documented, and light to import."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import layerstream
from layerstream import errors

NAMES = {
    "Adapter",
    "AdapterError",
    "AlreadyOffloadedError",
    "ArgumentError",
    "BackwardError",
    "BudgetError",
    "CompiledWholeError",
    "ConcurrentUseError",
    "DeviceError",
    "HostMemoryError",
    "LayerStreamer",
    "LayerstreamError",
    "LayerstreamWarning",
    "MovedWhileStreamingError",
    "PipelineError",
    "Plan",
    "RankError",
    "Report",
    "Stats",
    "StoreError",
    "StreamerStateError",
    "TransferError",
    "WeightsLostError",
    "__version__",
    "active",
    "offload",
    "plan",
    "register_adapter",
}
# What a caller who knows nothing of layerstream would catch.
BUILTINS = {
    "AdapterError": ValueError,
    "ArgumentError": ValueError,
    "AlreadyOffloadedError": RuntimeError,
    "BackwardError": RuntimeError,
    "BudgetError": ValueError,
    "CompiledWholeError": RuntimeError,
    "ConcurrentUseError": RuntimeError,
    "DeviceError": ValueError,
    "HostMemoryError": MemoryError,
    "MovedWhileStreamingError": RuntimeError,
    "PipelineError": TypeError,
    "RankError": RuntimeError,
    "StoreError": ValueError,
    "StreamerStateError": RuntimeError,
    "TransferError": RuntimeError,
    "WeightsLostError": RuntimeError,
}
HEAVY = ("diffusers", "transformers", "accelerate", "peft", "safetensors", "torch._dynamo", "torch._inductor", "triton")


def test_all_is_exactly_the_public_names() -> None:
    assert sorted(layerstream.__all__) == sorted(NAMES)
    assert list(layerstream.__all__) == sorted(layerstream.__all__)


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_every_public_name_is_documented(name: str) -> None:
    thing = getattr(layerstream, name)
    assert (thing.__doc__ or "").strip()
    # A dataclass without a docstring of its own is given its signature as one.
    assert not (thing.__doc__ or "").startswith(f"{name}(")


@pytest.mark.parametrize(
    "cls",
    [layerstream.LayerStreamer, layerstream.Adapter, layerstream.Plan, layerstream.Report, layerstream.Stats],
)
def test_every_public_method_is_documented(cls: type) -> None:
    for name, member in vars(cls).items():
        is_public = not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
        # What the name says in full needs no more: `is_active`.
        if is_public and not name.startswith("is_"):
            assert inspect.getdoc(member), f"{cls.__name__}.{name}"


def test_the_version_is_the_packages() -> None:
    from layerstream._version import __version__

    assert layerstream.__version__ == __version__


@pytest.mark.parametrize("function", [layerstream.offload, layerstream.LayerStreamer.__init__])
def test_options_are_keyword_only(function: object) -> None:
    parameters = list(inspect.signature(function).parameters.values())  # type: ignore[arg-type]
    named = [p.name for p in parameters if p.name != "self"]
    assert named == [
        "pipe",
        "vram_budget",
        "device",
        "call_timeout",
        "pairing",
        "packing",
        "store",
        "store_budget",
        "shared_as",
        "links",
    ]
    assert [p.kind for p in parameters[-9:]] == [inspect.Parameter.KEYWORD_ONLY] * 9


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_errors_are_layerstreams_and_a_builtin(name: str, builtin: type[Exception]) -> None:
    error = getattr(layerstream, name)
    assert issubclass(error, layerstream.LayerstreamError)
    assert issubclass(error, builtin)
    assert str(error("what happened")) == "what happened"


def test_every_error_is_public_and_known_here() -> None:
    defined = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, Exception)}
    assert defined - {"LayerstreamError", "LayerstreamWarning"} == set(BUILTINS)
    assert defined <= NAMES


def test_the_warning_is_a_user_warning() -> None:
    assert issubclass(layerstream.LayerstreamWarning, UserWarning)
    assert not issubclass(layerstream.LayerstreamWarning, layerstream.LayerstreamError)


def test_budget_errors_carry_their_numbers() -> None:
    error = layerstream.BudgetError("too small", budget_bytes=5, needed_bytes=7)
    assert (error.budget_bytes, error.needed_bytes) == (5, 7)
    assert (layerstream.BudgetError("?").budget_bytes, layerstream.BudgetError("?").needed_bytes) == (None, None)


def loaded_by(code: str) -> set[str]:
    """Which heavy modules a fresh interpreter has loaded after running `code`."""
    code = f"{code}\nimport sys\nprint([n for n in {HEAVY!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(ast.literal_eval(done.stdout))


def test_importing_layerstream_loads_nothing_heavy() -> None:
    assert loaded_by("import layerstream, layerstream.standins, layerstream.cli") <= loaded_by("import torch")


def test_the_import_check_can_fail() -> None:
    assert loaded_by("import layerstream, torch._dynamo") >= {"torch._dynamo"}


def test_typing_information_is_shipped() -> None:
    assert (Path(layerstream.__file__).parent / "py.typed").exists()
