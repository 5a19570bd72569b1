"""How warnings are given: they name the user's line, however deep in the package they arise."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from layerstream.errors import LayerstreamWarning

_PACKAGE = str(Path(__file__).parent)


def warn(message: str) -> None:
    """Warn in the name of the nearest caller outside this package and the standard library's `contextlib`."""
    level = 1
    frame = sys._getframe()
    while frame.f_back is not None and _is_passed_over(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, LayerstreamWarning, stacklevel=level)


def _is_passed_over(file: str) -> bool:
    return file.startswith(_PACKAGE) or file.endswith("contextlib.py")
