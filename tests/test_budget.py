"""Sizes as people write them: parsed once, refused with the text of what to write instead."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import layerstream
from layerstream.budget import format_budget, format_bytes, parse_bytes, parse_reserve, resolve_budget
from layerstream.device.simulated import SimulatedDevice
from layerstream.errors import BudgetError

GIB = 2**30


def resolve(vram_budget: Any, *, free: int = 20 * GIB, total: int = 24 * GIB) -> int | None:
    return resolve_budget(vram_budget, free_bytes=free, total_bytes=total)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("8 gb", 8 * 10**9),
        (" 512 MiB ", 512 * 2**20),
        ("1.5GiB", 3 * 2**29),
        (".5KiB", 512),
        ("2.KB", 2000),
        ("7b", 7),
        ("1TiB", 2**40),
        ("1TB", 10**12),
        ("1kib", 1024),
        ("1MB", 10**6),
        ("8 gib", 8 * 2**30),
        ("8G", 8 * 2**30),  # as docker, java and du mean it
        ("8g", 8 * 2**30),
        (" 1.5 G ", 3 * 2**29),
        ("512M", 2**29),
        ("64k", 2**16),
        ("1T", 2**40),
    ],
)
def test_parse(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


BUDGETS = (
    'a number with a unit ("8GiB" or "8G" for 2^30 bytes each, "8GB" for 10^9, "512MiB"), a share of the device\'s '
    'memory ("50%"), an int of bytes, "auto" or "min"'
)
NO_SIZES = ["", " ", "8", "GiB", "-8GiB", "8 GiBs", "eight GiB", "8Gi B", "1,5GiB", "1e3MiB", "8G\u0456B", "%", "-5%"]


@pytest.mark.parametrize("text", NO_SIZES)
def test_unparsable_names_the_text_and_all_that_it_may_be(text: str) -> None:
    expected = f"vram_budget {text!r} is not a size. Write {BUDGETS}."
    for parse in (parse_bytes, resolve):
        with pytest.raises(BudgetError) as error:
            parse(text)
        assert str(error.value) == expected
        assert error.value.budget_bytes is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("50%", 12 * GIB), (" 50 %", 12 * GIB), ("100%", 24 * GIB), ("12.5%", 3 * GIB), ("33.3%", 24 * GIB * 333 // 1000)],
)
def test_a_share_is_of_the_whole_device(text: str, expected: int) -> None:
    assert resolve(text, free=GIB) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0%", "vram_budget '0%' is 0 bytes. Give a positive size"),
        ("101%", "vram_budget 24.2 GiB is more than the device has (24.0 GiB)"),
    ],
)
def test_a_share_of_nothing_or_of_more_than_all(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=re.escape(message)):
        resolve(text)


@given(st.text(max_size=20) | st.from_regex(r" ?[0-9]{0,4}\.?[0-9]{0,4} ?[kKmMgG]?i?([bB]|%)? ?", fullmatch=True))
def test_any_text_is_a_positive_size_or_a_budget_error(text: str) -> None:
    try:
        assert (resolve(text) or 1) > 0 or text.strip().lower() == "auto"
    except BudgetError as error:
        assert "vram_budget" in str(error)


def test_a_number_beyond_what_a_float_holds_is_a_budget_error() -> None:
    with pytest.raises(BudgetError, match="vram_budget"):
        resolve("9" * 400 + "GiB")


LONG_BUDGETS = [
    "9" * 400,
    "9" * 400 + "GiB",
    "9" * 5000 + "GiB",  # more digits than Python reads
    "9" * 400 + "%",
    "9" * 5000 + "%",
    "0." + "0" * 400 + "1GiB",
    "x" * 400,
    int("9" * 400),
    -int("9" * 400),
    10**5000,  # has no repr
    b"8" * 400,
    ["8GiB"] * 400,
]


@pytest.mark.parametrize("budget", LONG_BUDGETS, ids=range(len(LONG_BUDGETS)))
def test_what_is_too_long_to_repeat_is_refused_in_a_line(budget: Any) -> None:
    unlimited = SimulatedDevice().total_bytes()
    for total in (24 * GIB, unlimited):
        with pytest.raises(BudgetError, match="vram_budget") as error:
            resolve(budget, free=total, total=total)
        assert len(str(error.value)) < 330
        assert "\n" not in str(error.value)
    with pytest.raises(BudgetError, match="reserve") as error:
        parse_reserve(budget)
    assert len(str(error.value)) < 250
    assert len(repr(layerstream.offload(vram_budget=budget))) < 120


@pytest.mark.parametrize("text", ["1e400GiB", "nanGiB", "infGiB", "-8GiB", "", "nan", "1e400"])
def test_what_floats_are_called_is_no_size(text: str) -> None:
    for parse in (resolve, parse_reserve):
        with pytest.raises(BudgetError, match=f"{re.escape(repr(text))} is not a size. Write a number with a unit"):
            parse(text)


@pytest.mark.parametrize("reserve", [2**48, 2**60, "1000TiB", "99999TB"])
def test_a_reserve_that_no_device_has(reserve: int | str) -> None:
    with pytest.raises(BudgetError, match=r"reserve .* is more than any device has. Give the bytes"):
        parse_reserve(reserve)


def test_a_budget_that_no_device_has() -> None:
    unlimited = SimulatedDevice().total_bytes()
    with pytest.raises(BudgetError) as error:
        resolve(2 * unlimited, free=unlimited, total=unlimited)
    assert str(error.value) == (
        'vram_budget 2048.0 TiB is more than any device has. Give what yours has, or "auto" for what is free.'
    )


@given(st.integers(0, 2**52), st.sampled_from(["B", "KiB", "MiB", "GiB", "KB", "MB", "GB"]), st.sampled_from(["", " "]))
def test_whole_numbers_are_exact(number: int, unit: str, space: str) -> None:
    scale = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}[unit.lower()]
    if number * scale < 2**53:  # what a float holds exactly: 8 PiB
        assert parse_bytes(f"{number}{space}{unit}") == number * scale


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (3 * 2**30, "3.0 GiB"),
        (int(6.25 * 2**30), "6.2 GiB"),
        (5 * 2**40, "5.0 TiB"),
        (3000 * 2**40, "3000.0 TiB"),
        (2**60, "over 1 EiB"),
        (10**400, "over 1 EiB"),
        (-(2**20), "-1.0 MiB"),
    ],
)
def test_format(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("budget", "text"),
    [(None, "budget the least"), (8 * GIB, "budget 8.0 GiB"), (100 * 2**40, "budget 100.0 TiB")],
)
def test_format_budget(budget: int | None, text: str) -> None:
    assert format_budget(budget) == text


@pytest.mark.parametrize("vram_budget", ["auto", "50%"])
def test_a_budget_of_what_has_no_limit_is_none(vram_budget: str) -> None:
    total = SimulatedDevice().total_bytes()
    assert format_budget(resolve(vram_budget, free=total, total=total)) == "no memory limit"


@given(st.integers(0, 2**45))
def test_format_can_be_read_back_to_within_its_last_digit(num_bytes: int) -> None:
    text = format_bytes(num_bytes)
    assert re.fullmatch(r"[0-9]+ B|[0-9]+\.[0-9] (Ki|Mi|Gi|Ti)B", text)
    assert abs(parse_bytes(text) - num_bytes) <= max(1, 0.05 * num_bytes)


@pytest.mark.parametrize(
    ("vram_budget", "message"),
    [
        (0, "vram_budget 0 is 0 bytes. Give a positive size"),
        (-5, "vram_budget -5 is -5 bytes. Give a positive size"),
        ("0GiB", "vram_budget '0GiB' is 0 bytes. Give a positive size"),
        ("0.1B", "vram_budget '0.1B' is 0 bytes. Give a positive size"),
    ],
)
def test_not_positive(vram_budget: int | str, message: str) -> None:
    with pytest.raises(BudgetError, match=re.escape(message)) as error:
        resolve(vram_budget)
    assert '"auto", or "min"' in str(error.value)
    assert error.value.budget_bytes in (0, -5)


@pytest.mark.parametrize(
    ("vram_budget", "name"),
    [(True, "bool (True)"), (8.5, "float (8.5)"), (None, "NoneType (None)"), (b"8GiB", "bytes (b'8GiB')")],
)
def test_not_a_size_at_all(vram_budget: Any, name: str) -> None:
    with pytest.raises(BudgetError) as error:
        resolve(vram_budget)
    assert str(error.value) == (f"vram_budget must be an int of bytes or a string, not {name}. Write {BUDGETS}.")


@pytest.mark.parametrize("vram_budget", ["32GiB", 32 * GIB])
def test_larger_than_the_device(vram_budget: int | str) -> None:
    with pytest.raises(BudgetError) as error:
        resolve(vram_budget)
    assert str(error.value) == (
        'vram_budget 32.0 GiB is more than the device has (24.0 GiB). Give at most that, or "auto" for what is free.'
    )
    assert error.value.budget_bytes == 32 * GIB


def test_as_large_as_the_device_is_allowed_and_free_memory_does_not_limit_it() -> None:
    # What is free now is no bound: foreign memory may go, and the plan checks what it needs itself.
    assert resolve("24GiB", free=1) == 24 * GIB
    assert resolve(1, free=0) == 1


@pytest.mark.parametrize("word", ["min", " MIN ", "Min"])
def test_min_is_left_to_the_plan(word: str) -> None:
    assert resolve(word) is None


@pytest.mark.parametrize(
    ("free", "expected"),
    [(100 * GIB, 97 * GIB), (3 * GIB, 3 * GIB - GIB // 4), (GIB, GIB - GIB // 4), (GIB // 5, 0), (0, 0)],
)
def test_auto_is_what_is_free_less_a_reserve(free: int, expected: int) -> None:
    assert resolve("auto", free=free) == expected
    assert resolve(" Auto", free=free) == expected


@given(st.integers(0, 2**40))
def test_auto_stays_within_what_is_free(free: int) -> None:
    budget = resolve("auto", free=free, total=2**40)
    assert budget is not None
    assert 0 <= budget <= free


@pytest.mark.parametrize(
    ("reserve", "expected"), [(0, 0), (5, 5), ("1GiB", GIB), ("1g", GIB), ("0B", 0), (" 2 GB", 2 * 10**9)]
)
def test_reserve(reserve: int | str, expected: int) -> None:
    assert parse_reserve(reserve) == expected


@pytest.mark.parametrize("reserve", ["50%", "auto", "min", "", "8", "lots"])
def test_a_reserve_is_a_size_and_nothing_else(reserve: str) -> None:
    with pytest.raises(BudgetError) as error:
        parse_reserve(reserve)
    assert str(error.value) == (
        f'reserve {reserve!r} is not a size. Write a number with a unit ("8GiB" or "8G" for 2^30 bytes each, "8GB" for '
        '10^9, "512MiB"), or an int of bytes.'
    )


@pytest.mark.parametrize(
    ("reserve", "message"),
    [
        (-5, "reserve -5 is negative. Give the bytes that activations take, or 0."),
        (True, "reserve must be an int of bytes or a string, not bool (True)."),
        (1.5, "reserve must be an int of bytes or a string, not float (1.5)."),
        (b"1GiB", "reserve must be an int of bytes or a string, not bytes (b'1GiB')."),
    ],
)
def test_a_reserve_that_cannot_be(reserve: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=re.escape(message)):
        parse_reserve(reserve)


def test_the_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="is not a size"):
        resolve("lots")
