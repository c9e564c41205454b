from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.settings.units import (
    DURATION_PATTERN,
    SIZE_PATTERN,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0s", 0),
        ("1ms", 0.001),
        ("200ms", 0.2),
        ("30s", 30),
        ("90s", 90),
        ("5m", 300),
        ("12h", 43_200),
        ("30d", 2_592_000),
        (" 5 m ", 300),
        ("36500d", 36_500 * 86_400),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", [30, "30", " 30 "])
def test_a_duration_without_unit_is_refused_with_a_hint(text: object) -> None:
    with pytest.raises(ValueError, match='a duration needs a unit: "30s" if seconds are meant'):
        parse_duration(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s",
        "-1s",
        "1.5s",
        "1S",
        "1 h 30 m",
        "1h30m",
        "1w",
        "1e3s",
        "+5s",
        "1__0s",
        "٣s",
        "1s\n2s",
        "0x10s",
    ],
)
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        parse_duration(text)


@pytest.mark.parametrize("value", [None, True, 1.5, ["1s"], b"1s"])
def test_no_texts(value: object) -> None:
    with pytest.raises(ValueError, match="must be a duration such as"):
        parse_duration(value)


@pytest.mark.parametrize("text", ["36501d", "999999999999d", "876001h"])
def test_a_duration_beyond_a_hundred_years_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="longer than a hundred years"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.001, "1ms"), (0.2, "200ms"), (1.5, "1500ms"), (60, "1m"), (61, "61s"), (86_400, "1d")],
)
def test_durations_are_written_in_the_largest_whole_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(0, 36_500 * 86_400_000))
def test_every_duration_comes_back(milliseconds: int) -> None:
    text = format_duration(milliseconds / 1000)

    assert re.fullmatch(DURATION_PATTERN, text)
    assert parse_duration(text) == milliseconds / 1000


@pytest.mark.parametrize(
    ("value", "octets"),
    [
        (0, 0),
        (500, 500),
        ("500", 500),
        ("500B", 500),
        ("64KiB", 65_536),
        ("25MiB", 26_214_400),
        ("25 MiB", 26_214_400),
        ("2GiB", 2_147_483_648),
    ],
)
def test_sizes(value: object, octets: int) -> None:
    assert parse_size(value) == octets


@pytest.mark.parametrize(
    ("text", "hint"), [("25MB", "25MiB"), ("25M", "25MiB"), ("64kb", "64KiB"), ("1 g", "1GiB")]
)
def test_decimal_sizes_are_refused_with_a_hint(text: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f'is no size: write "{hint}"'):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "MiB", "-1B", "1.5MiB", "1TiB", "lots", "٣B", "1b2"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is no size: a whole number"):
        parse_size(text)


@pytest.mark.parametrize("value", [None, True, 1.5, [1], b"1B"])
def test_neither_text_nor_number(value: object) -> None:
    with pytest.raises(ValueError, match="must be a size such as"):
        parse_size(value)


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be negative"):
        parse_size(-1)


@given(st.integers(0, 1 << 40))
def test_every_size_comes_back(octets: int) -> None:
    text = format_size(octets)

    assert re.fullmatch(SIZE_PATTERN, text)
    assert parse_size(text) == octets


@pytest.mark.parametrize("text", ["\x1b[31m", "x" * 100, "a\nb"])
def test_what_could_disturb_a_terminal_is_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match=r"^this is no duration"):
        parse_duration(text)
