"""Memory sizes as people write them, to bytes and back. Pure: free and total memory are arguments."""

from __future__ import annotations

import re
from fractions import Fraction

from layerstream.errors import BudgetError

_UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]+)\s*")

# Kept free under "auto" for what lies outside the allocator and grows while a pipeline runs: kernels that are loaded,
# the libraries' own memory.
_AUTO_RESERVE_FRACTION = 0.03
_AUTO_RESERVE_LEAST_BYTES = 2**28


def format_bytes(num_bytes: int | float) -> str:
    """Memory as text in powers of two: `format_bytes(3 * 2**30)` is "3.0 GiB"."""
    if num_bytes >= 2**60:
        return f"{int(num_bytes) >> 40} TiB"  # beyond what a float says exactly, or at all
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def parse_bytes(text: str) -> int:
    """Bytes in a string such as "8GiB", "8 GB" or "512MiB".

    Raises:
        BudgetError: no number with a unit; names the string and the units.
    """
    match = _SIZE.fullmatch(text)
    scale = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or scale is None:
        raise BudgetError(
            f"vram_budget {text!r} is not a size. "
            'Write a number with a unit ("8GiB", "8GB", "512MiB"), an int of bytes, "auto" or "min".'
        )
    return int(Fraction(match.group(1)) * scale)  # exact, whatever the number of digits


def auto_bytes(free_bytes: int) -> int:
    """The budget that "auto" is: what is free, less a small reserve."""
    return max(0, free_bytes - max(_AUTO_RESERVE_LEAST_BYTES, int(_AUTO_RESERVE_FRACTION * free_bytes)))


def resolve_budget(vram_budget: int | str, *, free_bytes: int, total_bytes: int) -> int | None:
    """The budget in bytes, or None for "min" (the least that works, which only the plan knows).

    Args:
        vram_budget: int bytes, a size string, "auto" or "min".
        free_bytes: what the process holds on the device and what it may still take now, together.
        total_bytes: the device's whole memory.
    Raises:
        BudgetError: zero, negative, unparsable, not a size at all, or larger than the device.
    """
    if isinstance(vram_budget, str):
        word = vram_budget.strip().lower()
        if word == "min":
            return None
        if word == "auto":
            return auto_bytes(free_bytes)
        budget_bytes = parse_bytes(vram_budget)
    elif isinstance(vram_budget, int) and not isinstance(vram_budget, bool):
        budget_bytes = vram_budget
    else:
        raise BudgetError(
            f"vram_budget must be an int of bytes or a string, not {type(vram_budget).__name__} ({vram_budget!r}). "
            'Write, for instance, vram_budget="8GiB".'
        )
    if budget_bytes <= 0:
        raise BudgetError(
            f'vram_budget {vram_budget!r} is {budget_bytes} bytes. Give a positive size, "auto", or "min" for the '
            "least that works.",
            budget_bytes=budget_bytes,
        )
    if budget_bytes > total_bytes:
        raise BudgetError(
            f"vram_budget {format_bytes(budget_bytes)} is more than the device has ({format_bytes(total_bytes)}). "
            'Give at most that, or "auto" for what is free.',
            budget_bytes=budget_bytes,
        )
    return budget_bytes
