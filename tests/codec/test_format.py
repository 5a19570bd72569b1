"""The arithmetic of a packed run."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstream.codec.format import ALIGNMENT, FORMAT_VERSION, MOST_WORDS, PackedRun

packed_runs = st.builds(
    PackedRun,
    num_words=st.integers(1, MOST_WORDS // 8).map(lambda octets: 8 * octets),
    word_bytes=st.sampled_from([2, 4]),
    num_code_words=st.integers(0, 2**29),
    num_exceptions=st.integers(0, 2**28),
)


@given(packed_runs)
def test_sections_follow_one_another_at_aligned_places(run: PackedRun) -> None:
    sections = [run.head, run.marks, run.codes, run.exceptions]
    assert run.head.offset == 0
    for each, following in pairwise(sections):
        assert each.end <= following.offset < each.end + ALIGNMENT
    assert all(each.offset % ALIGNMENT == 0 for each in sections)
    assert run.exceptions.end <= run.num_bytes < run.exceptions.end + ALIGNMENT
    assert run.marks.num_bytes >= run.num_words > run.marks.num_bytes - 1024
    assert run.raw_bytes == run.num_words * run.word_bytes


@given(packed_runs)
def test_it_is_the_same_after_plain_numbers(run: PackedRun) -> None:
    ints = run.to_ints()
    assert all(type(each) is int for each in ints)
    assert PackedRun.from_ints(list(ints)) == run


def test_another_version_is_refused() -> None:
    ints = PackedRun(8192, 2, 700, 3).to_ints()
    with pytest.raises(ValueError, match=f"no run of version {FORMAT_VERSION}"):
        PackedRun.from_ints((FORMAT_VERSION + 1, *ints[1:]))
    with pytest.raises(ValueError, match="no run of version"):
        PackedRun.from_ints(ints[:-1])


@pytest.mark.parametrize("num_words", [0, -8, 4, 129, MOST_WORDS + 8])
def test_runs_that_cannot_be_packed_are_refused(num_words: int) -> None:
    with pytest.raises(ValueError, match="divisible by 8"):
        PackedRun(num_words, 2, 0, 0)


def test_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match="words of 8 bytes"):
        PackedRun(8, 8, 0, 0)


def test_sizes_that_do_not_fit_are_refused() -> None:
    run = PackedRun(8192, 2, 700, 3)
    run.check_sizes(run.num_bytes + 1, 16384)
    with pytest.raises(ValueError, match="16384 bytes packed into"):
        run.check_sizes(run.num_bytes - 1, 16384)
    with pytest.raises(ValueError, match="into 16383"):
        run.check_sizes(run.num_bytes, 16383)


def test_the_package_imports_neither_triton_nor_diffusers() -> None:
    code = "import layerstream.codec, sys; print(sorted({'triton', 'diffusers'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
