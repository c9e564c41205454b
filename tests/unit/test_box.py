"""The search box: what words mean."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from relay.asking import AskedError
from relay.records.sends import SendFilter
from relay.web.box import FIELDS, Box

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
TASK_ID = "019b1c7e-5a2f-7c31-9d0e-3f5b8a6c2d14"


def filters(q: str = "", **values: str) -> list[SendFilter]:
    return Box.of({"q": q, **values}).filters(NOW, UTC, None)


def test_nothing_asks_for_everything() -> None:
    assert filters() == [SendFilter()]
    assert Box.of({}).chips == []


@pytest.mark.parametrize(
    ("q", "wanted"),
    [
        (
            "ann@example.com",
            [
                SendFilter(recipient="ann@example.com"),
                SendFilter(sender="ann@example.com"),
                SendFilter(message_id="ann@example.com"),
            ],
        ),
        ("@example.com", [SendFilter(recipient="@example.com"), SendFilter(sender="@example.com")]),
        (
            "ann*@example.com",
            [SendFilter(recipient="ann*@example.com"), SendFilter(sender="ann*@example.com")],
        ),
        (
            "<1@example.com>",
            [
                SendFilter(recipient="1@example.com"),
                SendFilter(sender="1@example.com"),
                SendFilter(message_id="<1@example.com>"),
            ],
        ),
        ("<>", [SendFilter(sender="")]),
        (TASK_ID, [SendFilter(task_id=UUID(TASK_ID))]),
        (
            "digest",
            [SendFilter(task_type="digest"), SendFilter(client="digest"), SendFilter(message_id="digest")],
        ),
        (
            "example.com",
            [
                SendFilter(task_type="example.com"),
                SendFilter(client="example.com"),
                SendFilter(message_id="example.com"),
                SendFilter(recipient="@example.com"),
                SendFilter(sender="@example.com"),
            ],
        ),
        ("to:ann@example.com type:digest", [SendFilter(recipient="ann@example.com", task_type="digest")]),
        ('type:"order confirmation"', [SendFilter(task_type="order confirmation")]),
        ("from:<> since:1h", [SendFilter(sender="", since=NOW - timedelta(hours=1))]),
        (
            "digest from:a@example.com",
            [
                SendFilter(task_type="digest", sender="a@example.com"),
                SendFilter(client="digest", sender="a@example.com"),
                SendFilter(message_id="digest", sender="a@example.com"),
            ],
        ),
    ],
)
def test_words(q: str, wanted: list[SendFilter]) -> None:
    assert filters(q) == wanted


def test_a_word_alone_is_not_looked_for_where_something_else_is_asked_for() -> None:
    assert filters("digest type:mention") == [
        SendFilter(client="digest", task_type="mention"),
        SendFilter(message_id="digest", task_type="mention"),
    ]


def test_words_and_single_filters_hold_together() -> None:
    assert filters("to:ann@example.com", upstream="primary", until="2026-11-23T10:00") == [
        SendFilter(
            recipient="ann@example.com", upstream="primary", until=datetime(2026, 11, 23, 10, tzinfo=UTC)
        )
    ]


def test_what_is_said_twice_is_no_search_for_the_last_one() -> None:
    for q, values in (
        ("to:ann@example.com to:ben@example.com", {}),
        ("from:ann@example.com", {"sender": "ben@example.com"}),
    ):
        with pytest.raises(
            AskedError, match=r"q takes one (recipient|sender), in the box or in its own field"
        ):
            filters(q, **values)
    assert filters("type:digest type:digest", type="digest") == [SendFilter(task_type="digest")]


@pytest.mark.parametrize(
    ("q", "field"), [("ann ben", "q"), ("since:soon", "since"), ("task:7", "task_id"), ("x" * 2000, "type")]
)
def test_what_has_no_meaning_is_named(q: str, field: str) -> None:
    with pytest.raises(AskedError) as caught:
        filters(q)
    assert caught.value.field == field


def test_what_is_asked_for_can_be_said() -> None:
    box = Box.of({"q": " ann@example.com ", "type": "digest", "unknown": "x"})
    assert box.chips == ["ann@example.com", "Type: digest"]
    assert box.filtered
    assert [name for name, _ in box.fields] == list(FIELDS)
