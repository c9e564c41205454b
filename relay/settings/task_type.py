"""The keys of `[task_type]` and its rules: how a message's task type is found. No I/O."""

from __future__ import annotations

from pydantic import field_validator

from relay.settings.kinds import HeaderName, TaskTypeName
from relay.settings.section import Section

__all__ = ["TaskTypeRule", "TaskTypeSettings"]


class TaskTypeRule(Section):
    """A task type for what one sender sends."""

    sender: str
    """Reverse-path that the rule is for, without angle brackets; empty for the null reverse-path."""
    type: TaskTypeName
    """The task type."""

    @field_validator("sender")
    @classmethod
    def _path(cls, value: str) -> str:
        if not value.isprintable() or value.startswith("<") or value.endswith(">"):
            raise ValueError("must be an address without angle brackets")
        return value


class TaskTypeSettings(Section):
    """How a message's task type is found: from the first header present, else by rule, else the default."""

    headers: tuple[HeaderName, ...] = (
        "X-Task-Type",
        "X-MC-Tags",
        "X-Mailgun-Tag",
        "X-PM-Tag",
        "X-SES-Message-Tags",
        "X-SMTPAPI",
    )
    """Headers that name the task type, the first one present wins."""
    default: TaskTypeName = "unclassified"
    """The task type of a message that neither a header nor a rule names."""
    id_header: HeaderName = "X-Task-ID"
    """Header with the application's own id of the task, kept in client_task_id."""
    rules: tuple[TaskTypeRule, ...] = ()
    """Task types by sender."""

    @property
    def known_at_mail(self) -> tuple[str, ...]:
        """The types that can be known before there is a header: by rule, and the default if none is read."""
        of_rules = [rule.type for rule in self.rules]
        return tuple(dict.fromkeys(of_rules if self.headers else [*of_rules, self.default]))
