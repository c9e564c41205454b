"""What differs between two configurations, by the names that the file has for it."""

from __future__ import annotations

from typing import Any

import pytest

from relay.settings import RESTART, Settings, compare
from tests.conftest import merged

BASE: dict[str, Any] = {
    "server": {"hostname": "relay.test"},
    "upstreams": [
        {
            "address": "127.0.0.1:25",
            "tls": "none",
            "username": "relay",
            "token": {"url": "https://token.test/", "client_id": "1", "client_secret": "one"},
        },
        {"address": "127.0.0.1:26", "tls": "none", "username": "relay", "password": "one"},
    ],
    "listeners": [{"address": "127.0.0.1:2525"}, {"address": "unix:/run/relay.sock"}],
    "task_type": {"rules": [{"sender": "a", "type": "b"}]},
}


def settings(**over: Any) -> Settings:
    found = merged(BASE, over)
    found["upstreams"] = [
        {**upstream, "name": name} for upstream, name in zip(found["upstreams"], "ab", strict=False)
    ]
    return Settings.model_validate(found)


def upstreams(index: int, **over: Any) -> dict[str, Any]:
    found = [dict(each) for each in BASE["upstreams"]]
    found[index] = merged(found[index], over)
    return {"upstreams": found}


@pytest.mark.parametrize(
    ("over", "names"),
    [
        ({}, ()),
        (
            {"server": {"hostname": "other.test", "max_recipients": 7}},
            ("server.hostname", "server.max_recipients"),
        ),
        ({"server": {"idle_timeout": "300s"}}, ()),  # the same in other words
        ({"listeners": [{"address": "127.0.0.1:2525"}]}, ("listeners",)),
        (
            {"listeners": [{"address": "127.0.0.1:2526"}, {"address": "unix:/run/relay.sock"}]},
            ("listeners.0.address",),
        ),
        (upstreams(1, password="two"), ("upstreams.1.password",)),
        (upstreams(0, token={"client_secret": "two"}), ("upstreams.0.token.client_secret",)),
        ({"upstreams": BASE["upstreams"][:1]}, ("upstreams",)),
        ({"retention": {"by_type": {"digest": "1d"}}}, ("retention.by_type",)),
        ({"task_type": {"rules": [{"sender": "a", "type": "c"}]}}, ("task_type.rules.0.type",)),
        ({"clients": {"allow": ["192.0.2.1"]}}, ("clients.allow",)),
        ({"clients": {"allow": ["127.0.0.0/8", "::1"]}}, ()),
    ],
)
def test_names(over: dict[str, Any], names: tuple[str, ...]) -> None:
    changes = compare(settings(), settings(**over))
    assert changes.names == names
    assert changes.restart == ()


def test_a_token_instead_of_none_is_one_change() -> None:
    without = [{**BASE["upstreams"][0], "token": None, "password": "one"}, BASE["upstreams"][1]]
    changes = compare(settings(upstreams=without), settings())
    assert changes.names == ("upstreams.0.token", "upstreams.0.password")
    assert "one" not in str(changes.names)


@pytest.mark.parametrize("key", RESTART)
def test_what_takes_a_restart_keeps_its_value(key: str) -> None:
    values: dict[str, Any] = {"url": "sqlite:///other.db", "spool": "other", "reuse_port": True}
    values |= {"relay": "another", "password": "sesame", "password_file": "password"}
    values |= {"recipients": "hashed", "recipients_key": "fedcba9876543210", "recipients_key_file": "key"}
    section, _, name = key.partition(".")
    base = (
        {"url": "postgresql://relay@db/relay", "recipients_key": "0123456789abcdef"}
        if section == "records"
        else {}
    )
    before = settings(**{section: base})
    changes = compare(before, settings(**{section: base | {name: values[name]}, "log": {"level": "debug"}}))
    assert changes.restart == (key,)
    assert changes.names == ("log.level",)
    assert changes.settings.log.level == "debug"
    assert getattr(getattr(changes.settings, section), name) == getattr(getattr(before, section), name)


def test_what_takes_a_restart_can_be_taken_back() -> None:
    before = settings()
    after = compare(before, settings(records={"url": "sqlite:///other.db"})).settings
    assert compare(after, before).restart == ()


def test_touch() -> None:
    changes = compare(settings(), settings(server={"hostname": "other.test"}, log={"level": "debug"}))
    assert changes.touch("server")
    assert changes.touch("expiry", "server.hostname")
    assert not changes.touch("server.host", "lo", "upstreams")
