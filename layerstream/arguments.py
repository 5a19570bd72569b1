"""What the command lines of this project have in common: errors in one line, and types of arguments."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from layerstream.budget import resolve_budget
from layerstream.errors import BudgetError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def positive(text: str) -> int:
    """A number of things, at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


positive.__name__ = "number"  # argparse says "invalid number value"


def budget(text: str) -> int | str:
    """A bare number is an int of bytes; anything else is left to `offload`, once it is known to be a budget."""
    if text.isdecimal():
        return int(text)
    try:
        resolve_budget(text, free_bytes=0, total_bytes=sys.maxsize)
    except BudgetError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
    word = text.strip().lower()
    return word if word in ("auto", "min") else text
