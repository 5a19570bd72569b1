"""Memory sizes as people write them, to bytes and back. Pure: free and total memory are arguments.

A unit of one letter is a power of two, as it is to docker, java and du: "8G" is "8GiB", which GPUs are sold by. Two
letters are what the standard says: "8GiB" is 8 * 2**30 bytes, "8GB" is 8 * 10**9.
"""

from __future__ import annotations

import re
from fractions import Fraction

from layerstream.errors import BudgetError, brief

_UNITS = {"b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
# No device needs more digits, and Python reads no more than some thousands.
_SIZE = re.compile(r"\s*([0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})\s*([a-zA-Z]+|%)\s*")

_SIZES = 'a number with a unit ("8GiB" or "8G" for 2^30 bytes each, "8GB" for 10^9, "512MiB")'
_BUDGETS = f'{_SIZES}, a share of the device\'s memory ("50%"), an int of bytes, "auto" or "min"'

# Kept free under "auto" for what lies outside the allocator and grows while a pipeline runs: kernels that are loaded,
# the libraries' own memory.
_AUTO_RESERVE_FRACTION = 0.03
_AUTO_RESERVE_LEAST_BYTES = 2**28
# More than any device has: what a simulated one without a size offers is no limit.
_UNLIMITED_BYTES = 2**48


def format_bytes(num_bytes: int | float) -> str:
    """Memory as text in powers of two: `format_bytes(3 * 2**30)` is "3.0 GiB"."""
    if num_bytes >= 2**60:
        return "over 1 EiB"  # what somebody wrote, and not what anything has
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_budget(budget_bytes: int | None) -> str:
    """A resolved budget as text: "budget 8.0 GiB", "budget the least" of None, or that there is none to speak of."""
    if budget_bytes is None:
        return "budget the least"
    return "no memory limit" if is_unlimited(budget_bytes) else f"budget {format_bytes(budget_bytes)}"


def is_unlimited(num_bytes: int) -> bool:
    """Whether so much is no limit: a simulated device without a memory size."""
    return num_bytes >= _UNLIMITED_BYTES


def parse_bytes(text: str, *, name: str = "vram_budget") -> int:
    """Bytes in a string such as "8GiB", "8 GB", "8G" or "512MiB".

    Args:
        name: of the argument, for people.
    Raises:
        BudgetError: no number with a unit; names the string and all that a budget may be.
    """
    return _parse(text, f"{name} {brief(text)} is not a size. Write {_BUDGETS}.")


def parse_reserve(reserve: int | str) -> int:
    """Bytes of a reserve: an int, or a string as `parse_bytes` takes it.

    Raises:
        BudgetError: negative, unparsable, more than any device has, or not a size at all ("50%", "auto" and "min" are
            not).
    """
    if isinstance(reserve, str):
        num_bytes = _parse(reserve, f"reserve {brief(reserve)} is not a size. Write {_SIZES}, or an int of bytes.")
    elif isinstance(reserve, int) and not isinstance(reserve, bool):
        num_bytes = reserve
    else:
        raise BudgetError(
            f"reserve must be an int of bytes or a string, not {type(reserve).__name__} ({brief(reserve)}). "
            'Write, for instance, reserve="1GiB".'
        )
    if num_bytes < 0:
        raise BudgetError(f"reserve {brief(reserve)} is negative. Give the bytes that activations take, or 0.")
    if is_unlimited(num_bytes):
        raise BudgetError(
            f"reserve {brief(reserve)} is more than any device has. Give the bytes that activations take, or 0."
        )
    return num_bytes


def auto_bytes(free_bytes: int) -> int:
    """The budget that "auto" is: what is free, less a small reserve."""
    return max(0, free_bytes - max(_AUTO_RESERVE_LEAST_BYTES, int(_AUTO_RESERVE_FRACTION * free_bytes)))


def resolve_budget(
    vram_budget: int | str, *, free_bytes: int, total_bytes: int, name: str = "vram_budget"
) -> int | None:
    """The budget in bytes, or None for "min" (the least that works, which only the plan knows).

    Args:
        vram_budget: int bytes, a size string, a share of `total_bytes` such as "50%", "auto" or "min".
        free_bytes: what the process holds on the device and what it may still take now, together.
        total_bytes: the device's whole memory.
        name: of the argument, for people.
    Raises:
        BudgetError: zero, negative, unparsable, not a size at all, or larger than the device.
    """
    if isinstance(vram_budget, str):
        word = vram_budget.strip().lower()
        if word == "min":
            return None
        if word == "auto":
            return auto_bytes(free_bytes)
        share = _SIZE.fullmatch(vram_budget)
        if share is not None and share.group(2) == "%":
            budget_bytes = int(Fraction(share.group(1)) * total_bytes / 100)
        else:
            budget_bytes = parse_bytes(vram_budget, name=name)
    elif isinstance(vram_budget, int) and not isinstance(vram_budget, bool):
        budget_bytes = vram_budget
    else:
        raise BudgetError(
            f"{name} must be an int of bytes or a string, not {type(vram_budget).__name__} "
            f"({brief(vram_budget)}). Write {_BUDGETS}."
        )
    if budget_bytes <= 0:
        raise BudgetError(
            f'{name} {brief(vram_budget)} is {brief(budget_bytes)} bytes. Give a positive size, "auto", or "min" '
            "for the least that works.",
            budget_bytes=budget_bytes,
        )
    if budget_bytes > total_bytes:
        had, most = f"the device has ({format_bytes(total_bytes)})", "at most that"
        if is_unlimited(total_bytes):
            had, most = "any device has", "what yours has"
        raise BudgetError(
            f'{name} {format_bytes(budget_bytes)} is more than {had}. Give {most}, or "auto" for what is free.',
            budget_bytes=budget_bytes,
        )
    return budget_bytes


def _parse(text: str, problem: str) -> int:
    match = _SIZE.fullmatch(text)
    scale = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or scale is None:
        raise BudgetError(problem)
    return int(Fraction(match.group(1)) * scale)  # exact, whatever the number of digits
