"""The rules that the settings ask for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from relay.limits.rule import Aliases, Patterns, Rule, Unit
from relay.settings import ExceptionSettings, LimitSettings

__all__ = ["rules_of"]


def rules_of(limits: Iterable[LimitSettings], aliases: Aliases) -> Sequence[Rule]:
    """Return what the limits count."""
    return [_rule(limit, aliases) for limit in limits]


def _rule(limit: LimitSettings, aliases: Aliases) -> Rule:
    unit, maximum = _maximum(limit)
    excepted = limit.exceptions or ExceptionSettings()
    return Rule(
        limit.name,
        limit.scope,
        unit,
        maximum,
        limit.per,
        limit.action,
        limit.on_error,
        task_type=_patterns(limit.task_type),
        sender=_patterns(limit.sender, aliases),
        recipient_domain=_patterns(limit.recipient_domain),
        not_task_type=_patterns(excepted.task_type),
        not_sender=_patterns(excepted.sender, aliases),
        not_client=_patterns(excepted.client),
        not_recipient=_patterns(excepted.recipient, aliases),
    )


def _maximum(limit: LimitSettings) -> tuple[Unit, int]:
    if limit.max_recipients is not None:
        return "recipients", limit.max_recipients
    return ("messages", limit.max) if limit.max is not None else ("octets", limit.max_bytes or 0)


def _patterns(texts: Sequence[str] | None, aliases: Aliases = lambda _: ()) -> Patterns | None:
    if texts is None:
        return None
    whole = [text for text in texts if text != "<>" and not any(each in text for each in "*?")]
    return Patterns([*texts, *(alias for text in whole for alias in aliases(text))])
