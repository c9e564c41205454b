"""What sends can be counted by."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["By"]


class By(StrEnum):
    """What is counted by."""

    TYPE = "type"
    SENDER = "sender"
    RECIPIENT_DOMAIN = "recipient-domain"
    CLIENT = "client"
    UPSTREAM = "upstream"
    HOUR = "hour"
    DAY = "day"

    @property
    def time(self) -> bool:
        """Whether it is a time."""
        return self in (By.HOUR, By.DAY)
