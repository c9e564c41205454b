from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import relay
from relay.app import StartError
from relay.cli import main
from relay.cli.configuration import DEFAULT, find
from relay.settings import Settings
from tests.support.certificates import Certificates
from tests.support.recorded import record
from tests.support.rows import make_record

UPSTREAM = '[[upstreams]]\naddress = "smtp.example.com:587"\n'
App = Callable[..., None]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, and nothing set for the relay."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RELAY_CONFIG", raising=False)


@pytest.fixture
def config() -> Path:
    path = Path("relay.toml")
    path.write_text(UPSTREAM)
    return path


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> App:
    """Replaces functions of the process, at which the commands end."""

    def provide(**functions: Any) -> None:
        for name, function in functions.items():
            monkeypatch.setattr(f"relay.process.{name}", function)

    return provide


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"relay {relay.__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0

    out = capsys.readouterr().out
    for command in ("serve", "check", "selftest", "expire", "schema", "user"):
        assert f"  {command} " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "relay: missing command; see relay --help"),
        (["sevre"], "relay: no such command 'sevre'"),
        (["--bogus"], "relay: no such option: --bogus"),
        (["check", "--bogus"], "relay: no such option: --bogus"),
        (["check", "--config"], "relay: option '--config' requires an argument"),
        (["check", "extra"], "relay: got unexpected extra argument"),
        (["stats"], "relay: missing option '--by'. Choose from: type, sender, recipient-domain, client, "),
        (["sends", "--format=xml"], "relay: invalid value for '--format': 'xml' is not one of 'table', "),
        (["expire", "--dry-run=yes"], "relay: option '--dry-run' does not take a value"),
    ],
    ids=str,
)
def test_bad_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "environ", "dev", "found"),
    [
        (None, {}, False, DEFAULT),
        (None, {"RELAY_CONFIG": ""}, False, DEFAULT),
        (None, {"RELAY_CONFIG": "/etc/relay.toml"}, False, Path("/etc/relay.toml")),
        (Path("mine.toml"), {"RELAY_CONFIG": "/etc/relay.toml"}, False, Path("mine.toml")),
        (None, {}, True, None),
        (None, {"RELAY_CONFIG": "/etc/relay.toml"}, True, Path("/etc/relay.toml")),
        (Path("mine.toml"), {}, True, Path("mine.toml")),
    ],
)
def test_which_file(config: Path | None, environ: dict[str, str], dev: bool, found: Path | None) -> None:
    assert find(config, environ, dev=dev) == found


@pytest.mark.parametrize("command", ["serve", "check", "expire"])
def test_a_missing_file_is_named(command: str, app: App, capsys: pytest.CaptureFixture[str]) -> None:
    app(run=pytest.fail)

    assert main([command]) == 2
    assert capsys.readouterr().err.startswith("relay: config/relay.toml: no such file: ")


@pytest.mark.parametrize("command", ["serve", "check"])
def test_all_mistakes_are_told_at_once(
    command: str, config: Path, app: App, capsys: pytest.CaptureFixture[str]
) -> None:
    app(run=pytest.fail)
    config.write_text(UPSTREAM + '[server]\nhostnam = "a"\n[log]\nlevel = "loud"\n')

    assert main([command, "--config", str(config)]) == 2

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        'relay: relay.toml: server.hostnam: unknown key; did you mean "hostname"?',
        'relay: relay.toml: log.level: must be "debug", "info", "warning" or "error"',
    ]


@pytest.mark.parametrize("status", [0, 1])
def test_serve_ends_as_the_relay_ends(status: int, config: Path, app: App) -> None:
    served: list[Settings] = []
    app(run=lambda settings, *_: served.append(settings) or status)

    assert main(["serve", "--config", str(config)]) == status
    assert served[0].upstreams[0].address == "smtp.example.com:587"


@pytest.mark.parametrize("error", [StartError("the address is in use"), OSError(98, "the address is in use")])
def test_a_relay_that_cannot_start_says_why(
    error: Exception, config: Path, app: App, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: Any) -> int:
        raise error

    app(run=run)

    assert main(["serve", "--config", str(config)]) == 1
    assert capsys.readouterr().err == f"relay: cannot start: {error}\n"


def test_serve_dev_does_not_look_for_the_default_file(app: App) -> None:
    DEFAULT.parent.mkdir()
    DEFAULT.write_text("this is not TOML")
    served: list[Settings] = []
    app(run=lambda settings, *_: served.append(settings) or 0)

    assert main(["serve", "--dev"]) == 0
    assert [each.name for each in served[0].upstreams] == ["dev"]


@pytest.fixture
def usual(monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    """Where the built-in upstream usually listens: here at a port that is free."""
    with socket.create_server(("127.0.0.1", 0)) as place:
        host, port = place.getsockname()
    monkeypatch.setattr("relay.dev.DEV_UPSTREAM", f"{host}:{port}")
    return host, port


def test_the_built_in_upstream_holds_its_port_from_the_configuration_on(
    app: App, usual: tuple[str, int]
) -> None:
    def run(settings: Settings, load: Callable[[], Settings], upstream: socket.socket) -> int:
        assert upstream.getsockname() == usual
        assert settings.upstreams[0].address == load().upstreams[0].address == "{}:{}".format(*usual)
        with pytest.raises(OSError, match="in use"):
            socket.create_server(usual)
        socket.create_connection(usual, timeout=10).close()  # the kernel takes it: this socket listens
        return 0

    app(run=run)

    assert main(["serve", "--dev"]) == 0
    socket.create_server(usual).close()


def test_the_built_in_upstream_goes_elsewhere_when_its_port_is_taken(
    app: App, usual: tuple[str, int]
) -> None:
    served: list[Settings] = []

    def run(settings: Settings, load: Callable[[], Settings], upstream: socket.socket) -> int:
        served.append(settings)
        assert settings.upstreams[0].address == load().upstreams[0].address
        assert settings.upstreams[0].port == upstream.getsockname()[1]
        return main(["serve", "--dev"]) if len(served) < 3 else 0

    app(run=run)

    assert main(["serve", "--dev"]) == 0
    ports = [settings.upstreams[0].port for settings in served]
    assert ports[0] == usual[1]
    assert len(set(ports)) == 3


def test_a_configuration_that_is_refused_leaves_nobody_at_the_built_in_upstreams_port(
    config: Path, app: App, usual: tuple[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    app(run=pytest.fail)
    config.write_text('[log]\nlevel = "loud"\n')

    assert main(["serve", "--dev", "--config", str(config)]) == 2
    assert capsys.readouterr().err.startswith("relay: relay.toml: log.level: ")
    socket.create_server(usual).close()


def test_a_built_in_upstream_that_can_listen_nowhere_is_told(
    app: App, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app(run=pytest.fail)
    monkeypatch.setattr("relay.dev.DEV_UPSTREAM", "192.0.2.1:2526")  # no machine has that address

    assert main(["serve", "--dev"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("relay: cannot start: the built-in upstream: ")
    assert "192.0.2.1" in said
    assert said.count("\n") == 1


def test_serve_without_dev_has_no_built_in_upstream(config: Path, app: App, usual: tuple[str, int]) -> None:
    passed: list[object] = []

    def run(_settings: Settings, _load: object, upstream: socket.socket | None) -> int:
        passed.append(upstream)
        socket.create_server(usual).close()
        return 0

    app(run=run)

    assert main(["serve", "--config", str(config)]) == 0
    assert passed == [None]


def test_the_environment_reaches_the_settings(
    config: Path, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELAY_CONFIG", str(config))
    monkeypatch.setenv("RELAY__SERVER__MAX_RECIPIENTS", "7")
    served: list[Settings] = []
    app(run=lambda settings, *_: served.append(settings) or 0)

    assert main(["serve"]) == 0
    assert served[0].server.max_recipients == 7


def test_check_says_what_is_effective(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(
        UPSTREAM
        + 'username = "relay"\npassword = "sesame"\ntls_verify = false\n'
        + '[server]\nhostname = "relay.example.com"\nmax_message_size = 0\n'
        + '[[listeners]]\naddress = "[::1]:2525"\n'
        + '[retention]\ndefault = "never"\n[retention.by_type]\nmention = "90d"\n'
    )
    config.chmod(0o600)

    assert main(["check", "--config", str(config)]) == 0

    captured = capsys.readouterr()
    lines = [line.split(maxsplit=1) for line in captured.out.splitlines()]
    assert lines == [
        ["relay.toml", "is valid."],
        ["name", "relay.example.com"],
        ["listens", "[::1]:2525"],
        ["clients", "127.0.0.0/8, ::1/128"],
        ["messages", "up to whatever the upstream allows, 1000 recipients"],
        [
            "upstream",
            "smtp.example.com: smtp.example.com:587, TLS starttls unverified, as relay, up to 20 connections",
        ],
        ["records", "sqlite:///data/task_done.db, spool data/spool, when away: spool"],
        ["retention", "never, mention 90d"],
        ["http", "127.0.0.1:9025 (metrics, health, page, API)"],
        ["log", "json, info"],
    ]
    assert captured.err.startswith("relay: warning: upstreams.0.tls_verify: off")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "what", "said"),
    [
        ("", "clients", "127.0.0.0/8, ::1/128"),
        ('auth = "passthrough"', "clients", "who may log in at smtp.example.com"),
        (
            'auth = "users"\nusers_file = "users.toml"\nallow = ["10.0.0.0/8"]',
            "clients",
            "10.0.0.0/8, users of users.toml",
        ),
        (
            '[http]\naddress = "0.0.0.0:9025"',
            "http",
            "0.0.0.0:9025 (metrics, health; no page and API: no token)",
        ),
        (
            '[http]\ntoken = "0123456789abcdef"',
            "http",
            "127.0.0.1:9025 (metrics, health; page and API with the token)",
        ),
    ],
)
def test_check_says_who_gets_in(
    text: str, what: str, said: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("users.toml").write_text("")
    cert, key = Certificates().write_server(tmp_path)
    config.write_text(
        f'{UPSTREAM}[[listeners]]\naddress = "127.0.0.1:2525"\n[[listeners]]\naddress = "[::1]:587"\n'
        f'tls = "required"\n[tls]\ncert = "{cert}"\nkey = "{key}"\n[clients]\n{text}\n'
    )

    assert main(["check", "--config", str(config)]) == 0

    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines[what] == said
    assert lines["listens"] == "127.0.0.1:2525, [::1]:587 TLS required"


def test_expire_creates_no_store(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["expire", "--config", str(config)]) == 1

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("relay: ")
    assert captured.err.count("\n") == 1
    assert not Path("data").exists()


@pytest.mark.parametrize(("days", "rows"), [(29, 0), (31, 1)])
def test_expire(days: int, rows: int, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_record(days)
    dry_run = ["expire", "--dry-run", "--config", str(config)]
    noun = "row" if rows == 1 else "rows"

    for arguments in (dry_run, dry_run, dry_run[:1] + dry_run[2:], dry_run):
        assert main(arguments) == 0

    assert capsys.readouterr().out.splitlines() == [
        f"{rows} expired {noun} would be deleted",
        f"{rows} expired {noun} would be deleted",
        f"{rows} expired {noun} deleted",
        "0 expired rows would be deleted",
    ]


def _write_record(days: int) -> None:
    """Put a row that is `days` old into the default store."""
    record(make_record(sent_at=datetime.now(UTC) - timedelta(days=days)))


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "relay.toml"


def test_the_unforeseen_is_a_line_and_no_traceback(
    config: Path, app: App, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: Any) -> int:
        raise LookupError("nobody thought of it")

    app(run=run)

    assert main(["serve", "--config", str(config)]) == 1

    message = capsys.readouterr().err
    assert message.startswith("relay: LookupError: nobody thought of it (relay/cli/serve.py:")
    assert message.count("\n") == 1


def test_ctrl_c_is_no_defect(config: Path, app: App, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*_: Any) -> int:
        raise KeyboardInterrupt

    app(run=run)

    assert main(["serve", "--config", str(config)]) == 130
    assert capsys.readouterr().err == ""


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "relay"]

    assert subprocess.run([*command, "--version"], check=True, capture_output=True, text=True).stdout == (
        f"relay {relay.__version__}\n"
    )
    assert subprocess.run([*command, "bogus"], check=False, capture_output=True).returncode == 2


def test_a_closed_pipe_is_no_defect() -> None:
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    writer = subprocess.run(
        [sys.executable, "-m", "relay", "schema"], stdout=reader.stdin, stderr=subprocess.PIPE, text=True
    )
    assert reader.stdin
    reader.stdin.close()

    assert writer.stderr == ""


def test_help_imports_nothing_heavy() -> None:
    heavy = {"aiohttp", "aiosmtpd", "aiosmtplib", "asyncio", "pydantic", "rich", "sqlalchemy"}
    program = "import sys; from relay.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"

    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)

    assert "relay.cli" in done.stderr.split()
    assert heavy.isdisjoint(done.stderr.split())


def test_check_looks_at_the_users_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, users = tmp_path / "relay.toml", tmp_path / "users.toml"
    config.write_text(
        f'[[upstreams]]\naddress = "smtp.example.com:587"\n'
        f'[clients]\nauth = "users"\nauth_without_tls = true\nusers_file = "{users}"\n'
    )
    assert main(["check", "--config", str(config)]) == 2
    assert str(users) in capsys.readouterr().err
    users.write_text("")
    assert main(["check", "--config", str(config)]) == 0
