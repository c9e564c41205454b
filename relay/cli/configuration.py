"""Which configuration a command works with: `--config`, else `$RELAY_CONFIG`, else `config/relay.toml`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from relay.cli.failure import CommandError

if TYPE_CHECKING:
    from relay.settings import Settings

__all__ = [
    "DEFAULT",
    "OF_HEALTH",
    "OF_THE_RECORDS",
    "ConfigOption",
    "configured",
    "configured_to_read",
    "find",
    "loaded",
    "loader",
]

DEFAULT = Path("config/relay.toml")

_OF_MAIL: Final = ("listeners", "tls", "clients", "upstreams")
OF_THE_RECORDS: Final = (*_OF_MAIL, "http")
"""What commands about the records leave out: the password of an upstream, say, may be the service's alone."""
OF_HEALTH: Final = (*_OF_MAIL, "records", "task_type", "retention", "expiry", "limits", "log")
"""What `relay health` leaves out, for the same reason."""

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="Configuration. Else $RELAY_CONFIG, else config/relay.toml."
    ),
]
"""The option of every command that reads the configuration."""


def find(config: Path | None, environ: Mapping[str, str], *, dev: bool = False) -> Path | None:
    """Return the file to read; None: `dev` needs none, unless one is named."""
    if config is not None:
        return config
    named = environ.get("RELAY_CONFIG")
    if named:
        return Path(named)
    return None if dev else DEFAULT


def configured(path: Path | None, *, without: Collection[str] = ()) -> Settings:
    """Return the settings of the file at `path`, with the environment over them, or raise CommandError."""
    return loaded(loader(path, without=without))


def loaded(load: Callable[[], Settings]) -> Settings:
    """Return what a `loader` reads, or raise CommandError."""
    from relay.settings import SettingsError

    try:
        return load()
    except SettingsError as error:
        raise CommandError([f"relay: {problem}" for problem in error.problems], 2) from None


def loader(
    path: Path | None, *, dev_upstream: str | None = None, without: Collection[str] = ()
) -> Callable[[], Settings]:
    """Return what reads these settings, as often as it is called; it raises SettingsError."""
    from relay.settings import load

    return partial(load, path, os.environ, dev_upstream=dev_upstream, without=without)


def configured_to_read(config: Path | None, environ: Mapping[str, str]) -> Settings:
    """Return the settings for a command that only reads the records.

    Where no file is named and none is at its usual place, those of `relay serve --dev` hold: whoever tries
    the relay without a file finds its records all the same.
    """
    path = find(config, environ)
    nowhere = path == DEFAULT and config is None and not DEFAULT.exists()
    return configured(None if nowhere else path, without=OF_THE_RECORDS)
