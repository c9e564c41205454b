"""The mail log: one function for each event of the relay, plain values in, one line out.

Rules: a line is always exactly one line of printable characters, whatever clients, upstreams and errors put
into the values; octets that are no UTF-8 and characters that do not print come out as backslash escapes, in
JSON and on the console alike. Values are bounded. Secrets do not get in: passwords are cut out of URLs, and
settings that are secret by their name are hidden. Logging never raises: a log that cannot be written must
not turn accepted mail into an error. The libraries that write clients' octets raw are silenced, the others
come out here. Lines keep their order; those of one turn of the event loop are written together, but an error
is written at once, with all that waits before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from relay.exhausted import exhausted
from relay.maillog.destination import configure, current, flush
from relay.maillog.facts import Facts, Wire
from relay.maillog.line import message_line
from relay.maillog.values import MAX_ITEMS, error_text, row_text, traceback_text, without_secrets
from relay.outcome import Outcome
from relay.records.model import Doubt, Entry, Record

__all__ = [
    "Facts",
    "certificate_read",
    "certificate_refused",
    "configure",
    "draining",
    "expiry_behind",
    "expiry_done",
    "expiry_failed",
    "expiry_progress",
    "failover",
    "flush",
    "found_in_journal",
    "hurrying",
    "in_doubt",
    "limit_hit",
    "limits_counted_again",
    "limits_not_counted",
    "listening",
    "login",
    "login_refused",
    "reload_ignored",
    "reload_refused",
    "reload_takes_restart",
    "reloaded",
    "retention_changed",
    "retention_differs",
    "retention_shortened",
    "row_lost",
    "session_refused",
    "settings",
    "started",
    "stopped",
    "transaction",
    "unforeseen",
    "upstream_connected",
    "upstream_down",
    "upstream_drained",
    "upstream_failed",
    "upstream_full",
    "upstream_retired",
    "upstream_up",
    "user_not_checked",
    "users_not_read",
    "users_read",
    "warning",
    "xforward_refused",
]


# ---------------------------------------------------------------------------------------------- life


def started(
    version: str,
    listeners: Sequence[str],
    upstreams: Sequence[str],
    store: str,
    http: str | None,
    *,
    compiled: bool,
) -> None:
    """The relay runs: its addresses, its upstreams by name and address, the store's URL; is it compiled?"""
    current.log.info(
        "started",
        version=version,
        compiled=compiled,
        listeners=listeners,
        upstreams=upstreams,
        store=store,
        http=http,
    )


def listening(address: str) -> None:
    """One listener (or the HTTP side) is bound to `address`."""
    current.log.info("listening", address=address)


def draining(sessions: int, timeout_s: float) -> None:
    """No new sessions; those that are open have `timeout_s` seconds to finish."""
    current.log.info("draining", sessions=sessions, timeout_s=timeout_s)


def hurrying() -> None:
    """The drain ends now; what the upstream has not answered yet is in doubt."""
    current.log.warning("hurrying")


def stopped() -> None:
    """The relay has ended in order."""
    current.log.info("stopped")
    flush()


def settings(effective: Mapping[str, Any]) -> None:
    """The settings in force, secrets hidden."""
    current.log.info("settings", **{section: without_secrets(value) for section, value in effective.items()})


def reloaded(changed: Sequence[str]) -> None:
    """The configuration was read again and is in force; `changed` are the names of the keys that did."""
    current.log.info("reloaded", changed=changed)


def reload_takes_restart(keys: Sequence[str]) -> None:
    """These keys have changed, and the values that the relay was started with stay in force."""
    current.log.warning("reload: takes a restart", keys=keys)


def reload_refused(reason: str) -> None:
    """The configuration was read again and cannot be used; nothing has changed. One line for each mistake."""
    current.log.error("reload refused", reason=reason)


def reload_ignored(reason: str) -> None:
    """The configuration was not read again."""
    current.log.warning("reload ignored", reason=reason)


def warning(text: str) -> None:
    """Something that the operator should know and that has no event of its own."""
    current.log.warning("warning", text=text)


def unforeseen(where: str, task_id: UUID | str | None, error: BaseException) -> None:
    """An error that nobody foresaw, with its traceback; `where` names the step that it ended.

    Where it comes of a limit of this process, that is told, and what to raise.
    """
    if (limit := exhausted(error)) is not None:
        current.log.error(
            "limit reached", where=where, task_id=task_id, reason=limit, error=error_text(error)
        )
        return
    current.log.error(
        "unforeseen", where=where, task_id=task_id, error=error_text(error), traceback=traceback_text(error)
    )


# ---------------------------------------------------------------------------------- sessions and mail


def session_refused(peer: str, listener: str, reason: str, detail: str | None = None) -> None:
    """A client was turned away, or its session was ended."""
    current.log.info("session refused", peer=peer, listener=listener, reason=reason, detail=detail)


def login(user: str, client: str, listener: str) -> None:
    """A client has logged in."""
    current.log.info("login", user=user, client=client, listener=listener)


def login_refused(outcome: str, user: str, client: str, listener: str, reply: Wire) -> None:
    """A client could not log in; `user` is whom it said to be."""
    current.log.warning(
        "login refused", outcome=outcome, user=user, client=client, listener=listener, reply=reply
    )


def certificate_read(not_after: str) -> None:
    """The listeners' certificate was read again."""
    current.log.info("certificate read", not_after=not_after)


def certificate_refused(reason: str) -> None:
    """The listeners' new certificate cannot be used; the one before stays in use."""
    current.log.error("certificate refused", reason=reason)


def transaction(outcome: Outcome, facts: Facts) -> None:
    """The one line of a message, made of its facts."""
    _bound(facts)
    level, write = current.direct[outcome]
    if write is not None and (line := message_line(level, outcome, facts)) is not None:
        write(line)
    else:
        getattr(current.log, level)("message", fields=facts)


def in_doubt(reason: str, facts: Facts) -> None:
    """The verdict on a message is overdue: it is still awaited, and the message's line comes with it."""
    _bound(facts)
    current.log.warning("in doubt", fields={**facts, "reason": reason, "awaited": True})


def _bound(facts: Facts) -> None:
    facts["recipients"] = facts["recipients"][:MAX_ITEMS]
    if "refused" in facts:
        facts["refused"] = facts["refused"][:MAX_ITEMS]


def found_in_journal(doubt: Doubt) -> None:
    """A message was under way when the relay was killed: it is in doubt, unless it has its row."""
    fields = {
        "task_id": doubt.task_id,
        "client": doubt.client,
        "sender": doubt.sender,
        "recipients": doubt.recipients[:MAX_ITEMS],
        "recipient_count": doubt.data.get("recipient_count", len(doubt.recipients)),
        "task_type": doubt.task_type,
        "message_id": doubt.message_id,
        "size": doubt.size,
        "upstream": doubt.upstream,
        "since": doubt.since.isoformat(),
        "reason": doubt.reason,
        "awaited": False,
    }
    current.log.warning("in doubt", fields=fields)


# ---------------------------------------------------------------------------------------------- users


def users_read(file: str, users: int) -> None:
    """The file of users has changed: it has `users` of them, and they are in force."""
    current.log.info("users read", file=file, users=users)


def users_not_read(file: str, reasons: Sequence[str]) -> None:
    """The file of users has changed and cannot be used; the users that were stay in force."""
    current.log.error("users not read", file=file, reasons=reasons)


def user_not_checked(file: str, user: str, reason: str) -> None:
    """A password could not be held against the user's hash."""
    current.log.error("user not checked", file=file, user=user, reason=reason)


# ------------------------------------------------------------------------------------------ upstreams


def upstream_connected(name: str, address: str, reason: Wire) -> None:
    """A connection to an upstream is ready; `reason` is `tls` of its settings."""
    current.log.debug("upstream connected", upstream=name, address=address, reason=reason)


def upstream_failed(name: str, address: str, reason: Wire) -> None:
    """An upstream could not be connected to."""
    current.log.warning("upstream failed", upstream=name, address=address, reason=reason)


def upstream_full(name: str, address: str, reason: Wire, allowed: int, most: int) -> None:
    """An upstream takes no more connections than `allowed`, of the `most` that the settings say."""
    current.log.warning(
        "upstream full", upstream=name, address=address, reason=reason, allowed=allowed, max_connections=most
    )


def upstream_down(name: str, address: str, reason: Wire, pause_s: float) -> None:
    """An upstream has failed too often: messages do not go there, the next try is in `pause_s` seconds."""
    current.log.error(
        "upstream down", upstream=name, address=address, reason=reason, pause_s=round(pause_s, 1)
    )


def upstream_up(name: str, address: str) -> None:
    """An upstream that was down can be connected to again."""
    current.log.info("upstream up", upstream=name, address=address)


def upstream_drained(name: str, address: str) -> None:
    """No transaction is left on an upstream that gets no new ones."""
    current.log.info("upstream drained", upstream=name, address=address)


def failover(task_id: UUID | str, name: str, to: str, reason: Wire) -> None:
    """A message goes on to another upstream: the one that was tried has not answered MAIL."""
    current.log.warning("failover", task_id=task_id, upstream=name, to=to, reason=reason)


def xforward_refused(name: str, address: str, reason: Wire) -> None:
    """An upstream that offers XFORWARD did not take it; mail goes on without, on that connection."""
    current.log.warning("xforward refused", upstream=name, address=address, reason=reason)


def upstream_retired(name: str, address: str, reason: Wire) -> None:
    """A connection to an upstream was closed instead of kept."""
    current.log.debug("upstream retired", upstream=name, address=address, reason=reason)


# -------------------------------------------------------------------------------------------- records


def limit_hit(
    task_id: UUID,
    *,
    limit: str,
    action: str,
    key: str,
    used: int,
    maximum: int,
    unit: str,
    window_s: float,
) -> None:
    """A rate limit was reached for `key`; `action` is what that meant for the message, or for a recipient."""
    current.log.info(
        "limit hit",
        task_id=str(task_id),
        limit=limit,
        action=action,
        key=key,
        used=used,
        maximum=maximum,
        unit=unit,
        window_s=window_s,
    )


def limits_not_counted(reason: str) -> None:
    """The store cannot be asked for what was sent: limits go by what the relay knows, or defer."""
    current.log.warning("limits not counted", reason=reason)


def limits_counted_again() -> None:
    """The store answers again."""
    current.log.warning("limits counted again")


def row_lost(entry: Entry, reason: str) -> None:
    """Neither the store nor the spool could keep this entry: it is here, whole, and nowhere else."""
    kind = "record" if isinstance(entry, Record) else "doubt" if isinstance(entry, Doubt) else "settled"
    current.log.error("row lost", task_id=entry.task_id, kind=kind, reason=reason, row=row_text(entry))


def expiry_done(rows: int, seconds: float) -> None:
    """An expiry run has deleted `rows`."""
    current.log.info("expiry done", rows=rows, seconds=seconds)


def expiry_progress(rows: int, seconds: float, lag_s: float) -> None:
    """A long expiry run has deleted `rows` so far; the oldest row left is due for `lag_s` seconds."""
    current.log.info("expiry progress", **_progress(rows, seconds, lag_s))


def expiry_behind(rows: int, seconds: float, lag_s: float) -> None:
    """An expiry run takes longer than the interval between two: rows may expire faster than they go."""
    current.log.warning("expiry behind", **_progress(rows, seconds, lag_s))


def _progress(rows: int, seconds: float, lag_s: float) -> dict[str, float]:
    return {
        "rows": rows,
        "seconds": round(seconds, 1),
        "rows_per_s": round(rows / max(seconds, 0.001), 1),
        "lag_s": round(lag_s, 1),
    }


def expiry_failed(reason: str) -> None:
    """An expiry run failed; the next one comes at its time."""
    current.log.error("expiry failed", reason=reason)


def retention_changed(rows: int) -> None:
    """The retention settings changed; `rows` rows follow them now."""
    current.log.info("retention changed", rows=rows)


def retention_shortened(rows: int) -> None:
    """The retention settings became shorter: the next expiry run will delete `rows` rows for it."""
    current.log.warning("retention shortened", rows=rows)


def retention_differs(relays: list[str]) -> None:
    """Other relays on the store keep rows longer: so does this one, as long as they say so."""
    current.log.warning("retention differs, the longer holds", relays=relays)
