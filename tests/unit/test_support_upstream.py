"""The scripted upstream does what its script says, and sees what a test needs to see."""

from __future__ import annotations

import asyncio
import base64
import smtplib
import ssl

import aiosmtplib
import pytest

from tests.support.certificates import Certificates
from tests.support.client import Client
from tests.support.upstream import (
    CHUNKING,
    EXTENSIONS,
    AfterOctets,
    Close,
    Delay,
    Garbage,
    HalfReply,
    RecordingUpstream,
    Reset,
    ScriptedUpstream,
    Silence,
    StopReading,
)

CONTENT = b"Subject: hello\r\n\r\n.one dot\r\n..two\r\n"


async def test_a_plain_transaction_is_kept_octet_for_octet() -> None:
    async with ScriptedUpstream() as upstream, Client(upstream.port) as client:
        await client.ehlo()
        assert client.extensions["SIZE"] == "52428800"
        replies = await client.message("a@x.test", ["b@x.test", "c@x.test"], CONTENT)
        assert [reply.code for reply in replies] == [250, 250, 250, 354, 250]
        message = await upstream.message()
        assert message.accepted
        assert message.content == CONTENT
        assert message.wire == b"Subject: hello\r\n\r\n..one dot\r\n...two\r\n"
        assert message.reverse_path == b"<a@x.test>"
        assert message.recipients == [b"<b@x.test>", b"<c@x.test>"]
        await client.quit()
        await upstream.wait_for(lambda: not upstream.open_connections)
        assert upstream.violations == []


async def test_a_quoted_local_part_does_not_end_the_path() -> None:
    async with ScriptedUpstream() as upstream, Client(upstream.port) as client:
        await client.ehlo()
        await client.command(b'MAIL FROM:<"a >b\\""@x.test> ENVID=<x>', 250)
        await client.command(b'RCPT TO:<@r.test:"c d"@x.test> NOTIFY=NEVER', 250)
        (message,) = upstream.incomplete
        assert message.reverse_path == b'<"a >b\\""@x.test>'
        assert message.recipients == [b'<@r.test:"c d"@x.test>']


async def test_pipelined_commands_are_seen_as_one_group() -> None:
    async with ScriptedUpstream() as upstream, Client(upstream.port) as client:
        await client.ehlo()
        await client.message("a@x.test", ["b@x.test"], CONTENT, pipelined=True)
        assert [b"MAIL FROM:<a@x.test>", b"RCPT TO:<b@x.test>", b"DATA"] in upstream.connections[0].groups
        assert upstream.violations == []


async def test_without_pipelining_running_ahead_is_a_violation() -> None:
    async with ScriptedUpstream(extensions=["8BITMIME"]) as upstream, Client(upstream.port) as client:
        await client.ehlo()
        await client.message("a@x.test", ["b@x.test"], CONTENT)
        assert upstream.violations == []
        await client.message("a@x.test", ["b@x.test"], CONTENT, pipelined=True)
        assert upstream.violations


@pytest.mark.parametrize(
    ("early", "complaint"),
    [
        (b"MAIL FROM:<a@x.test>\r\nRCPT TO:<b@x.test>\r\nDATA\r\nSubject: x\r\n", "octets after DATA"),
        (b"NOOP \nRSET\r\n", "bare newline"),
    ],
)
async def test_a_client_out_of_step_is_a_violation(early: bytes, complaint: str) -> None:
    async with ScriptedUpstream() as upstream, Client(upstream.port) as client:
        await client.ehlo()
        await client.send(early)
        await upstream.wait_for(lambda: upstream.violations)
        assert complaint in upstream.violations[0]


async def test_talking_before_the_greeting_is_a_violation() -> None:
    go = asyncio.Event()
    async with ScriptedUpstream({"greeting": Delay(go)}) as upstream, Client(upstream.port) as client:
        await client.send(b"EHLO early.test\r\n")
        await upstream.wait_for(lambda: upstream.connections and upstream.connections[0].wire.waiting)
        go.set()
        await client.greeting()
        assert upstream.violations == ["connection 0: octets before the greeting"]


async def test_lists_are_used_up_and_dicts_choose_by_address() -> None:
    script = {
        "MAIL": [b"451 4.3.0 later\r\n", None],
        "RCPT": {"no@": b"550-5.1.1 no\r\n550 5.1.1 such user\r\n", "full@": [b"452 4.2.2 full\r\n"]},
    }
    async with ScriptedUpstream(script) as upstream, Client(upstream.port) as client:
        await client.ehlo()
        await client.command("MAIL FROM:<>", 451)
        await client.command("MAIL FROM:<>", 250)
        assert (await client.command("RCPT TO:<no@x.test>", 550)).lines == ("5.1.1 no", "5.1.1 such user")
        await client.command("RCPT TO:<full@x.test>", 452)
        await client.command("RCPT TO:<full@x.test>", 250)
        (message,) = upstream.incomplete
        assert (len(message.refused), len(message.rcpts)) == (2, 1)


async def test_a_callable_sees_stage_line_and_connection() -> None:
    seen = []

    def script(stage: str, line: bytes, connection: object) -> bytes | None:
        seen.append((stage, line, connection))
        return b"250 2.0.0 hm\r\n" if line == b"NOOP hm" else None

    async with ScriptedUpstream({"NOOP": script}) as upstream, Client(upstream.port) as client:
        await client.greeting()
        assert (await client.command("NOOP hm")).text == "2.0.0 hm"
        assert (await client.command("NOOP")).text == "2.0.0 ok"
        assert seen[0] == ("NOOP", b"NOOP hm", upstream.connections[0])


async def test_chunks_are_content_whatever_they_hold() -> None:
    upstream = ScriptedUpstream(extensions=[*EXTENSIONS, *CHUNKING])
    async with upstream, Client(upstream.port) as client:
        await client.ehlo()
        chunks = [b"..\r\n", b"", b"\r\n.\r\nQUIT\r\n"]
        replies = await client.chunks("a@x.test", ["b@x.test"], chunks)
        assert [reply.code for reply in replies] == [250] * 5
        message = await upstream.message()
        assert (message.content, message.chunks) == (b"".join(chunks), [4, 0, 11])
        assert message.accepted
        await client.command("DATA", 503)
        assert upstream.violations == []


async def test_a_chunk_that_was_refused_spoils_the_message() -> None:
    upstream = ScriptedUpstream({"BDAT": [b"452 4.3.1 full\r\n"]}, extensions=[*EXTENSIONS, *CHUNKING])
    async with upstream, Client(upstream.port) as client:
        await client.ehlo()
        for chunks, codes in (([b"a", b"b", b"c"], [452, 503, 503]), ([b"a", b"b"], [250, 250])):
            replies = await client.chunks("a@x.test", ["b@x.test"], chunks)
            assert [reply.code for reply in replies[2:]] == codes
        assert [message.content for message in upstream.messages] == [b"ab"]


@pytest.mark.parametrize("line", [b"BDAT 2 last", b"BDAT 02 LAST x", b"BDAT", b"BDAT -1"])
async def test_what_is_no_bdat_or_comes_unoffered_is_a_violation(line: bytes) -> None:
    for extensions in (EXTENSIONS, (*EXTENSIONS, *CHUNKING)):
        async with ScriptedUpstream(extensions=extensions) as upstream, Client(upstream.port) as client:
            await client.ehlo()
            await client.send(line + b"\r\n")
            await client.expect_closed()
            assert "no BDAT" in upstream.violations[0]


@pytest.mark.parametrize("stage", ["connect", "greeting"])
@pytest.mark.parametrize("action", [Close(), Reset(), HalfReply(b"220-half")])
async def test_ends_before_the_greeting(stage: str, action: Close | Reset | HalfReply) -> None:
    async with ScriptedUpstream({stage: action}) as upstream, Client(upstream.port) as client:
        said = await client.expect_closed()
        assert said == (action.octets if isinstance(action, HalfReply) else b"")


async def test_a_reply_that_counts_then_the_end() -> None:
    script = {"end_of_data": Close(b"250 2.0.0 mine\r\n")}
    async with ScriptedUpstream(script) as upstream, Client(upstream.port) as client:
        await client.ehlo()
        replies = await client.message("a@x.test", ["b@x.test"], CONTENT)
        await client.expect_eof()
        assert replies[-1].text == "2.0.0 mine"
        assert upstream.accepted == upstream.messages


@pytest.mark.parametrize("action", [HalfReply(b"250 2.0.0 acc"), Reset(), Garbage(b"250 2.0.0 fake\r\n")])
async def test_what_is_no_reply_accepts_nothing(action: HalfReply | Reset | Garbage) -> None:
    async with ScriptedUpstream({"end_of_data": action}) as upstream, Client(upstream.port) as client:
        await client.ehlo()
        await client.command("MAIL FROM:<>", 250)
        await client.command("RCPT TO:<b@x.test>", 250)
        await client.command("DATA", 354)
        await client.send(b".\r\n")
        client.half_close()
        await client.expect_closed()
        assert len(upstream.messages) == 1
        assert upstream.accepted == []


async def test_silence_lasts_until_the_client_leaves() -> None:
    async with ScriptedUpstream({"NOOP": Silence()}) as upstream, Client(upstream.port) as client:
        await client.ehlo()
        await client.send(b"NOOP\r\nRSET\r\n")
        client.half_close()
        await client.expect_eof()
        assert upstream.connections[0].lines == [b"EHLO client.test", b"NOOP"]


async def test_an_end_inside_the_body() -> None:
    script = {"body": AfterOctets(1000, Reset())}
    async with ScriptedUpstream(script) as upstream, Client(upstream.port) as client:
        await client.ehlo()
        replies = await client.message("a@x.test", ["b@x.test"], b"")
        assert replies[-1].code == 250  # shorter than that
    async with ScriptedUpstream(script) as upstream, Client(upstream.port) as client:
        await client.ehlo()
        await client.command("MAIL FROM:<>", 250)
        await client.command("RCPT TO:<b@x.test>", 250)
        await client.command("DATA", 354)
        await client.send(b"x" * 998 + b"\r\n" + b"more\r\n")
        await client.expect_closed()
        assert upstream.messages == []
        assert upstream.incomplete[0].size >= 1000


async def test_an_upstream_that_stops_reading_goes_on_when_told() -> None:
    upstream = ScriptedUpstream({"body": StopReading()}, keep_content=False)
    async with upstream, Client(upstream.port) as client:
        await client.ehlo()
        await client.command("MAIL FROM:<>", 250)
        await client.command("RCPT TO:<b@x.test>", 250)
        await client.command("DATA", 354)
        client.send_unread((b"x" * 998 + b"\r\n") * 1000 + b".\r\n")
        (connection,) = upstream.connections
        assert connection.message is not None
        assert upstream.messages == []
        connection.wire.resume()
        await client.expect(250)
        assert upstream.messages[0].size == 1_000_000
        assert upstream.messages[0].wire == b""


async def test_unasked_replies_and_ends_on_an_idle_connection() -> None:
    async with ScriptedUpstream() as upstream, Client(upstream.port) as client:
        await client.ehlo()
        connection = await upstream.wait_for(lambda: next((c for c in upstream.connections if c.idle), None))
        connection.say(b"421 4.3.2 going down\r\n")
        await client.expect(421)
        connection.close()
        await client.expect_eof()


async def test_wait_for_fails_with_the_transcript() -> None:
    async with ScriptedUpstream() as upstream, Client(upstream.port) as client:
        await client.ehlo("who.test")
        with pytest.raises(AssertionError, match=r"EHLO who\.test"):
            await upstream.wait_for(lambda: False, timeout_s=0.01)


async def test_an_error_in_a_script_fails_the_test() -> None:
    def broken(*_: object) -> None:
        raise LookupError("a slip in the script")

    async def provoke() -> None:
        async with ScriptedUpstream({"NOOP": broken}) as upstream, Client(upstream.port) as client:
            await client.greeting()
            await client.send(b"NOOP\r\n")
            await upstream.wait_for(lambda: upstream.connections[0].task.done())

    with pytest.raises(LookupError):
        await provoke()


async def test_a_stage_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="EDNOFDATA"):
        ScriptedUpstream({"EDNOFDATA": Close()})


async def test_starttls_and_login_with_a_library_client() -> None:
    certificates = Certificates()
    async with ScriptedUpstream(tls=certificates.server(), users={"app": "s3cret"}) as upstream:
        client = aiosmtplib.SMTP(
            hostname="localhost", port=upstream.port, start_tls=True, tls_context=certificates.client()
        )
        await client.connect()
        with pytest.raises(aiosmtplib.SMTPSenderRefused):
            await client.mail("a@x.test")
        await client.login("app", "s3cret")
        await client.sendmail("a@x.test", ["b@x.test"], CONTENT)
        await client.quit()
        assert upstream.connections[0].user == "app"
        assert upstream.messages[0].content == CONTENT


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "CRAM-MD5"])
async def test_each_mechanism_tells_right_from_wrong(mechanism: str) -> None:
    async with ScriptedUpstream(users={"app": "s3cret"}, mechanisms=[mechanism]) as upstream:
        for password, welcome in (("s3cret", True), ("wrong", False)):
            client = aiosmtplib.SMTP(hostname="127.0.0.1", port=upstream.port, start_tls=False)
            await client.connect()
            if welcome:
                await client.login("app", password)
            else:
                with pytest.raises(aiosmtplib.SMTPAuthenticationError):
                    await client.login("app", password)
            client.close()


async def test_malformed_credentials_are_answered() -> None:
    async with ScriptedUpstream(users={"app": "s3cret"}) as upstream, Client(upstream.port) as client:
        await client.ehlo()
        await client.command("AUTH", 501)
        await client.command("AUTH PLAIN ====", 501)
        await client.command("AUTH PLAIN " + base64.b64encode(b"no nul").decode(), 501)


async def test_implicit_tls() -> None:
    certificates = Certificates()
    async with ScriptedUpstream(tls=certificates.server(), implicit_tls=True) as upstream:
        client = await Client.connect(upstream.port, tls=certificates.client())
        await client.ehlo()
        assert "STARTTLS" not in client.extensions
        await client.message("a@x.test", ["b@x.test"], CONTENT)
        assert upstream.messages[0].content == CONTENT
        client.close()
        await upstream.wait_for(lambda: not upstream.open_connections)


async def test_certificates_that_must_not_be_trusted() -> None:
    certificates = Certificates()
    for context in (certificates.server("elsewhere.test"), certificates.server(expired=True)):
        async with ScriptedUpstream(tls=context) as upstream, Client(upstream.port) as client:
            await client.ehlo()
            with pytest.raises(ssl.SSLCertVerificationError):
                await client.starttls(certificates.client())


async def test_recording_upstream() -> None:
    async with RecordingUpstream() as upstream:

        def send() -> None:
            with smtplib.SMTP("127.0.0.1", upstream.port, timeout=10) as client:
                client.sendmail("a@x.test", ["b@x.test"], CONTENT)

        await asyncio.to_thread(send)
        envelope = await upstream.message()
        assert (envelope.mail_from, envelope.rcpt_tos, envelope.content) == (
            "a@x.test",
            ["b@x.test"],
            CONTENT,
        )
