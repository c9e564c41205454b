"""nginx's mail proxy in front of the relay, with the directives that docs/compare.md names."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.interop.peers import NGINX_ALONE, NGINX_FILES, daemon_directory, free_port, listening, needs
from tests.support.client import Client
from tests.support.upstream import ScriptedUpstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MODULE = Path("/usr/lib/nginx/modules/ngx_mail_module.so")
PAGE = Path(__file__).parents[2] / "docs" / "compare.md"

pytestmark = [
    *needs("nginx", "nginx"),
    pytest.mark.skipif(not MODULE.exists(), reason="not installed: apt-get install libnginx-mod-mail"),
]

CONTENT = b"Subject: one\r\n\r\ntext\r\n"
ALLOWED = "127.0.0.5"
BEHIND_NGINX: dict[str, Any] = {
    "listeners": [{"address": "127.0.0.1:0", "proxy_protocol": True}],
    "clients": {"trusted_proxies": ["127.0.0.1/32"], "allow": [f"{ALLOWED}/32"]},
}

CONFIGURATION = (
    "load_module {module};\n"
    + NGINX_ALONE
    + "http {{\n"
    + NGINX_FILES
    + """\
    server {{
        listen unix:{directory}/auth;
        location / {{
            add_header Auth-Status OK;
            add_header Auth-Server 127.0.0.1;
            add_header Auth-Port {relay};
            return 204;
        }}
    }}
}}
mail {{
    server_name nginx.test;
    auth_http unix:{directory}/auth:/;
    server {{ listen 127.0.0.1:{port}; protocol smtp; smtp_auth none; {directives} }}
}}
"""
)


@contextlib.asynccontextmanager
async def nginx(relay: int, directives: str) -> AsyncIterator[int]:
    """Run nginx in front of the relay at port `relay`, and return the port where it takes clients."""
    port = free_port()
    with daemon_directory() as directory:
        configuration = directory / "nginx.conf"
        configuration.write_text(
            CONFIGURATION.format(
                module=MODULE, directory=directory, relay=relay, port=port, directives=directives
            )
        )
        async with listening(port, "nginx", "-c", str(configuration), "-p", str(directory), "-e", "stderr"):
            yield port


async def test_the_client_behind_it_is_the_client(start: Any, upstream: ScriptedUpstream) -> None:
    (section,) = re.findall(r"^## nginx\n(.*?)^## ", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    directives = " ".join(re.findall(r"`([a-z_ ]+;)`", section))
    async with start(upstream.port, **BEHIND_NGINX) as running, nginx(running.port, directives) as port:
        async with Client(port, source=ALLOWED) as client:
            await client.ehlo()
            replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
            assert [reply.code for reply in replies] == [250, 250, 354, 250]
        assert [row["client"] for row in running.rows()] == [ALLOWED]
    (message,) = upstream.accepted
    assert message.content == CONTENT
