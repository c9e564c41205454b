"""Erases a person from the records: as sender, as recipient, and wherever else the address stands.

Rules. A send of the person's own, or to nobody else, goes as a whole; one that went to others too stays,
without the person's row and without the address in what servers said, in kept headers and in refused
recipients. Work is cut into short transactions, beside relays that run; whoever is cut off in the middle
begins again. `names` are all spellings: the address, and its pseudonym if there is a key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa

from relay.limits.rule import fold
from relay.records.model import Json
from relay.records.patterns import literal
from relay.records.queries import open_queries
from relay.records.schema import task_done, task_done_recipient, task_in_doubt
from relay.records.store import is_postgres

__all__ = ["GONE", "Eraser", "Forgotten", "forget", "mentions", "open_eraser"]

T = TypeVar("T")

GONE = "(forgotten)"
BATCH = 500
"""Sends of one transaction."""
STRETCH = 20_000
"""Ids that are looked through at a time for a mention."""
_TEXTS = ("sender", "upstream_reply", "message_id", "client_task_id")


class Eraser(Protocol):
    """A database that is changed."""

    async def write(self, work: Callable[[sa.Connection], T], /, *, undo: bool) -> T:
        """Run `work` in one transaction, which `undo` takes back."""

    async def close(self) -> None:
        """End what is open, and leave as little as the database can of what was erased."""


async def open_eraser(url: str) -> Eraser:
    """Return the store at `url`, to be changed; raises StoreError."""
    await (await open_queries(url)).close()  # it is there, and ours
    if is_postgres(url):
        from relay.records.postgres.eraser import PostgresEraser

        return PostgresEraser(url)
    from relay.records.sqlite.eraser import SqliteEraser

    return await SqliteEraser.open(url)


@dataclass(slots=True)
class Forgotten:
    """What was done, or would be."""

    deleted: int = 0
    """Sends that are gone as a whole."""
    changed: int = 0
    """Sends to others too, or that spoke of the address."""
    doubts: int = 0
    """Messages in doubt, the same."""
    ids: set[int] = field(default_factory=set, repr=False)
    """Sends that were changed, to count each once."""


async def forget(
    eraser: Eraser,
    names: Sequence[str],
    *,
    dry_run: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Forgotten:
    """Erase the person of these `names`; with `dry_run` only say what that would do. Raises StoreError."""
    done = Forgotten()
    # As SQLite's lower() has it, which knows no letters but those of ASCII, and as others do.
    folded = list(dict.fromkeys(each for name in names for each in (fold(name), name.lower())))
    after = 0
    while True:
        step = await eraser.write(partial(_erase_sends, names=folded, after=after, done=done), undo=dry_run)
        if step is None:
            break
        after = step
    oldest, newest = await eraser.write(lambda c: c.execute(_ENDS).one(), undo=True)
    first = int(oldest or 1)
    for begin in range(first, int(newest or 0) + 1, STRETCH):
        await eraser.write(partial(_erase_mentions, names=folded, begin=begin, done=done), undo=dry_run)
        if on_progress is not None:
            on_progress(begin - first)
    await eraser.write(lambda c: _erase_doubts(c, folded, done), undo=dry_run)
    done.changed = len(done.ids)
    return done


_ENDS = sa.select(sa.func.min(task_done.c.id), sa.func.max(task_done.c.id))


def _erase_sends(c: sa.Connection, names: Sequence[str], after: int, done: Forgotten) -> int | None:
    """Erase the next sends from or to the person; return the last one's id, None at the end."""
    sends, received = task_done.c, task_done_recipient.c
    own = sa.or_(_is(sends.sender, names), _is(sends.client, names))
    to = sa.select(received.task_done_id).where(_is(received.recipient, names))
    keys = [
        *c.execute(
            sa.select(sends.id)
            .where(sends.id > after, sa.or_(own, sends.id.in_(to)))
            .order_by(sends.id)
            .limit(BATCH)
        ).scalars()
    ]
    if not keys:
        return None
    among = sends.id.in_(keys)
    whole = {*c.execute(sa.select(sends.id).where(among, own)).scalars()}
    c.execute(
        sa.delete(task_done_recipient).where(received.task_done_id.in_(keys), _is(received.recipient, names))
    )
    others = sa.exists().where(received.task_done_id == sends.id)
    whole |= {*c.execute(sa.select(sends.id).where(among, ~others)).scalars()}
    c.execute(sa.delete(task_done).where(sends.id.in_(whole)))  # and with each its recipients
    done.deleted += len(whole)
    done.ids |= {*keys} - whole
    return int(keys[-1])


def _erase_mentions(c: sa.Connection, names: Sequence[str], begin: int, done: Forgotten) -> None:
    """Erase the address from what else is said of the sends with these ids."""
    table = task_done.c
    data = sa.func.lower(sa.cast(sa.type_coerce(table.data, sa.Text()), sa.Text()))
    like = [
        sa.func.lower(column).like(f"%{literal(form)}%", escape="\\")
        for form in _forms(names)
        for column in (table.sender, table.upstream_reply, table.message_id, table.client_task_id)
    ]
    like += [
        data.like(f"%{literal(json.dumps(form, ensure_ascii=False)[1:-1])}%", escape="\\")
        for form in _forms(names)
    ]
    found = (
        c.execute(sa.select(task_done).where(table.id >= begin, table.id < begin + STRETCH, sa.or_(*like)))
        .mappings()
        .all()
    )
    for row in found:
        values: dict[str, Any] = {name: _without(row[name], names) for name in _TEXTS}
        values["data"] = _without_in(row["data"], names)
        changed = {name: value for name, value in values.items() if value != row[name]}
        if changed and _is_persons(row, names):
            continue  # gone, were it not for a dry run
        if changed:
            c.execute(sa.update(task_done).where(table.id == row["id"]).values(changed))
            done.ids.add(row["id"])


def _is_persons(row: Any, names: Sequence[str]) -> bool:
    return row["sender"].lower() in names or row["client"].lower() in names


def _erase_doubts(c: sa.Connection, names: Sequence[str], done: Forgotten) -> None:
    """The same for the messages in doubt, which are few."""
    table = task_in_doubt.c
    for row in c.execute(sa.select(task_in_doubt)).mappings().all():
        recipients = [each for each in row["recipients"] if each.lower() not in names]
        if _is_persons(row, names) or (row["recipients"] and not recipients):
            c.execute(sa.delete(task_in_doubt).where(table.id == row["id"]))
            done.doubts += 1
            continue
        values: dict[str, Any] = {
            name: _without(row[name], names) for name in ("sender", "reason", "message_id", "client_task_id")
        }
        values |= {"recipients": recipients, "data": _without_in(row["data"], names)}
        changed = {name: value for name, value in values.items() if value != row[name]}
        if changed:
            c.execute(sa.update(task_in_doubt).where(table.id == row["id"]).values(changed))
            done.doubts += 1


def mentions(value: Json, names: Sequence[str]) -> bool:
    """Whether one of the names stands anywhere in a value."""
    return _without_in(value, [name.lower() for name in names]) != value


def _is(column: sa.ColumnElement[str], names: Sequence[str]) -> sa.ColumnElement[bool]:
    return sa.func.lower(column).in_([sa.func.lower(name) for name in names])


def _forms(names: Sequence[str]) -> list[str]:
    """Return the names, and the form in which each stands in a return path."""
    return [*names, *("=".join(name.rsplit("@", 1)) for name in names if "@" in name)]


def _without(text: str | None, names: Sequence[str]) -> str | None:
    if text is None:
        return None
    for form in _forms(names):
        # Not the end of a longer local part, nor the beginning of a longer domain: that is somebody else.
        # In a return path + and - stand before the person, and - behind.
        before, behind = (r"\w.+-", r"[\w-]") if "@" in form else (r"\w.", r"\w")
        text = re.sub(rf"(?<![{before}]){re.escape(form)}(?!{behind}|\.\w)", GONE, text, flags=re.IGNORECASE)
    return text


def _without_in(value: Json, names: Sequence[str]) -> Json:
    """Return a value of JSON without the names; a refused recipient who has one goes with the reply."""
    if isinstance(value, str):
        return _without(value, names)
    if isinstance(value, dict):
        return {key: _without_in(each, names) for key, each in value.items()}
    if isinstance(value, list):
        return [
            _without_in(each, names)
            for each in value
            if not (isinstance(each, dict) and str(each.get("recipient", "")).lower() in names)
        ]
    return value
