"""`relay health`: ask the relay that runs here how it is, as the health check of a container does."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Final

import typer

from relay.cli.configuration import DEFAULT, OF_HEALTH, ConfigOption, configured, find
from relay.cli.failure import CommandError

if TYPE_CHECKING:
    from relay.settings.address import Address

__all__ = ["health"]

OK: Final = 200
TIMEOUT_S: Final = 4.0
"""Less than what the image gives its check, so that the reason is still told."""


def health(
    config: ConfigOption = None,
    ready: Annotated[
        bool,
        typer.Option("--ready", help="Ask whether it takes mail (/readyz), not only whether it lives."),
    ] = False,
) -> int:
    """Ask the relay that runs here whether it lives."""
    path = find(config, os.environ)
    if config is None and path == DEFAULT and not DEFAULT.exists():
        path = None  # as `relay serve --dev` runs without a file
    asked = configured(path, without=OF_HEALTH).http.address
    from relay.settings.address import Address

    status, text = _get(Address.parse(asked), "/readyz" if ready else "/healthz")
    typer.echo(text.rstrip("\n"), err=status != OK)
    return int(status != OK)


def _get(address: Address, path: str) -> tuple[int, str]:
    if not address.port:
        raise CommandError(["relay: http.address has port 0: give it a port, so that it can be found"])
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104  compared, not bound
    import http.client  # brings ssl, which help needs not

    connection = http.client.HTTPConnection(host, address.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        raise CommandError([f"relay: no answer from http://{address}{path}: {reason}"]) from None
    finally:
        connection.close()
