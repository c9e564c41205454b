"""The cases: what is sent in each, from where, and to what kind of upstream.

Rules: a case is a value; `measure.py` does what it says. Cases of one family differ in one thing, whose value
is `step`, and are compared with each other. `only` names the targets that a case is about; without it all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """One case. `warm_up`: messages before the clock starts; `least`, `most`: of those that are timed."""

    name: str
    title: str
    kind: Literal["load", "idle", "work", "start"] = "load"
    sessions: int = 20
    size: int = 4096
    keep: bool = True
    """Whether connections are kept open; else each message has one of its own."""
    style: Literal["plain", "pipelined", "bdat"] = "plain"
    """How a client sends: a command at a time; MAIL, RCPT, DATA at once; or all at once, by BDAT."""
    recipients: int = 1
    delay: float = 0.0
    """Seconds that the upstream takes for each end of data."""
    distance: float = 0.0
    """Seconds of a round trip to the upstream, which then wants STARTTLS and AUTH."""
    rows: int = 0
    """Rows that are in the table before."""
    own_client: bool = False
    """Whether it takes the client of this project: smtp-source cannot do it, or does not say enough."""
    warm_up: int = 200
    least: int = 200
    most: int = 100_000
    family: str = ""
    step: float = 0
    only: tuple[str, ...] = ()


_RELAY = ("relay",)
_WAITING = ("direct", "relay")


def _waiting(style: Literal["plain", "pipelined", "bdat"], title: str) -> Case:
    return Case(
        f"waiting-{style}",
        f"one client, a connection a message, upstream 50 ms away with STARTTLS and AUTH: {title}",
        sessions=1,
        size=4096,
        keep=False,
        style=style,
        distance=0.05,
        own_client=True,
        warm_up=2,
        least=5,
        most=100,
        family="waiting",
        only=_WAITING,
    )


_ALL = (
    Case("short", "20 sessions, a connection a message, 4 KiB", keep=False, most=40_000),
    Case("keep", "20 sessions, kept open, 4 KiB"),
    Case("one", "one client, one at a time, 4 KiB", sessions=1, own_client=True, warm_up=50, least=50),
    Case(
        "large", "4 sessions, a connection a message, 10 MiB",
        sessions=4, size=10 * MIB, keep=False, warm_up=4, least=8,
    ),
    Case(  # five for each session: the first tells how long 200 connections take to open
        "slow", "200 sessions, kept open, 4 KiB, upstream takes 100 ms for each",
        sessions=200, delay=0.1, warm_up=1000, least=1000,
    ),
    Case("start", "from the start, with new files, to the first greeting; relay --help", kind="start"),
    Case(
        "start-again", "from the start, with 1,000 rows in the table, to the first greeting; relay --help",
        kind="start", rows=1000, only=(*_RELAY, "relay-python"),
    ),
    Case("idle", "1,000 idle sessions", kind="idle", sessions=1000, own_client=True),
    _waiting("plain", "a command at a time"),
    _waiting("pipelined", "MAIL, RCPT and DATA at once"),
    _waiting("bdat", "all of a message at once, by BDAT"),
    *(
        Case(
            f"recipients-{count}", f"20 sessions, kept open, {count} recipients a message",
            style="pipelined", recipients=count, own_client=True, warm_up=100, least=100,
            family="recipients", step=count, only=_RELAY,
        )
        for count in (1, 10, 100, 500)
    ),
    *(
        Case(
            f"sessions-{count}", f"{count} sessions, kept open, 4 KiB",
            sessions=count, own_client=True, warm_up=max(500, 2 * count), least=2000,
            family="sessions", step=count, only=_RELAY,
        )
        for count in (10, 100, 500, 2000)
    ),
    *(
        Case(
            f"table-{rows}", f"20 sessions, kept open, 4 KiB, {rows:,} rows in the table",
            rows=rows, own_client=True, warm_up=1000, least=2000,
            family="table", step=rows, only=_RELAY,
        )
        for rows in (0, 100_000, 1_000_000, 10_000_000)
    ),
    Case("idle-10000", "10,000 idle sessions", kind="idle", sessions=10_000, own_client=True, only=_RELAY),
    Case("work-5000", "5,000 sessions in a body of 1 MiB", kind="work", sessions=5000, size=MIB,
         own_client=True, only=_RELAY),
)  # fmt: skip
CASES = {case.name: case for case in _ALL}
FAMILIES = {case.family: [c.name for c in _ALL if c.family == case.family] for case in _ALL if case.family}
QUICK = ("short", "keep", "one", "large", "slow", "idle", "waiting-plain", "waiting-pipelined")
