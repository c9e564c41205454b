"""Values and parts that follow from the settings alone, at the start and at every reload."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.classify import Classifier
from relay.pseudonyms import Pseudonyms
from relay.records.retention import Retention
from relay.session.tls import Certificate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relay.settings import Settings

__all__ = ["aliases", "certificate", "classifier", "pseudonyms", "retention", "task_types"]


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
    for limit in settings.limits:
        texts = [*(limit.task_type or ()), *((limit.exceptions and limit.exceptions.task_type) or ())]
        named += [text for text in texts if not any(wildcard in text for wildcard in "*?")]
    return list(dict.fromkeys(named))


def pseudonyms(settings: Settings) -> Pseudonyms | None:
    """Return what gives recipients their pseudonyms, None where they are kept by their addresses."""
    key = settings.records.recipients_key
    if settings.records.recipients != "hashed" or key is None:
        return None
    return Pseudonyms(key.get_secret_value())


def aliases(settings: Settings, address: str) -> tuple[str, ...]:
    """Return what else an address may be kept as: under the key, whether or not that is in use now."""
    key = settings.records.recipients_key
    return () if key is None else Pseudonyms(key.get_secret_value()).aliases(address)


def retention(settings: Settings) -> Retention:
    """Return how long rows are kept."""
    return Retention.of_seconds(settings.retention.default, settings.retention.by_type)
