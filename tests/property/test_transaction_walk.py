"""The transaction under every order of events, up to a depth: client, upstream, store, time, the relay's end.

The promises are those of `tests/support/stage.py`. From MAIL on a verdict is reached only at depth ten, so
there are walks from further on, too: from the 354, from the end of data, from between two chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest

from relay import maillog
from tests.support.stage import Event, Stage
from tests.support.walk import AT_ONCE, DATA, END, MAIL, OPEN, OPEN_IDLE, RECIPIENT, TEXT, walk

WALKS: dict[str, tuple[dict[str, Any], Sequence[Event], int, int]] = {
    "from the beginning": ({}, [], 6, 1000),
    "one command at a time": ({"pipelining": False}, [], 6, 700),
    "a connection that may have died": ({"idle": True}, [], 5, 1000),
    "a place in the pool is waited for": ({"busy": True}, [], 5, 500),
    "no chunks": ({"chunking": False}, [*OPEN, *RECIPIENT], 3, 100),
    "recipients, partly refused": ({}, [*OPEN, ("client", "rcpt"), ("client", "rcpt")], 4, 400),
    "content": ({"idle": True}, [*OPEN_IDLE, *RECIPIENT, *DATA], 4, 700),
    "end of data": ({}, [*OPEN, *RECIPIENT, *DATA, *TEXT, *END], 5, 400),
    "all at once": ({}, [*MAIL, ("upstream", "dialed"), *AT_ONCE], 4, 4000),
    "all at once, where it may have died": ({"idle": True}, [*MAIL, *AT_ONCE], 4, 4000),
    "chunks": ({}, [*OPEN, *RECIPIENT, ("client", "chunk")], 3, 500),
    "the last chunk": ({}, [*OPEN, *RECIPIENT, ("client", "chunk"), ("client", "last chunk")], 4, 500),
}
"""The stage, what has happened, how many events follow in every order, and the least number of places."""


@pytest.fixture(autouse=True)
def _log() -> Iterator[None]:
    yield
    maillog.configure("json", "info")


@pytest.mark.parametrize(("stage", "opening", "depth", "least"), WALKS.values(), ids=WALKS)
def test_every_order_of_events(
    stage: dict[str, Any],
    opening: Sequence[Event],
    depth: int,
    least: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = walk(partial(Stage, **stage), opening, depth)
    print(found)
    assert found.places >= least, found
