"""Compares the accounts of what was sent: what clients were told, what the upstream has, what the relay kept.

Rules: a pure function of values. A message is known by an id that the client puts into a header of its own,
one id for each message, however often an application tries again under new ids. `check` returns every
contradiction; an empty list is the only good answer, and `Ledger.told` must not be empty for it to mean much.
What follows the id in a contradiction is one of a few sentences, so that contradictions can be counted by
kind (`kinds`).

Where the relay cannot know what became of a message it must say so: the fourth account, `in_doubt`. Such an
entry may be of a message that the upstream never got whole. The relay notes that the end of data goes up
just before it does, and the octets can be lost between it and the upstream, so nobody but the upstream
knows; the entry says no more than that. It may also be of a message that the upstream has refused, if the
reply was lost.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ID_HEADER", "Ledger", "check", "id_of", "ids", "kinds"]

ID_HEADER = "X-Task-ID"
"""The default of `task_type.id_header`: the row then carries the id as `client_task_id`."""

_ID = re.compile(rb"^" + ID_HEADER.encode() + rb":[ \t]*([^\r\n]*?)[ \t]*\r?$", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True)
class Ledger:
    """The accounts, each by message id."""

    told: Mapping[str, int | None] = field(default_factory=dict)
    """What the client heard at the end of data: the code; None: nothing, it or the relay was gone."""
    uncertain: Collection[str] = ()
    """Of those: ids whose client was told that the message may have been sent (a 451 of the relay's own)."""
    accepted: Iterable[str] = ()
    """Ids of the messages to whose end of data the upstream answered 2yz; one entry for each time."""
    refused: Iterable[str] = ()
    """Ids of the messages that reached the upstream whole and that it refused; one entry for each time."""
    unanswered: Iterable[str] = ()
    """Ids of the messages that reached the upstream whole and that it never answered; one for each time."""
    rows: Iterable[str] = ()
    """Ids in `task_done`; one entry for each row."""
    in_doubt: Iterable[str] = ()
    """Ids in `task_in_doubt`; one entry for each row."""


def check(ledger: Ledger, *, settled: bool = True) -> list[str]:
    """Return the contradictions, one line each, sorted.

    - a row, and the upstream has not accepted that message (spec.md, invariant 1);
    - 2yz to the client and not exactly one row (invariant 2);
    - two rows, or two entries in doubt, for one message; or both a row and an entry;
    - an acceptance, or an end of data that nobody answered, with neither row nor entry (invariant 3);
    - the client was told that the message may have been sent, and the relay keeps nothing of it, although the
      upstream has not refused it;
    - an entry in doubt although the client was told the verdict;
    - a message that the upstream got twice for one client send (invariant 4);
    - an id that no client sent;
    - where `settled`: an acceptance that is only in doubt, or an entry of a message that the upstream refused
      or never got whole. The relay was not killed then, no connection was cut, and it had the time to learn.
    """
    accepted, refused, silent = Counter(ledger.accepted), Counter(ledger.refused), Counter(ledger.unanswered)
    rows, doubts = Counter(ledger.rows), Counter(ledger.in_doubt)
    wrong = []
    for key in sorted({*ledger.told, *accepted, *refused, *silent, *rows, *doubts}):
        found = []
        code = ledger.told.get(key)
        if key not in ledger.told:
            found.append("no client sent it")
        if rows[key] and not accepted[key]:
            found.append("a row, but the upstream has not accepted it")
        if rows[key] > 1:
            found.append(f"{rows[key]} rows")
        if doubts[key] > 1:
            found.append(f"{doubts[key]} entries in doubt")
        if rows[key] and doubts[key]:
            found.append("in doubt, and there is a row")
        if code is not None and 200 <= code < 300:
            if rows[key] == 0:
                found.append(f"the client was told {code}, and there is no row")
        elif not rows[key] and not doubts[key]:
            found += _kept_nowhere(accepted[key], refused[key], silent[key], heard=key in ledger.uncertain)
        if doubts[key] and code is not None and key not in ledger.uncertain:
            found.append(f"in doubt, and the client was told {code}")
        if (times := accepted[key] + refused[key] + silent[key]) > 1:
            found.append(f"the upstream got it {times} times")
        if settled and doubts[key] and not silent[key]:
            found.append(_no_doubt(accepted[key], refused[key]))
        wrong += [f"{key}: {each}" for each in found]
    return wrong


def ids(select: Callable[[str], Sequence[Mapping[str, Any]]], table: str) -> list[str]:
    """Return the ids that a table of the store holds; `select` runs a query, gives rows by column name."""
    return [row["client_task_id"] for row in select(f"SELECT client_task_id FROM {table} ORDER BY id")]


def _kept_nowhere(accepted: int, refused: int, silent: int, *, heard: bool) -> list[str]:
    """What is wrong with it that the relay keeps nothing of a message whose client was not told 2yz."""
    if accepted:
        return ["accepted by the upstream, and there is neither row nor entry in doubt"]
    if silent:
        return ["the upstream has it whole and never answered, and there is no entry in doubt"]
    if heard and not refused:
        return ["the client was told that it may have been sent, and there is no entry in doubt"]
    return []


def _no_doubt(accepted: int, refused: int) -> str:
    if accepted:
        return "in doubt, and the upstream has accepted it"
    return f"in doubt, and the upstream has {'refused it' if refused else 'never had it whole'}"


def kinds(findings: Iterable[str]) -> Counter[str]:
    """Count contradictions by what they say, whatever message they are about."""
    return Counter(finding.partition(": ")[2] for finding in findings)


def id_of(content: bytes) -> str:
    """Return the id in a message's header section; ValueError unless there is exactly one."""
    head, _, _ = content.partition(b"\r\n\r\n")
    found: list[bytes] = _ID.findall(head)
    if len(found) != 1 or not found[0]:
        raise ValueError(f"{len(found)} {ID_HEADER} headers in {head[:200]!r}")
    return found[0].decode("ascii")
