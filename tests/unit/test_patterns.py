"""What a search is given to look for."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.dialects import sqlite

from relay.records.patterns import Wanted, equals_or_like


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("ann@example.com", Wanted(address="ann@example.com")),
        ("", Wanted(address="")),
        (r"a\*b@example.com", Wanted(address="a*b@example.com")),
        ("@Example.com", Wanted(domain="example.com")),
        ("*@Example.com", Wanted(domain="example.com")),
        ("ann*@Example.com", Wanted(domain="example.com", pattern="ann%@Example.com")),
        ("50%_*", Wanted(pattern=r"50\%\_%")),
        ("@*.example.com", Wanted(pattern="%@%.example.com")),
        ("*", Wanted(pattern="%")),
    ],
)
def test_what_a_value_asks_for(value: str, wanted: Wanted) -> None:
    assert Wanted.of(value) == wanted


def holds(condition: sa.ColumnElement[bool]) -> bool:
    with closing(sqlite3.connect(":memory:")) as raw:
        text = sa.select(condition).compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True})
        return bool(raw.execute(str(text)).fetchone()[0])


TEXT = st.text(st.sampled_from("ab%_\\*.'\n"), max_size=8)


def matched(pattern: str, text: str) -> bool:
    """The rule, told in another way: literal pieces, and a star for anything."""
    if not pattern:
        return not text
    if pattern.startswith("*"):
        return any(matched(pattern[1:], text[start:]) for start in range(len(text) + 1))
    literal, rest = ("*", pattern[2:]) if pattern.startswith(r"\*") else (pattern[0], pattern[1:])
    return text.startswith(literal) and matched(rest, text[1:])


@given(TEXT, TEXT)
def test_a_pattern_matches_by_its_stars_and_nothing_else(pattern: str, text: str) -> None:
    column = sa.literal(text, sa.Text())
    assert holds(equals_or_like(pattern, column)) == matched(pattern, text)
