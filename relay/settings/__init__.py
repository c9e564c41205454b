"""The configuration: one TOML file, the environment over it, checked as a whole before anything starts."""

from relay.settings.changes import RESTART, Changes, compare
from relay.settings.limits import ExceptionSettings, LimitSettings
from relay.settings.load import DEV_UPSTREAM, SettingsError, load
from relay.settings.model import (
    ClientSettings,
    ExpirySettings,
    HttpSettings,
    ListenerSettings,
    LogSettings,
    MatchSettings,
    RecordSettings,
    RetentionSettings,
    ServerSettings,
    Settings,
    TaskTypeRule,
    TaskTypeSettings,
    TlsSettings,
    TokenSettings,
    UpstreamSettings,
)
from relay.settings.networks import Network
from relay.settings.schema import schema

__all__ = [
    "DEV_UPSTREAM",
    "RESTART",
    "Changes",
    "ClientSettings",
    "ExceptionSettings",
    "ExpirySettings",
    "HttpSettings",
    "LimitSettings",
    "ListenerSettings",
    "LogSettings",
    "MatchSettings",
    "Network",
    "RecordSettings",
    "RetentionSettings",
    "ServerSettings",
    "Settings",
    "SettingsError",
    "TaskTypeRule",
    "TaskTypeSettings",
    "TlsSettings",
    "TokenSettings",
    "UpstreamSettings",
    "compare",
    "load",
    "schema",
]
