"""What can go wrong with the store, in the kinds that its callers tell apart."""

from __future__ import annotations

__all__ = [
    "ExpiryBusyError",
    "MissingStoreError",
    "OlderStoreError",
    "RejectedRecordError",
    "SlowReadError",
    "StoreError",
    "UnreachableError",
]


class StoreError(Exception):
    """The store cannot be used now; the text is one line that tells the operator what to change."""


class MissingStoreError(StoreError):
    """There is no store yet, and none was to be made."""


class OlderStoreError(StoreError):
    """The store has the schema of an older version, and was not to be changed."""

    def __init__(self, name: str, version: str) -> None:
        super().__init__(f"{name}: has schema version {version}; the next start brings it up to date")
        self.version = version


class RejectedRecordError(StoreError):
    """The store works, but will never take this data: to try again is of no use."""


class ExpiryBusyError(StoreError):
    """Expired rows are left alone now: another run is at work, or changed retention is being applied."""


class UnreachableError(StoreError):
    """Nobody is there, or nobody who takes rows now; that may change by itself."""


class SlowReadError(StoreError):
    """A read took longer than it may, and was ended."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"takes longer than {seconds:g} s; ask for less, such as a shorter time (since)")
