"""Tries a built wheel as its users would: installed into an empty virtual environment, away from the checkout.

`python -m tools.try_wheel dist/layerstream-0.1.0-py3-none-any.whl`, or without an argument the wheel in `dist/`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
VENV = ROOT / ".wheel-venv"

_IMPORT = "import layerstream; print(layerstream.__file__)"
_STREAM = """
import layerstream  # first: torch itself warns where numpy is missing
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(256, 256) for _ in range(8))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

model, x = Model(), torch.randn(2, 256)
with torch.inference_mode():
    resident = model(x)
    with layerstream.offload(model, vram_budget="min", device="cpu") as streamer:
        assert torch.equal(model(x), resident)
        assert streamer.stats().num_streamed_blocks > 0
print("identical")
"""
_REPOSITORY_ONLY = """
try:
    from layerstream.standins import build_tiny
except ImportError as error:
    print(error)
"""


class WheelError(Exception):
    """The wheel does not do what it should."""


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel, and an empty folder to run in."""

    python: Path
    folder: Path

    def run(self, *command: str | Path, code: int = 0) -> str:
        """Run a command and return all that it printed.

        Raises:
            WheelError: it ended with another exit code.
        """
        # Nothing of the checkout may be found.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        done = subprocess.run(
            [str(part) for part in command],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1200,
        )
        if done.returncode != code:
            told = " ".join(str(part) for part in command)
            raise WheelError(f"exit code {done.returncode} instead of {code} of: {told}\n{done.stdout}")
        return done.stdout

    def run_code(self, program: str) -> str:
        """Run Python code in which warnings are errors."""
        return self.run(self.python, "-I", "-W", "error", "-c", program)

    def run_command(self, *arguments: str, code: int = 0) -> str:
        """Run the `layerstream` command."""
        return self.run(self.python.with_name("layerstream"), *arguments, code=code)

    def install(self, requirement: str) -> None:
        """Install with the versions of constraints.txt."""
        pip = (self.python, "-I", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
        self.run(*pip, requirement)


def check(is_right: bool, what: str, printed: str) -> None:
    """Raise WheelError with what was printed, unless `is_right`."""
    if not is_right:
        raise WheelError(f"{what}; it printed:\n{printed}")


def try_without_extras(installed: Installed) -> None:
    """What works beside torch alone."""
    printed = installed.run_code(_IMPORT)
    environment = str(installed.python.parent.parent)
    check(printed.startswith(environment) and printed.count("\n") == 1, "import is not silent, or not of it", printed)
    printed = installed.run_code(_STREAM)
    check(printed == "identical\n", "streaming a module is not silent and equal", printed)
    printed = installed.run_command("demo", "--help")
    check("--vram-budget" in printed, "the demo's help has no --vram-budget", printed)
    printed = installed.run_command("demo", code=2)
    check('pip install "layerstream[demo]"' in printed, "the demo does not say what it needs", printed)
    printed = installed.run_code(_REPOSITORY_ONLY)
    check("only in the repository" in printed, "stand-ins of the repository are in the wheel", printed)


def try_demo(installed: Installed) -> None:
    """The demo, once its extra is there."""
    printed = installed.run_command("demo", "--device", "cpu", "--output", "demo.png")
    check("identical images" in printed, "the demo's images are not identical", printed)
    check((installed.folder / "demo.png").is_file(), "the demo saved no image", printed)


def main(arguments: Sequence[str]) -> int:
    """Returns 0 if the wheel works, 1 if not, 2 where there is not exactly one."""
    wheels = [Path(name).resolve() for name in arguments] or sorted((ROOT / "dist").glob("*.whl"))
    if len(wheels) != 1:
        print(f"give one wheel; there are {len(wheels)} in dist/", file=sys.stderr)
        return 2
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        venv.create(VENV, clear=True, with_pip=True)
        installed = Installed(VENV / "bin" / "python", Path(folder))
        steps: list[tuple[str, Callable[[], None]]] = [
            ("installed beside torch alone", lambda: installed.install(str(wheels[0]))),
            ("imports, streams, and says what the demo needs", lambda: try_without_extras(installed)),
            ("installed with the demo's extra", lambda: installed.install(f"{wheels[0]}[demo]")),
            ("runs the demo", lambda: try_demo(installed)),
        ]
        for what, step in steps:
            try:
                step()
            except WheelError as error:
                print(f"{wheels[0].name}: {error}", file=sys.stderr)
                return 1
            print(f"{wheels[0].name}: {what} ({time.monotonic() - started:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
