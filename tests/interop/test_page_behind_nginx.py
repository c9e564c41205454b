"""The page behind nginx, at a path of its own, with the directives that docs/page.md names."""

from __future__ import annotations

import contextlib
import re
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

import aiohttp

from tests.interop.peers import NGINX_ALONE, NGINX_FILES, daemon_directory, free_port, listening, needs
from tests.support.client import Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.upstream import ScriptedUpstream

PAGE = Path(__file__).parents[2] / "docs" / "page.md"

pytestmark = needs("nginx", "nginx")

CONFIGURATION = (
    NGINX_ALONE
    + "http {{\n"
    + NGINX_FILES
    + """\
    server {{
        listen 127.0.0.1:{port};
        {location}
    }}
}}
"""
)


@contextlib.asynccontextmanager
async def nginx(relay: int) -> AsyncIterator[str]:
    """Run nginx in front of the page at port `relay`, as documented, and return the page's address."""
    (location,) = re.findall(r"```nginx\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert "127.0.0.1:9025" in location
    port = free_port()
    with daemon_directory() as directory:
        configuration = directory / "nginx.conf"
        location = location.replace("127.0.0.1:9025", f"127.0.0.1:{relay}")
        configuration.write_text(CONFIGURATION.format(directory=directory, port=port, location=location))
        async with listening(port, "nginx", "-c", str(configuration), "-p", str(directory), "-e", "stderr"):
            yield f"http://127.0.0.1:{port}/mail/"


async def test_every_address_of_every_page_is_below_its_path(start: Any, upstream: ScriptedUpstream) -> None:
    async with start(upstream.port) as running, nginx(running.http_port) as home:
        async with Client(running.port) as client:
            await client.ehlo()
            for number in range(52):
                replies = await client.message(f"{number}@example.com", ["ann@example.org"], b"\r\nx\r\n")
                assert replies[-1].code == 250
        seen = {home}
        waiting = [home]
        async with aiohttp.ClientSession() as http:
            while waiting:
                page = waiting.pop()
                async with http.get(page) as answer:
                    assert answer.status == 200, page
                    html = answer.content_type == "text/html"
                    text = await answer.text()
                found = re.findall(r' (?:href|src|action|data-live)="([^"]*)"', text) if html else []
                for each in found:
                    address = urljoin(page, unescape(each)).partition("#")[0]
                    assert address.startswith(home), f"{each} in {page}"
                    if address not in seen:
                        seen.add(address)
                        waiting.append(address)
        names = {urlsplit(each).path.removeprefix("/mail/") for each in seen}
        assert {"", "live", "sends", "in-doubt", "metrics", "static/style.css"} <= names
        assert sum(name.startswith("sends/") for name in names) == 52, "the second page too"
