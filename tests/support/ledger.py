"""Compares the three accounts of what was sent: what clients were told, what the upstream has, the rows.

Rules: a pure function of values. A message is known by an id that the client puts into a header of its own,
one id for each message, however often an application tries again under new ids. `check` returns every
contradiction; an empty list is the only good answer, and `Ledger.told` must not be empty for it to mean much.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["ID_HEADER", "Ledger", "check", "id_of"]

ID_HEADER = "X-Task-ID"
"""The default of `task_type.id_header`: the row then carries the id as `client_task_id`."""

_ID = re.compile(rb"^" + ID_HEADER.encode() + rb":[ \t]*([^\r\n]*?)[ \t]*\r?$", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True)
class Ledger:
    """The three accounts, each by message id."""

    told: Mapping[str, int | None] = field(default_factory=dict)
    """What the client heard at the end of data: the code; None: nothing, it or the relay was gone."""
    accepted: Iterable[str] = ()
    """Ids of the messages to whose end of data the upstream answered 2yz; one entry for each time."""
    refused: Iterable[str] = ()
    """Ids of the messages that reached the upstream whole and were not accepted; one entry for each time."""
    rows: Iterable[str] = ()
    """Ids in `task_done`; one entry for each row."""


def check(ledger: Ledger, *, settled: bool = True) -> list[str]:
    """Return the contradictions, one line each, sorted.

    - a row, and the upstream has not accepted that message (spec.md, invariant 1);
    - 2yz to the client and not exactly one row (invariant 2);
    - two rows for one message;
    - an acceptance without a row (invariant 3), where `settled`: the relay had the time to learn of it and
      was not killed between the upstream's reply and the commit;
    - a message that the upstream got twice for one client send (invariant 4);
    - an id that no client sent.
    """
    accepted, refused, rows = Counter(ledger.accepted), Counter(ledger.refused), Counter(ledger.rows)
    wrong = []
    for key in sorted(ledger.told.keys() | accepted.keys() | refused.keys() | rows.keys()):
        code = ledger.told.get(key)
        if key not in ledger.told:
            wrong.append(f"{key}: no client sent it")
        if rows[key] and not accepted[key]:
            wrong.append(f"{key}: a row, but the upstream has not accepted it")
        if rows[key] > 1:
            wrong.append(f"{key}: {rows[key]} rows")
        if code is not None and 200 <= code < 300 and rows[key] == 0:
            wrong.append(f"{key}: the client was told {code}, and there is no row")
        elif settled and accepted[key] and rows[key] == 0:
            wrong.append(f"{key}: accepted by the upstream, and there is no row")
        if (times := accepted[key] + refused[key]) > 1:
            wrong.append(f"{key}: the upstream got it {times} times")
    return wrong


def id_of(content: bytes) -> str:
    """Return the id in a message's header section; ValueError unless there is exactly one."""
    head, _, _ = content.partition(b"\r\n\r\n")
    found: list[bytes] = _ID.findall(head)
    if len(found) != 1 or not found[0]:
        raise ValueError(f"{len(found)} {ID_HEADER} headers in {head[:200]!r}")
    return found[0].decode("ascii")
