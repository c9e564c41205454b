"""Values and parts that follow from the settings alone, at the start and at every reload."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.classify import Classifier
from relay.limits.rule import Patterns, Rule, Unit
from relay.records.retention import Retention
from relay.session.tls import Certificate
from relay.settings import ExceptionSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relay.settings import LimitSettings, Settings

__all__ = ["certificate", "classifier", "retention", "rules", "task_types"]


def certificate(settings: Settings) -> Certificate | None:
    """Return the certificate of the listeners, None where none has TLS; raises CertificateError."""
    tls = settings.tls
    if tls.cert is None or tls.key is None or all(each.tls == "none" for each in settings.listeners):
        return None
    return Certificate(tls.cert, tls.key)


def classifier(settings: Settings) -> Classifier:
    """Return what finds a message's task type."""
    found = settings.task_type
    return Classifier(
        headers=found.headers,
        default=found.default,
        id_header=found.id_header,
        rules=[(rule.sender or "<>", rule.type) for rule in found.rules],
        keep=settings.records.headers,
    )


def task_types(settings: Settings) -> Sequence[str]:
    """Return the task types that the settings name; they have metrics of their own."""
    named = [settings.task_type.default, *settings.retention.by_type]
    named += [rule.type for rule in settings.task_type.rules]
    return list(dict.fromkeys(named))


def retention(settings: Settings) -> Retention:
    """Return how long rows are kept."""
    return Retention.of_seconds(settings.retention.default, settings.retention.by_type)


def rules(settings: Settings) -> Sequence[Rule]:
    """Return what the limits count."""
    return [_rule(limit) for limit in settings.limits]


def _rule(limit: LimitSettings) -> Rule:
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
        sender=_patterns(limit.sender),
        recipient_domain=_patterns(limit.recipient_domain),
        not_task_type=_patterns(excepted.task_type),
        not_sender=_patterns(excepted.sender),
        not_client=_patterns(excepted.client),
        not_recipient=_patterns(excepted.recipient),
    )


def _maximum(limit: LimitSettings) -> tuple[Unit, int]:
    if limit.max_recipients is not None:
        return "recipients", limit.max_recipients
    return ("messages", limit.max) if limit.max is not None else ("octets", limit.max_bytes or 0)


def _patterns(texts: Sequence[str] | None) -> Patterns | None:
    return None if texts is None else Patterns(texts)
