"""The dialogue format, and that a dialogue can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.dialogs import DIALOGS, Dialogue, DialogueError, MismatchError, parse, run
from tests.support.upstream import Close, Silence

GREETING = "S: 220 upstream.test ESMTP\n"


async def hold(text: str) -> Dialogue:
    """Hold a dialogue with the upstream itself in the relay's place."""
    dialogue = parse("test.txt", text)
    async with dialogue.upstream() as upstream:
        await run(dialogue, upstream.port, upstream)
    return dialogue


@pytest.mark.parametrize("path", sorted(DIALOGS.glob("*.txt")), ids=lambda path: path.stem)
def test_every_dialogue_is_in_the_format(path: Path) -> None:
    dialogue = parse(path.name, path.read_text("utf-8"))
    assert dialogue.upstream().script == dialogue.script


def test_directives() -> None:
    dialogue = parse(
        "test.txt",
        '@relay server.bare_newlines = "refuse"\n'
        "@relay server.max_recipients = 3\n"
        "@extensions PIPELINING, SIZE 1000\n"
        "@upstream MAIL reply 451 4.3.0 later\n"
        "@upstream MAIL close\n"
        '@upstream RCPT "b@" reply 550-5.1.1 no\\r\\n550 5.1.1 never\n'
        "@upstream RCPT silence\n" + GREETING,
    )
    assert dialogue.relay == {"server": {"bare_newlines": "refuse", "max_recipients": 3}}
    assert dialogue.extensions == ("PIPELINING", "SIZE 1000")
    assert dialogue.script == {
        "MAIL": {"": [b"451 4.3.0 later\r\n", Close()]},
        "RCPT": {"b@": b"550-5.1.1 no\r\n550 5.1.1 never\r\n", "": Silence()},
    }
    assert next(iter(dialogue.script["RCPT"])) == "b@"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no conversation"),
        ("X: what\n", "test.txt:1: not a line"),
        ("S<opened>\n", "test.txt:1: not a line"),
        ("C:no blank\n", "test.txt:1: not a line"),
        ("C: NOOP\n@relay a = 1\n", "test.txt:2: directives"),
        ("@upstream MAIL explode\nC: NOOP\n", "test.txt:1: not a directive"),
        ("@relay server =\nC: NOOP\n", "@relay"),
    ],
)
def test_what_is_not_in_the_format_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(DialogueError, match=complaint):
        parse("test.txt", text)


async def test_a_dialogue_that_comes_true() -> None:
    await hold(
        GREETING + "C: EHLO client.test\nS~ 250-up.*\nS...\n"
        "C: MAIL FROM:<\\x61@x.test>\nS: 250 2.1.0 ok\nC| RCPT TO:<b@x.test>\\r\\nDATA\\r\\n\n"
        "S: 250 2.1.5 ok\nS: 354 go ahead\nC: ..dot\\n\nC:\nC: .\nS: 250 2.0.0 accepted as 1\n"
        "U: MAIL FROM:<a@x.test>\nU~ RCPT .*\nU: DATA\nU: ..dot\\n\nU:\nU: .\nU<nothing>\n"
        "C<half-close>\nS<closed>\n"
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (GREETING + "C: NOOP\nS: 250 2.0.0 fine\n", 3),
        (GREETING + "C: NOOP\nS~ 250\n", 3),
        (GREETING + "C: EHLO x\nS: 250-upstream.test\nC: NOOP\n", 4),
        (GREETING + "S...\n", 2),
        (GREETING + "C: VRFY x\nS~ 500 .*\nU<nothing>\n", 4),
        (GREETING + "C: VRFY x\nS~ 500 .*\nU: VRFY y\n", 4),
        (GREETING + "C: QUIT\nS<closed>\n", 3),
        (GREETING + "C: QUIT\nS~ 221 .*\nC: NOOP\nS~ .*\n", 5),
    ],
)
async def test_a_dialogue_that_does_not(text: str, line: int) -> None:
    with pytest.raises(MismatchError, match=f"test.txt:{line}: "):
        await hold(text)


async def test_a_reply_that_goes_on_fails_at_the_end() -> None:
    with pytest.raises(MismatchError, match="goes on"):
        await hold(GREETING + "C: EHLO x\nS: 250-upstream.test\n")


async def test_what_no_client_may_do_fails_at_the_end() -> None:
    with pytest.raises(MismatchError, match="octets after DATA"):
        await hold(GREETING + "C| DATA\\r\\nSubject: early\\r\\n\nS~ 503 .*\n")
