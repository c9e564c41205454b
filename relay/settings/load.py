"""From a TOML file and the environment to `Settings`, or to all that is wrong with them.

Rules: every mistake is reported, not the first one alone, each as `FILE: key: reason`; no message ever shows
a value that may be a secret. Files that the configuration names are read here and nowhere else.
"""

from __future__ import annotations

import ssl
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import SecretStr, ValidationError

from relay.escaping import escaped
from relay.settings.dsn import files_of, has_password
from relay.settings.environment import Key, dotted, model_at, overlay, unknown_key
from relay.settings.model import Origin, Settings

__all__ = ["DEV_UPSTREAM", "SettingsError", "load"]

DEV_UPSTREAM = "127.0.0.1:2526"
"""Where the built-in upstream of `relay serve --dev` listens, unless that port is taken."""

_STAND_INS = {"listeners": [{"address": "127.0.0.1:0"}], "upstreams": [{"address": "upstream.invalid:25"}]}
"""For sections that are not looked at and that the others must fit: addresses that nothing else has."""

_WITH_SECRETS = ("http", "records", "upstreams")
_SECRETS = frozenset({"client_secret", "password", "recipients_key", "refresh_token", "token"})


class SettingsError(Exception):
    """The configuration cannot be used. `problems` has one line for each mistake, for the operator."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = [escaped(problem) for problem in problems]  # keys come from the file as they are
        super().__init__("\n".join(self.problems))


def load(
    path: Path | None,
    environ: Mapping[str, str],
    *,
    dev_upstream: str | None = None,
    without: Collection[str] = (),
) -> Settings:
    """Return the settings of the file at `path` (None: the defaults), with the environment over them.

    `dev_upstream` is the address of the built-in upstream, which then replaces whatever upstream is
    configured: a trial must never send real mail. `without` names sections that are of no use to a command:
    nothing in them is looked at, and no secret of theirs is read. Raises SettingsError with every mistake
    that was found.
    """
    source = str(path) if path else "built-in defaults"
    tree = _read(path) if path else {}
    shown = _secrets_shown(path, tree) if path else []
    sources, problems = overlay(tree, Settings, environ)
    warnings = [
        f"{dotted(key)}: every user of the machine can read {path} (chmod o-r)"
        for key in shown
        if key[0] not in without
    ]
    for section in without:
        tree.pop(section, None)
        problems = [problem for problem in problems if problem[1][:1] != (section,)]
        if section in _STAND_INS:
            tree[section] = _STAND_INS[section]
    if "upstreams" in without or dev_upstream is not None:
        _section(tree, "clients").pop("passthrough_to", None)  # names one of those that are not used
    if dev_upstream is not None:
        if tree.pop("upstreams", None):
            warnings.append("upstreams: not used with --dev, the built-in upstream takes their place")
        tree["upstreams"] = [{"name": "dev", "address": dev_upstream, "tls": "none"}]
        problems = [problem for problem in problems if problem[1][:1] != ("upstreams",)]
        if path is None:
            _section(tree, "log").setdefault("format", "console")
    problems += [(_source(key, sources, source), key, reason) for key, reason in _use_files(tree, warnings)]
    try:
        settings = Settings.model_validate(tree, context=Origin(tuple(warnings)))
    except ValidationError as error:
        problems += [(_source(key, sources, source), key, reason) for key, reason in _reasons(error)]
    if problems:
        raise SettingsError([f"{where}: {dotted(key)}: {reason}" for where, key, reason in problems])
    return settings


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # some editors begin it with a BOM
    except FileNotFoundError:
        hint = "write it (the relay's own config/relay.toml is the commented default), or give --config FILE"
        raise SettingsError([f"{path}: no such file: {hint}"]) from None
    except OSError as error:
        raise SettingsError([f"{path}: cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise SettingsError([f"{path}: is not UTF-8"]) from None
    except (ValueError, RecursionError) as error:  # also a number or a nesting beyond what Python reads
        raise SettingsError([f"{path}: is not TOML: {error}"]) from None


def _secrets_shown(path: Path, tree: dict[str, Any]) -> list[Key]:
    """Return the keys of the secrets that stand in the file itself, if everybody can read it."""
    try:
        others_read = bool(path.stat().st_mode & 0o004)
    except OSError:  # gone since it was read
        return []
    sections = {name: tree[name] for name in _WITH_SECRETS if name in tree}
    return list(_secrets(sections, ())) if others_read else []


def _secrets(table: dict[str, Any] | list[Any], place: Key) -> Iterator[Key]:
    for name, value in table.items() if isinstance(table, dict) else enumerate(table):
        if isinstance(value, dict | list):
            yield from _secrets(value, (*place, name))
        elif name in _SECRETS or (name == "url" and has_password(str(value))):
            yield (*place, name)


def _use_files(tree: dict[str, Any], warnings: list[str]) -> list[tuple[Key, str]]:
    """Read the files that are named: secrets into the tree, certificates to try; return what fails."""
    problems: list[tuple[Key, str]] = []
    for section, name in (("http", "token_file"), ("records", "recipients_key_file")):
        table = tree.get(section)
        if isinstance(table, dict):
            problems += _use(table, (section,), {name: _use_secret}, warnings)
    upstreams = tree.get("upstreams")
    for index, upstream in enumerate(upstreams if isinstance(upstreams, list) else ()):
        if not isinstance(upstream, dict):
            continue
        place: Key = ("upstreams", index)
        problems += _use(upstream, place, {"password_file": _use_secret, "ca_file": _use_ca_file}, warnings)
        token = upstream.get("token")
        if isinstance(token, dict):
            secrets = {"client_secret_file": _use_secret, "refresh_token_file": _use_secret}
            problems += _use(token, (*place, "token"), secrets, warnings)
    records = tree.get("records")
    if isinstance(records, dict):
        problems += _use(records, ("records",), {"password_file": _use_secret, "url": _use_url}, warnings)
    return problems + _try_certificate(tree, warnings)


def _use(
    table: dict[str, Any],
    place: Key,
    uses: Mapping[str, Callable[[dict[str, Any], str, Path], list[str]]],
    warnings: list[str],
) -> list[tuple[Key, str]]:
    """Use the files that keys of one table name; return what fails."""
    problems: list[tuple[Key, str]] = []
    for name, use in uses.items():
        key, value = (*place, name), table.get(name)
        if isinstance(value, str) and "\0" not in value:
            try:
                warnings += [f"{dotted(key)}: {doubt}" for doubt in use(table, name, Path(value))]
            except ValueError as error:
                problems.append((key, str(error)))
    return problems


def _try_certificate(tree: dict[str, Any], warnings: list[str]) -> list[tuple[Key, str]]:
    """Load the listeners' certificate once, so that a mistake shows before anything starts."""
    tls = tree.get("tls")
    cert, key = (tls.get("cert"), tls.get("key")) if isinstance(tls, dict) else (None, None)
    if not isinstance(cert, str) or not isinstance(key, str) or "\0" in cert + key:
        return []
    for name, path in (("cert", Path(cert)), ("key", Path(key))):
        try:
            path.open("rb").close()
        except OSError as error:
            return [(("tls", name), f"{path} cannot be read: {error.strerror}")]
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=_no_passphrase)
    except (ssl.SSLError, ValueError) as error:
        return [(("tls", "cert"), f"{cert} and {key} are no certificate and its key in PEM{_detail(error)}")]
    if Path(key).stat().st_mode & 0o004:
        warnings.append(f"tls.key: every user of the machine can read {key} (chmod o-r)")
    return []


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase: nobody could type it at a restart")


def _detail(error: Exception) -> str:
    if not isinstance(error, ssl.SSLError):
        return f": {error}"
    return f": {error.reason.replace('_', ' ').lower()}" if error.reason else ""


def _use_secret(table: dict[str, Any], name: str, path: Path) -> list[str]:
    """Put the secret from `path` where `name` says; return doubts; raise ValueError if there is none."""
    key = name.removesuffix("_file")
    if key in table:
        raise ValueError(f"given together with {key}: keep one of the two")
    try:
        with path.open("rb") as file:
            secret = file.read(64 * 1024).decode()
            others_read = bool(path.stat().st_mode & 0o004)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8") from None
    secret = secret.removesuffix("\n").removesuffix("\r")
    if not secret:
        raise ValueError(f"{path} is empty")
    table[key] = SecretStr(secret)
    return [f"every user of the machine can read {path} (chmod o-r)"] if others_read else []


def _use_ca_file(table: dict[str, Any], name: str, path: Path) -> list[str]:
    """Raise ValueError when `path` holds no certificates that TLS can use; there are no doubts to return."""
    del table, name
    try:
        ssl.create_default_context(cafile=str(path))
    except ssl.SSLError:
        raise ValueError(f"{path} holds no certificates in PEM") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    return []


def _use_url(table: dict[str, Any], name: str, path: Path) -> list[str]:
    """Raise ValueError when a file that the URL of a database names cannot be read; there are no doubts."""
    del path
    for parameter, file in files_of(table[name]):
        try:
            Path(file).open("rb").close()
        except OSError as error:
            raise ValueError(f"{parameter}: {file} cannot be read: {error.strerror}") from None
    return []


def _reasons(error: ValidationError) -> list[tuple[Key, str]]:
    """Say in our words what pydantic found."""
    reasons: list[tuple[Key, str]] = []
    for detail in error.errors(include_url=False, include_input=False):
        if detail["type"] == "default_factory_not_called":
            continue  # what the default depends on is wrong, and reported
        key = tuple(part for part in detail["loc"] if part != "[key]")
        context = detail.get("ctx", {})
        match detail["type"]:
            case "extra_forbidden":
                reason = unknown_key(str(key[-1]), model_at(Settings, key[:-1]).model_fields)
            case "missing" if key == ("upstreams",):
                reason = "missing: at least the address of one upstream is needed"
            case "missing":
                reason = "missing"
            case "value_error":
                reason = str(context["error"])
            case "literal_error":
                reason = f"must be {context['expected']}".replace("'", '"')
            case "greater_than_equal" | "less_than_equal":
                reason = (
                    f"must be {context['ge']} or more"
                    if "ge" in context
                    else f"must be {context['le']} or less"
                )
            case "string_too_short" | "string_too_long":
                reason = f"must be text of 1 to {context.get('max_length', 64)} characters"
            case kind:
                reason = _TYPES.get(kind, detail["msg"])
        reasons.append((key, reason))
    return reasons


_TYPES = {
    "bool_type": "must be true or false",
    "dict_type": "must be a table",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "model_type": "must be a table",
    "path_type": "must be the name of a file, as text",
    "string_type": "must be text",
    "tuple_type": "must be a list",
}


def _source(key: Key, sources: Mapping[Key, str], default: str) -> str:
    """Where the value at `key` came from: the variable that gave it or what is above it, else the file."""
    return next((sources[key[:end]] for end in range(len(key), 0, -1) if key[:end] in sources), default)


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    section = tree.setdefault(name, {})
    return section if isinstance(section, dict) else {}
