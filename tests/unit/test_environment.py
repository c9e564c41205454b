from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import pytest

from relay.settings import Settings, SettingsError, load

FILE = """
[[upstreams]]
address = "smtp.example.com:587"
[retention.by_type]
Mention = "90d"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "relay.toml"
    path.write_text(FILE)
    return path


def changed(file: Path, **environ: str) -> Settings:
    return load(file, environ)


def test_values_are_read_as_the_type_that_the_key_wants(file: Path) -> None:
    settings = changed(
        file,
        RELAY__SERVER__HOSTNAME="relay.example.com",
        RELAY__SERVER__MAX_RECIPIENTS="5",
        RELAY__SERVER__MAX_MESSAGE_SIZE="1000",
        RELAY__SERVER__MIN_DATA_RATE="1KiB",
        RELAY__SERVER__IDLE_TIMEOUT="200ms",
        RELAY__SERVER__REUSE_PORT="TRUE",
        RELAY__RECORDS__SPOOL="/var/spool/relay",
        RELAY__RETENTION__DEFAULT="never",
    )

    assert settings.server.hostname == "relay.example.com"
    assert settings.server.max_recipients == 5
    assert settings.server.max_message_size == 1000
    assert settings.server.min_data_rate == 1024
    assert settings.server.idle_timeout == 0.2
    assert settings.server.reuse_port is True
    assert settings.records.spool == Path("/var/spool/relay")
    assert settings.retention.default is None


def test_the_environment_stands_over_the_file(file: Path) -> None:
    settings = changed(file, RELAY__UPSTREAMS__0__ADDRESS="[::1]:25", RELAY__UPSTREAMS__0__TLS="none")

    assert settings.upstreams[0].address == "[::1]:25"
    assert settings.upstreams[0].tls == "none"


def test_the_environment_alone_is_enough() -> None:
    settings = load(None, {"RELAY__UPSTREAMS__0__ADDRESS": "smtp.example.com:587"})

    assert settings.upstreams[0].name == "smtp.example.com"


def test_other_variables_do_not_matter(file: Path) -> None:
    plain = load(file, {})

    assert changed(file, RELAY_CONFIG="x", RELAY="y", relay__server__hostname="z", PATH="/bin") == plain


@pytest.mark.parametrize(
    "text",
    [
        "10.0.0.0/8,192.0.2.1",
        " 10.0.0.0/8 , 192.0.2.1 ,",
        '["10.0.0.0/8", "192.0.2.1"]',
        "['10.0.0.0/8', '192.0.2.1',]",
        '["10.0.0.0\\/8", "192.0.2.1"]',
    ],
)
def test_a_list_is_written_with_commas_or_as_in_toml(file: Path, text: str) -> None:
    allow = changed(file, RELAY__CLIENTS__ALLOW=text).clients.allow

    assert allow == (ip_network("10.0.0.0/8"), ip_network("192.0.2.1/32"))


def test_a_list_of_tables_is_written_as_in_toml(file: Path) -> None:
    rules = changed(
        file, RELAY__TASK_TYPE__RULES='[{sender = "digest@example.com", type = "digest"}]'
    ).task_type.rules

    assert [(rule.sender, rule.type) for rule in rules] == [("digest@example.com", "digest")]


def test_one_network(file: Path) -> None:
    assert changed(file, RELAY__CLIENTS__ALLOW__0="10.0.0.0/8").clients.allow == (ip_network("10.0.0.0/8"),)


def test_an_empty_list(file: Path) -> None:
    assert changed(file, RELAY__RECORDS__HEADERS="").records.headers == ()


def test_list_entries_by_number_in_any_order(file: Path) -> None:
    environ = {
        f"RELAY__RECORDS__HEADERS__{index}": f"X-{index}" for index in (10, 2, 0, 1, 9, 3, 8, 4, 7, 5, 6)
    }

    assert load(file, environ).records.headers == tuple(f"X-{index}" for index in range(11))


def test_a_further_listener(file: Path) -> None:
    settings = changed(
        file, RELAY__LISTENERS__0__ADDRESS="127.0.0.1:2525", RELAY__LISTENERS__1__ADDRESS="[::1]:2525"
    )

    assert [(listener.host, listener.port) for listener in settings.listeners] == [
        ("127.0.0.1", 2525),
        ("::1", 2525),
    ]


def test_free_names_are_those_of_the_file_or_lower_case(file: Path) -> None:
    settings = changed(
        file, RELAY__RETENTION__BY_TYPE__MENTION="1d", RELAY__RETENTION__BY_TYPE__DIGEST="never"
    )

    assert settings.retention.by_type == {"Mention": 86_400, "digest": None}


def test_a_mistake_is_reported_where_it_was_made(file: Path) -> None:
    file.write_text('[server]\nmax_recipients = "a"\n' + FILE)

    with pytest.raises(SettingsError) as caught:
        changed(file, RELAY__SERVER__MAX_CONNECTIONS="b", RELAY__="x", RELAY__RETENTION__BY_TYPE__="1d")

    assert caught.value.problems == [
        "environment RELAY__: : unknown key",
        "environment RELAY__RETENTION__BY_TYPE__: retention.by_type: an empty name is no key",
        f"{file}: server.max_recipients: must be a whole number",
        "environment RELAY__SERVER__MAX_CONNECTIONS: server.max_connections: must be a whole number",
    ]


def test_what_is_not_utf_8_is_refused(file: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        changed(
            file,
            RELAY__UPSTREAMS__0__PASSWORD="sesame\udcff",
            RELAY__RECORDS__URL="sqlite:////data/\udcff.db",
            RELAY__LOG__LEVEL="\udcff",
            RELAY__CLIENTS__ALLOW="\udcff",
        )

    assert caught.value.problems == [
        "environment RELAY__CLIENTS__ALLOW: clients.allow: is not UTF-8",
        "environment RELAY__LOG__LEVEL: log.level: is not UTF-8",
        "environment RELAY__RECORDS__URL: records.url: is not UTF-8",
        "environment RELAY__UPSTREAMS__0__PASSWORD: upstreams.0.password: is not UTF-8",
    ]
