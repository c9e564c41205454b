"""Tokens from files, commands and a token endpoint: real files, real processes, a real HTTP server."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import pytest
from aiohttp import web

from relay.settings import TokenSettings
from relay.upstream.endpoint import EndpointTokens
from relay.upstream.tokens import MAX_OCTETS, CommandTokens, FileTokens, TokenError, token_source

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SECRET, REFRESH = "client-sesame", "refresh-sesame"


class Endpoint:
    """A token endpoint that answers what the test says."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.forms: list[dict[str, str]] = []
        self.open = asyncio.Event()
        self.open.set()
        self.url = ""

    async def token(self, request: web.Request) -> web.StreamResponse:
        assert request.content_type == "application/x-www-form-urlencoded"
        assert "Authorization" not in request.headers
        self.forms.append({key: value[0] for key, value in parse_qs(await request.text()).items()})
        await self.open.wait()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return answer if isinstance(answer, web.Response) else web.json_response(answer)

    def source(self, clock: Any = None, **over: Any) -> EndpointTokens:
        settings = TokenSettings(
            **{"url": self.url, "client_id": "relay", "client_secret": SECRET, "scope": "send"} | over
        )
        return EndpointTokens(settings, **({"clock": clock} if clock else {}))


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    made = Endpoint()
    application = web.Application()
    application.router.add_post("/token", made.token)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/token"
    yield made
    await runner.cleanup()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


# Files


async def test_a_file_is_read_anew_each_time(tmp_path: Path) -> None:
    path = tmp_path / "token"
    tokens = token_source(TokenSettings(file=path))
    assert isinstance(tokens, FileTokens)
    for token in ("one", "two"):
        path.write_text(f" {token}\r\n")
        assert await tokens.token() == token
        tokens.refused(token)


@pytest.mark.parametrize("content", [b"", b"two words", b"a\1b", b"caf\xc3\xa9", b"x" * (MAX_OCTETS + 1)])
async def test_a_file_without_a_token(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(TokenError, match="gave no token: one word of printable ASCII is needed"):
        await FileTokens(path).token()


async def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TokenError, match="cannot be read: No such file or directory"):
        await FileTokens(tmp_path / "token").token()


# Commands


def python(program: str) -> tuple[str, ...]:
    return (sys.executable, "-c", program)


async def test_a_command_is_run_without_a_shell(tmp_path: Path) -> None:
    tokens = token_source(TokenSettings(command=(*python("import sys; print(sys.argv[1])"), "$HOME;`x`")))
    assert isinstance(tokens, CommandTokens)
    assert await tokens.token() == "$HOME;`x`"
    tokens.refused("$HOME;`x`")


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (("/nowhere/token",), "token command /nowhere/token cannot be run: No such file or directory"),
        (python("import sys; print('sesame'); sys.exit(3)"), "failed with exit status 3"),
        (python("print('two words')"), "gave no token: one word of printable ASCII is needed"),
        (python(f"print('x' * {MAX_OCTETS * 4})"), "gave no token: one word of printable ASCII is needed"),
    ],
    ids=["missing", "fails", "no token", "endless"],
)
async def test_a_command_that_gives_no_token(command: tuple[str, ...], error: str) -> None:
    with pytest.raises(TokenError) as caught:
        await CommandTokens(command).token()
    assert str(caught.value).endswith(error)
    assert "sesame" not in str(caught.value)


async def test_a_command_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    program = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{child.pid}}')\n"
        "time.sleep(60)\n"
    )
    tokens = CommandTokens(python(program), timeout_s=2)
    with pytest.raises(TokenError, match="took longer than 2 s"):
        await tokens.token()
    if pids.exists():  # a machine so slow that it did not get there has nothing to end
        child = int(pids.read_text())
        for _ in range(1000):
            stat = Path(f"/proc/{child}/stat")  # ended, or waiting for its new parent to take note
            if not stat.exists() or stat.read_text().split()[2] == "Z":
                break
            await asyncio.sleep(0.01)
        else:
            pytest.fail("the child lives on")


async def test_a_command_runs_once_for_all_who_ask_at_the_same_time(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    tokens = CommandTokens(python(f"open({str(ran)!r}, 'a').write('x'); print('token')"))
    assert await asyncio.gather(*(tokens.token() for _ in range(5))) == ["token"] * 5
    assert ran.read_text() == "x"
    await tokens.token()
    assert ran.read_text() == "xx"


# The endpoint


async def test_the_client_credentials_grant(endpoint: Endpoint) -> None:
    endpoint.answers = [{"access_token": "one", "token_type": "Bearer", "expires_in": 3600}]
    tokens = endpoint.source()
    assert [await tokens.token() for _ in range(3)] == ["one"] * 3
    assert endpoint.forms == [
        {
            "grant_type": "client_credentials",
            "client_id": "relay",
            "client_secret": SECRET,
            "scope": "send",
        }
    ]


async def test_the_refresh_token_grant_and_its_rotation(
    endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    endpoint.answers = [
        {"access_token": "one", "expires_in": "120", "refresh_token": "rotated-sesame"},
        {"access_token": "two", "expires_in": 120, "refresh_token": "rotated-sesame"},
        {"access_token": "three", "expires_in": 120},
    ]
    tokens = endpoint.source(clock, refresh_token=REFRESH, client_secret=None, scope=None)
    for token in ("one", "two", "three"):
        assert await tokens.token() == token
        clock.now += 61
    assert endpoint.forms == [
        {"grant_type": "refresh_token", "client_id": "relay", "refresh_token": used}
        for used in (REFRESH, "rotated-sesame", "rotated-sesame")
    ]
    said = capsys.readouterr().out
    assert said.count("kept in memory only") == 1
    assert "sesame" not in said


@pytest.mark.parametrize(
    ("expires_in", "kept"),
    [(3600, 3539), (40, 19), (None, 299), ("soon", 299), (0, -1), (-5, -1), (1e999, -1)],
)
async def test_a_token_is_kept_until_shortly_before_its_end(
    expires_in: object, kept: float, endpoint: Endpoint
) -> None:
    clock = Clock()
    text = f'{{"access_token": "one", "expires_in": {expires_in if expires_in != 1e999 else "1e999"}}}'
    text = text.replace("None", "null").replace("soon", '"soon"')
    endpoint.answers = [web.Response(text=text), {"access_token": "two"}]
    tokens = endpoint.source(clock)
    assert await tokens.token() == "one"
    clock.now += max(kept, 0)
    assert await tokens.token() == ("one" if kept > 0 else "two")
    clock.now += 2
    assert await tokens.token() == "two"


async def test_a_refused_token_is_not_given_out_again(endpoint: Endpoint) -> None:
    endpoint.answers = [{"access_token": "one"}, {"access_token": "two"}]
    tokens = endpoint.source()
    assert await tokens.token() == "one"
    tokens.refused("one")
    assert await tokens.token() == "two"
    tokens.refused("one")
    assert await tokens.token() == "two"
    assert len(endpoint.forms) == 2, "a late refusal of the old one does not cost the new one"


async def test_one_request_for_all_who_ask_at_the_same_time(endpoint: Endpoint) -> None:
    endpoint.answers = [{"access_token": "one"}]
    endpoint.open.clear()
    tokens = endpoint.source()
    asking = [asyncio.create_task(tokens.token()) for _ in range(5)]
    while not endpoint.forms:
        await asyncio.sleep(0.001)
    asking[0].cancel()  # who asked first may go: the others wait for its answer
    endpoint.open.set()
    ends = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(ends[0], asyncio.CancelledError)
    assert ends[1:] == ["one"] * 4
    assert len(endpoint.forms) == 1


async def test_a_failure_reaches_all_and_is_not_kept(endpoint: Endpoint) -> None:
    endpoint.answers = [
        web.json_response({"error": "temporarily_unavailable"}, status=503),
        {"access_token": "a"},
    ]
    tokens = endpoint.source()
    ends = await asyncio.gather(*(tokens.token() for _ in range(3)), return_exceptions=True)
    assert {str(end) for end in ends} == {
        f"token endpoint {endpoint.url} answered 503: temporarily_unavailable"
    }
    assert await tokens.token() == "a"


BAD = {
    "not JSON": (web.Response, {"text": "sesame"}, "gave no access token"),
    "a list": (web.Response, {"text": "[1]"}, "gave no access token"),
    "deep": (web.Response, {"text": "[" * 60_000}, "gave no access token"),
    "no token": (web.json_response, {"data": {"token_type": "bearer"}}, "gave no access token"),
    "a token that breaks out": (
        web.json_response,
        {"data": {"access_token": "a\1b"}},
        "gave no access token",
    ),
    "a number": (web.json_response, {"data": {"access_token": 1}}, "gave no access token"),
    "another kind": (
        web.json_response,
        {"data": {"access_token": "a", "token_type": "mac"}},
        "gave a token that is no bearer token",
    ),
    "too long": (web.Response, {"text": '{"access_token": "a"}' + " " * MAX_OCTETS}, "gave no access token"),
    "an error": (
        web.json_response,
        {"data": {"error": "invalid_grant", "error_description": f"no {SECRET}"}, "status": 400},
        "answered 400: invalid_grant",
    ),
    "the secret as the error": (
        web.json_response,
        {"data": {"error": SECRET}, "status": 400},
        "answered 400",
    ),
    "lines as the error": (
        web.json_response,
        {"data": {"error": "no\r\n250 sesame"}, "status": 400},
        "answered 400",
    ),
    "a redirect": (
        web.Response,
        {"status": 307, "headers": {"Location": "/token"}},
        "answered 307",
    ),
}


@pytest.mark.parametrize("case", BAD)
async def test_an_answer_without_a_token(case: str, endpoint: Endpoint) -> None:
    make, arguments, error = BAD[case]
    endpoint.answers = [make(**arguments)]
    with pytest.raises(TokenError) as caught:
        await endpoint.source(refresh_token=REFRESH).token()
    assert str(caught.value) == f"token endpoint {endpoint.url} {error}"
    assert len(endpoint.forms) == 1


async def test_an_endpoint_that_cannot_be_reached() -> None:
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    settings = TokenSettings(
        url=f"http://127.0.0.1:{port}/token?key=sesame", client_id="relay", client_secret=SECRET
    )
    tokens = token_source(settings)
    assert isinstance(tokens, EndpointTokens)
    with pytest.raises(TokenError) as caught:
        await tokens.token()
    assert str(caught.value).startswith(f"token endpoint http://127.0.0.1:{port}/token: cannot be reached: ")
    assert "sesame" not in str(caught.value)


async def test_an_endpoint_that_does_not_answer(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.upstream.endpoint.TIMEOUT", 0.05)
    endpoint.answers = [{"access_token": "one"}]
    endpoint.open.clear()
    with pytest.raises(TokenError, match=r"no answer in 0\.05 s"):
        await endpoint.source().token()
    endpoint.open.set()


async def test_an_endpoint_that_hangs_up() -> None:
    class HangsUp(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            transport.close()

    server = await asyncio.get_running_loop().create_server(HangsUp, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/token"
    with pytest.raises(TokenError, match=r"token: (Server|Client)\w+"):
        await EndpointTokens(TokenSettings(url=url, client_id="relay", client_secret=SECRET)).token()
    server.close()
