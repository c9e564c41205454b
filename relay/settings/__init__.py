"""The configuration: one TOML file, the environment over it, checked as a whole before anything starts."""

from relay.settings.changes import RESTART, Changes, compare
from relay.settings.clients import ClientSettings
from relay.settings.http import HttpSettings
from relay.settings.limits import ExceptionSettings, LimitSettings
from relay.settings.listeners import ListenerSettings, TlsSettings
from relay.settings.load import DEV_UPSTREAM, SettingsError, load
from relay.settings.log import LogSettings
from relay.settings.model import Settings
from relay.settings.networks import Network
from relay.settings.records import RecordSettings, check_url
from relay.settings.retention import ExpirySettings, RetentionSettings
from relay.settings.schema import schema
from relay.settings.server import ServerSettings
from relay.settings.task_type import TaskTypeRule, TaskTypeSettings
from relay.settings.tokens import TokenSettings
from relay.settings.upstreams import MatchSettings, UpstreamSettings

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
    "check_url",
    "compare",
    "load",
    "schema",
]
