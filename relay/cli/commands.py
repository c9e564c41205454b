"""The commands, in the order of the help; each stands in the module of its name.

Each one finds the settings, calls the part that does the work, and says what came of it.
"""

from __future__ import annotations

from typing import Annotated

import typer

from relay import __version__
from relay.cli.check import check
from relay.cli.demo import demo
from relay.cli.expire import expire
from relay.cli.forget import forget
from relay.cli.health import health
from relay.cli.limits import limits
from relay.cli.migrate import migrate_store
from relay.cli.selftest import selftest
from relay.cli.sends import sends
from relay.cli.serve import serve
from relay.cli.spool import spool
from relay.cli.stats import stats
from relay.cli.user import user

__all__ = ["app"]

app = typer.Typer(
    help="SMTP relay proxy that records sends.",
    add_completion=False,
    rich_markup_mode=None,  # plain help: no boxes, and quick to print
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"relay {__version__}")
        raise typer.Exit


@app.callback()
def relay(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """SMTP relay proxy that records sends."""


def schema() -> int:
    """Print the JSON Schema of the configuration."""
    import json

    from relay.settings import schema as settings_schema

    typer.echo(json.dumps(settings_schema(), indent=2))
    return 0


app.command()(serve)
app.command()(check)
app.command()(selftest)
app.command()(expire)
app.command()(demo)
app.command()(schema)
app.command()(health)
app.add_typer(sends, name="sends")
app.command()(stats)
app.command()(forget)
app.command()(limits)
app.command(name="migrate-store")(migrate_store)
app.add_typer(user, name="user")
app.add_typer(spool, name="spool")
