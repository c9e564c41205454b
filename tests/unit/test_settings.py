from __future__ import annotations

import json
import re
import tomllib
from ipaddress import ip_network
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from relay.settings import (
    DEV_UPSTREAM,
    LimitSettings,
    Settings,
    SettingsError,
    UpstreamSettings,
    load,
    schema,
)

SHIPPED = Path(__file__).parents[2] / "config" / "relay.toml"
UPSTREAM = '[[upstreams]]\naddress = "smtp.example.com:587"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "relay.toml"


def loaded(file: Path, text: str = "") -> Settings:
    file.write_text(UPSTREAM + text)
    return load(file, {})


def test_the_defaults_are_those_of_the_contract(file: Path) -> None:
    effective = loaded(file, '[server]\nhostname = "relay.example.com"\n').effective()

    assert effective["server"] == {
        "hostname": "relay.example.com",
        "max_message_size": "50MiB",
        "max_recipients": 1000,
        "max_connections": 1000,
        "max_connections_per_client": 100,
        "bare_newlines": "normalize",
        "received_header": False,
        "idle_timeout": "5m",
        "min_data_rate": "500B",
        "lease_idle_timeout": "30s",
        "drain_timeout": "30s",
        "reuse_port": False,
    }
    assert effective["listeners"] == [{"address": "127.0.0.1:2525", "tls": "none", "proxy_protocol": False}]
    assert effective["clients"]["allow"] == ["127.0.0.0/8", "::1/128"]
    assert effective["records"] == {
        "url": "sqlite:///data/task_done.db",
        "password_file": None,
        "password": None,
        "relay": "",
        "spool": "data/spool",
        "commit_timeout": "2s",
        "when_unavailable": "spool",
        "headers": ["Message-ID"],
        "recipients": "plain",
        "recipients_key_file": None,
        "recipients_key": None,
    }
    assert effective["retention"] == {"default": "30d", "by_type": {}}
    assert effective["expiry"] == {"interval": "1h", "batch_size": 5000}
    assert effective["http"]["address"] == "127.0.0.1:9025"
    assert effective["log"] == {"format": "json", "level": "info"}


def test_values_are_ready_for_use(file: Path) -> None:
    settings = loaded(file, 'idle_timeout = "90s"\n[retention.by_type]\nmention = "90d"\nkeep = "never"\n')
    upstream = settings.upstreams[0]

    assert (upstream.host, upstream.port, upstream.tls) == ("smtp.example.com", 587, "starttls")
    assert (upstream.idle_timeout, upstream.end_of_data_timeout) == (90, 600)
    assert settings.server.max_message_size == 50 * 1024 * 1024
    assert settings.clients.allow == (ip_network("127.0.0.0/8"), ip_network("::1/128"))
    assert settings.retention.default == 30 * 86_400
    assert settings.retention.by_type == {"mention": 90 * 86_400, "keep": None}
    assert settings.records.spool == Path("data/spool")
    assert settings.server.hostname


@pytest.mark.parametrize(
    ("full", "short", "hostname"),
    [
        ("mail.example.com", "mail", "mail.example.com"),
        ("mail.example.com\udc80", "mail", "mail"),
        ("192.0.2.1", "a b", "localhost"),
    ],
)
def test_a_machine_without_a_usable_name(
    full: str, short: str, hostname: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.getfqdn", lambda: full)
    monkeypatch.setattr("socket.gethostname", lambda: short)

    assert loaded(file).server.hostname == hostname


def test_settings_can_be_made_without_a_file() -> None:
    upstream = UpstreamSettings(address="smtp.example.com:587")
    network = ip_network("10.0.0.0/8")

    settings = Settings.model_validate({"upstreams": [upstream], "clients": {"allow": [network]}})

    assert settings.upstreams == (upstream,)
    assert settings.clients.allow == (network,)
    assert settings.warnings == ()


def test_settings_cannot_be_changed(file: Path) -> None:
    settings = loaded(file)

    with pytest.raises(ValidationError, match="frozen"):
        settings.server.max_recipients = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("address", "name"), [("SMTP.example.com:587", "smtp.example.com"), ("[2001:db8::1]:25", "2001:db8::1")]
)
def test_an_upstream_is_named_by_its_host(address: str, name: str) -> None:
    assert UpstreamSettings(address=address).name == name


@pytest.mark.parametrize("tls", ["none", "opportunistic", "starttls", "implicit"])
def test_without_a_password_every_tls_mode_is_allowed(file: Path, tls: str) -> None:
    assert loaded(file, f'tls = "{tls}"\n').upstreams[0].tls == tls


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_a_password_may_go_in_clear_within_the_machine(file: Path, host: str) -> None:
    file.write_text(f'[[upstreams]]\naddress = "{host}:25"\ntls = "none"\nusername = "u"\npassword = "p"\n')

    assert load(file, {}).upstreams[0].password


def test_when_unavailable_has_two_values(file: Path) -> None:
    assert loaded(file, '[records]\nwhen_unavailable = "refuse"\n').records.when_unavailable == "refuse"


def test_reuse_port(file: Path) -> None:
    assert loaded(file, "[server]\nreuse_port = true\n").server.reuse_port is True


def test_an_absolute_store(file: Path) -> None:
    url = "sqlite:////var/lib/relay/task_done.db"

    assert loaded(file, f'[records]\nurl = "{url}"\n').records.url == url


@pytest.mark.parametrize(
    ("octets", "secret"),
    [
        (b"sesame", "sesame"),
        (b"sesame\n", "sesame"),
        (b"sesame\r\n", "sesame"),
        (b" se same ", " se same "),
        ("Schlüssel\n".encode(), "Schlüssel"),
    ],
)
def test_a_password_comes_from_its_file(file: Path, tmp_path: Path, octets: bytes, secret: str) -> None:
    secret_file = tmp_path / "secret"
    secret_file.write_bytes(octets)
    secret_file.chmod(0o600)

    settings = loaded(file, f'username = "relay"\npassword_file = "{secret_file}"\n')

    password = settings.upstreams[0].password
    assert password is not None
    assert password.get_secret_value() == secret
    assert settings.warnings == ()


def test_a_secret_is_never_shown(file: Path) -> None:
    settings = loaded(file, 'username = "relay"\npassword = "sesame"\n')

    assert settings.effective()["upstreams"][0]["password"] == "**********"
    for text in (repr(settings), str(settings), json.dumps(settings.effective()), settings.model_dump_json()):
        assert "sesame" not in text


def test_a_password_file_that_everyone_can_read_is_worth_a_warning(file: Path, tmp_path: Path) -> None:
    secret_file = tmp_path / "secret"
    secret_file.write_text("sesame\n")
    secret_file.chmod(0o644)

    settings = loaded(file, f'username = "relay"\npassword_file = "{secret_file}"\n')

    assert settings.warnings == (
        f"upstreams.0.password_file: every user of the machine can read {secret_file} (chmod o-r)",
    )


def test_a_configuration_with_secrets_that_everyone_can_read_is_worth_a_warning(file: Path) -> None:
    text = """
        username = "relay"
        password = "sesame"
        [[upstreams]]
        address = "smtp.example.net:587"
        username = "relay"
        [upstreams.token]
        url = "https://login.example.com/token"
        client_id = "relay"
        client_secret = "sesame"
        refresh_token = "sesame"
        [http]
        token = "sesame-sesame-sesame"
        [records]
        url = "postgresql://relay:sesame@db.example.com/relay"
        [retention.by_type]
        password = "9d"
    """
    file.touch(0o600)
    assert loaded(file, text).warnings == ()
    file.chmod(0o644)
    shown = ("upstreams.0.password", "upstreams.1.token.client_secret", "upstreams.1.token.refresh_token")
    assert sorted(loaded(file, text).warnings) == [
        f"{key}: every user of the machine can read {file} (chmod o-r)"
        for key in ("http.token", "records.url", *shown)
    ]


def test_an_exception_that_fits_no_pseudonym_is_worth_a_warning(file: Path) -> None:
    names = [
        "ops-*@example.com",
        "o?s@example.com",
        "ops*",
        "ann@example.com",
        "*@example.com",
        "*.example.org",
    ]
    text = f"""
        [records]
        recipients = "hashed"
        recipients_key = "0123456789abcdef"
        [[limits]]
        scope = "recipient"
        max = 1
        per = "1h"
        exceptions = {{ recipient = {names} }}
    """
    warnings = [each for each in loaded(file, text).warnings if each.startswith("limits")]
    assert [warning.split('"')[1] for warning in warnings] == names[:3]
    assert warnings[0] == (
        'limits.0.exceptions.recipient: "ops-*@example.com" fits no recipient under '
        'records.recipients = "hashed": name whole addresses or a domain ("*@example.com")'
    )
    plain = loaded(file, text.replace('"hashed"', '"plain"')).warnings
    assert not [each for each in plain if "fits no recipient" in each]


def test_an_unverified_upstream_is_worth_a_warning(file: Path) -> None:
    settings = loaded(file, "tls_verify = false\n")

    assert [warning.split(":")[0] for warning in settings.warnings] == ["upstreams.0.tls_verify"]


def test_an_authority_of_ones_own(file: Path, tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(authority))

    settings = loaded(file, f'ca_file = "{authority}"\n')

    assert settings.upstreams[0].ca_file == authority


def test_dev_needs_no_file() -> None:
    settings = load(None, {}, dev_upstream=DEV_UPSTREAM)

    assert [(one.name, one.address, one.tls) for one in settings.upstreams] == [("dev", DEV_UPSTREAM, "none")]
    assert settings.listeners[0].address == "127.0.0.1:2525"
    assert settings.http.address == "127.0.0.1:9025"
    assert settings.records.url == "sqlite:///data/task_done.db"
    assert settings.log.format == "console"
    assert settings.warnings == ()


def test_dev_follows_the_environment() -> None:
    environ = {"RELAY__LOG__FORMAT": "json", "RELAY__LISTENERS__0__ADDRESS": "127.0.0.1:0"}

    settings = load(None, environ, dev_upstream=DEV_UPSTREAM)

    assert settings.log.format == "json"
    assert settings.listeners[0].port == 0


def test_dev_never_sends_real_mail(file: Path) -> None:
    file.write_text(UPSTREAM)
    environ = {"RELAY__UPSTREAMS__0__USERNAME": "relay", "RELAY__UPSTREAMS__7__NAME": "x"}

    settings = load(file, environ, dev_upstream=DEV_UPSTREAM)

    assert [one.address for one in settings.upstreams] == [DEV_UPSTREAM]
    assert settings.log.format == "json"
    assert settings.warnings == ("upstreams: not used with --dev, the built-in upstream takes their place",)


def test_with_the_built_in_upstream_logins_are_its_own(file: Path) -> None:
    file.write_text(
        '[clients]\nauth = "passthrough"\nauth_without_tls = true\npassthrough_to = "one"\n'
        '[[upstreams]]\nname = "one"\naddress = "127.0.0.1:25"\n'
        '[[upstreams]]\nname = "other"\naddress = "127.0.0.1:26"\n'
    )
    assert load(file, {}).clients.passthrough_to == "one"
    settings = load(file, {}, dev_upstream=DEV_UPSTREAM)
    assert [upstream.name for upstream in settings.upstreams] == ["dev"]
    assert settings.clients.passthrough_to is None


def test_without_dev_an_upstream_is_needed() -> None:
    with pytest.raises(SettingsError, match=r"^built-in defaults: upstreams: missing: at least the address"):
        load(None, {})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "relay.toml"

    with pytest.raises(SettingsError) as caught:
        load(missing, {})

    assert str(caught.value) == (
        f"{missing}: no such file: write it (the relay's own config/relay.toml is the commented default), "
        "or give --config FILE"
    )


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(str(tmp_path))}: cannot be read: Is a directory$"):
        load(tmp_path, {})


def test_a_file_of_other_octets(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")

    with pytest.raises(SettingsError, match="is not UTF-8"):
        load(file, {})


def test_a_file_that_begins_with_a_byte_order_mark(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + b'[[upstreams]]\naddress = "smtp.example.com:587"\n')

    assert load(file, {}).upstreams[0].address == "smtp.example.com:587"


def test_the_shipped_file_loads() -> None:
    settings = load(SHIPPED, {})

    assert [one.address for one in settings.upstreams] == ["smtp.example.com:587"]
    assert settings.warnings == ()


def test_the_shipped_file_changes_no_default(file: Path) -> None:
    shipped, plain = load(SHIPPED, {}).effective(), loaded(file).effective()

    assert shipped == plain


def test_the_shipped_file_has_every_key_and_no_other() -> None:
    shipped = {f"{section}.{key}" for section, keys in _uncommented().items() for key in keys}

    assert shipped == set(_keys(Settings))


LIMIT = LimitSettings.model_validate({"scope": "sender", "max": 100, "per": "1d"})


def test_the_shipped_file_shows_the_defaults(file: Path) -> None:
    defaults = loaded(file)
    examples = {"upstreams.name", "server.hostname", "limits.name"}
    for section, keys in _uncommented().items():
        if not section:
            continue
        values = getattr(defaults, section)
        values = (values or (LIMIT,))[0] if isinstance(values, tuple) else values
        for key, text in keys.items():
            default = getattr(values, key)
            if default is not None and f"{section}.{key}" not in examples:
                shown = type(values).model_validate({**values.model_dump(mode="json"), key: text})
                assert getattr(shown, key) == default, f"{section}.{key}"


WORDS = ("", "none", "30s", "1KiB", "127.0.0.1:25", "0.0.0.0/1", "sqlite:///x", "\0", "ä\n", "nowhere")
VALUES = st.recursive(
    st.sampled_from(WORDS) | st.integers(-2, 1 << 70) | st.booleans() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.parametrize("section", Settings.model_fields)
@hypothesis_settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_whatever_a_file_says_it_loads_or_is_refused(section: str, data: st.DataObject) -> None:
    model = _model(Settings.model_fields[section].annotation)
    keys = st.sampled_from([*(model.model_fields if model else ()), "x"])
    table = st.dictionaries(keys, VALUES, max_size=4)
    value = data.draw(table | st.lists(table, max_size=2) | VALUES)
    environ = {
        f"RELAY__{section}__{part}".upper(): text
        for part, text in data.draw(
            st.dictionaries(keys | st.builds("0__{}".format, keys), st.sampled_from(WORDS), max_size=2)
        ).items()
    }
    with TemporaryDirectory() as directory:
        path = Path(directory) / "relay.toml"
        path.write_text(f"{section} = {_toml(value)}\n" + (UPSTREAM if section != "upstreams" else ""))

        try:
            told = json.dumps(load(path, environ).effective())
        except SettingsError as error:
            told = str(error)
            problems = error.problems
        else:
            problems = []

    assert told
    assert all(problem.startswith((f"{path}: ", "environment RELAY__")) for problem in problems)
    assert all(problem.isprintable() for problem in problems)


def _toml(value: Any) -> str:
    """Write a value as TOML, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(value) if isinstance(value, float) else json.dumps(value)


def _uncommented() -> dict[str, dict[str, Any]]:
    """The keys of the shipped file by section, those that are commented out (`#key = ...`) with them."""
    sections: dict[str, dict[str, Any]] = {}
    section = ""
    for line in SHIPPED.read_text().splitlines():
        head = re.match(r"#?\[+([a-z_.]+)\]+", line)
        entry = re.match(r"#?([a-z_]+ = .*)", line)
        if head:
            section = head[1]
            sections.setdefault(section, {})
        elif entry:
            sections[section].update(tomllib.loads(entry[1]))
    for parent, _, name in [section.rpartition(".") for section in sections if "." in section]:
        sections[parent][name] = {}
        del sections[f"{parent}.{name}"]
    return {name: keys for name, keys in sections.items() if keys}


def _keys(model: type[BaseModel]) -> list[str]:
    sections = {name: _model(field.annotation) for name, field in model.model_fields.items()}
    keys = [f"{name}.{key}" for name, section in sections.items() if section for key in section.model_fields]
    return [*keys, *(f".{name}" for name, section in sections.items() if section is None)]


def _model(annotation: Any) -> type[BaseModel] | None:
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return next((one for one in candidates if isinstance(one, type) and issubclass(one, BaseModel)), None)


def test_the_schema_takes_the_forms_that_people_write() -> None:
    definitions = schema()["$defs"]
    server = definitions["ServerSettings"]["properties"]

    assert server["idle_timeout"]["type"] == "string"
    assert re.search(server["idle_timeout"]["pattern"], "30s")
    assert not re.search(server["idle_timeout"]["pattern"], "30")
    assert server["idle_timeout"]["default"] == "5m"
    assert re.search(server["max_message_size"]["anyOf"][0]["pattern"], "25MiB")
    assert server["max_message_size"]["anyOf"][1]["type"] == "integer"
    assert definitions["RetentionSettings"]["properties"]["default"]["default"] == "30d"
    assert definitions["HttpSettings"]["properties"]["address"]["default"] == "127.0.0.1:9025"


def test_the_schema_describes_every_key() -> None:
    definitions = schema()["$defs"]
    bare = [
        f"{name}.{key}"
        for name, definition in definitions.items()
        for key, described in definition["properties"].items()
        if not described.get("description")
    ]

    assert bare == []
    assert all(definition["additionalProperties"] is False for definition in definitions.values())


def test_the_schema_says_what_it_is() -> None:
    made = schema()

    assert made["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert made["title"] == "relay.toml"
    assert made["required"] == ["upstreams"]
    json.dumps(made)


@pytest.mark.parametrize("value", ['"mention"', '["mention", "digest"]'])
def test_a_pattern_alone_is_in_the_schema_too(value: str, file: Path) -> None:
    limit = f'[[limits]]\nscope = "sender"\nmax = 1\nper = "1d"\ntask_type = {value}\n'
    assert loaded(file, limit).limits[0].task_type
    for model in ("LimitSettings", "ExceptionSettings"):
        forms = schema()["$defs"][model]["properties"]["task_type"]["anyOf"]
        kinds = {each.get("type") for form in forms for each in form.get("anyOf", [form])}
        assert kinds == {"string", "array", "null"}
