"""The plain form of a text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lowbit.detect.clean import clean

CASES = {
    "quotes": ("\u201cIt\u2019s\u201d \u2013 she said\u2014no\u2026", '"It\'s" - she said--no...'),
    "hidden": ("in\u200bvis\u00adible\ufeff \u202emarks\u2069", "invisible marks"),
    "look-alikes": ("Th\u0435 c\u0430t s\u0430t \u043en the m\u0430t", "The cat sat on the mat"),
    "full width": ("\uff34he cat", "The cat"),
    "blanks": ("a \t b\u00a0 c", "a b c"),
    "wrapped lines": ("one\r\ntwo  \n three\n\n\n\nfour\rfive", "one two three\n\nfour five"),
    "Russian stays": (
        "\u041e\u043d \u0441\u043a\u0430\u0437\u0430\u043b",
        "\u041e\u043d \u0441\u043a\u0430\u0437\u0430\u043b",
    ),
}


@pytest.mark.parametrize(("given_", "expected"), CASES.values(), ids=CASES.keys())
def test_it_becomes(given_, expected):
    assert clean(given_).text == expected


def test_it_counts_what_it_replaced():
    found = clean("Th\u0435 c\u0430t s\u200bat \u043en the m\u0430t")
    assert (found.hidden, found.imitated) == (1, 4)
    assert found.share == pytest.approx(5 / 23)
    assert clean("\u0441 \u043e\u0440\u0430").imitated == 0  # Cyrillic words of a Cyrillic text
    plain = clean("Plain \u201ctext\u201d \u2014 with dashes.")
    assert (plain.hidden, plain.imitated, plain.share) == (0, 0, 0)


@given(st.text(max_size=200))
def test_cleaning_is_done_once(text):
    once = clean(text).text
    assert clean(once).text == once
    assert "\r" not in once and "  " not in once and once == once.strip()
