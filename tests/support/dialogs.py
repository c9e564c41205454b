"""Runs SMTP conversations that are written as text; the format is in tests/dialogs/README.md.

Rules: the parser refuses what it does not know, with file and line; a dialogue that fails says at which line
of its file, what was expected and what came.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .client import Client
from .upstream import (
    EXTENSIONS,
    Action,
    Close,
    Command,
    Garbage,
    HalfReply,
    Message,
    Reset,
    ScriptedUpstream,
    Silence,
)

__all__ = ["DIALOGS", "Dialogue", "DialogueError", "MismatchError", "parse", "run"]

DIALOGS = Path(__file__).parent.parent / "dialogs"

_HOUSEKEEPING = frozenset({"EHLO", "HELO", "STARTTLS", "AUTH", "NOOP", "RSET", "QUIT"})
_ACTIONS = {"reply": bytes, "close": Close, "reset": Reset, "garbage": Garbage, "half": HalfReply}
_STEP = re.compile(r"(C:|C\||S:|S~|S\.\.\.|U:|U~)(?: (.*))?|([CSU])<([a-z-]+)>")
_EVENTS = frozenset({"C<close>", "C<half-close>", "C<reset>", "S<closed>", "U<nothing>"})
_UPSTREAM = re.compile(r'([A-Za-z_]+)(?: "([^"]*)")? (reply|close|reset|garbage|half|silence)(?: (.*))?')


class DialogueError(Exception):
    """A dialogue file is not written as the format asks."""


class MismatchError(AssertionError):
    """The relay or the upstream's log differs from what the dialogue says."""


@dataclass(frozen=True)
class Step:
    """One line of a conversation: what kind of line, its text (escapes not decoded yet), where it stands."""

    kind: str
    text: str
    where: str


@dataclass
class Dialogue:
    """One file: how the upstream behaves, what the relay is set to, who says what."""

    name: str
    script: dict[str, Any] = field(default_factory=dict)
    extensions: tuple[str, ...] = EXTENSIONS
    relay: dict[str, Any] = field(default_factory=dict)
    """Settings as nested tables, as tomllib gives them: {"server": {"bare_newlines": "refuse"}}."""
    steps: list[Step] = field(default_factory=list)

    def upstream(self) -> ScriptedUpstream:
        """Make the upstream that the dialogue asks for."""
        return ScriptedUpstream(self.script, extensions=self.extensions)


def parse(name: str, text: str) -> Dialogue:
    """Read one dialogue; raise DialogueError for a line that is not in the format."""
    dialogue = Dialogue(name)
    settings = []
    answers: list[tuple[str, str, Action]] = []
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{name}:{number}"
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("@") and dialogue.steps:
            raise DialogueError(f"{where}: directives stand before the conversation")
        if line.startswith("@relay "):
            settings.append(line.removeprefix("@relay "))
        elif line.startswith("@extensions"):
            words = line.removeprefix("@extensions").split(",")
            dialogue.extensions = tuple(word.strip() for word in words if word.strip())
        elif line.startswith("@upstream "):
            answers.append(_answer(line.removeprefix("@upstream "), where))
        else:
            dialogue.steps.append(_step(line, where))
    try:
        dialogue.relay = tomllib.loads("\n".join(settings))
    except tomllib.TOMLDecodeError as error:
        raise DialogueError(f"{name}: @relay: {error}") from None
    dialogue.script = _script(answers)
    if not dialogue.steps:
        raise DialogueError(f"{name}: no conversation")
    return dialogue


async def run(dialogue: Dialogue, port: int, upstream: ScriptedUpstream, *, host: str = "127.0.0.1") -> None:
    """Hold the conversation with the relay at `port`, whose upstream is `upstream`.

    Raises MismatchError at the first line that does not come true, and at the end if the relay has said
    more than the dialogue or has done to the upstream what a client must not.
    """
    async with Client(port, host=host) as client:
        conversation = _Conversation(client, upstream)
        for step in dialogue.steps:
            try:
                await conversation.take(step)
            except (AssertionError, ConnectionError, ValueError) as error:
                raise MismatchError(f"{step.where}: {step.kind} {step.text}\n  {error}") from error
        if conversation.unread:
            raise MismatchError(f"{dialogue.name}: the reply goes on: {conversation.unread!r}")
    if upstream.violations:
        raise MismatchError(f"{dialogue.name}: {'; '.join(upstream.violations)}")


class _Conversation:
    """How far a running dialogue is."""

    def __init__(self, client: Client, upstream: ScriptedUpstream) -> None:
        self.unread: list[bytes] = []
        """Lines of the last reply that no S line has spoken of yet."""
        self._client = client
        self._upstream = upstream
        self._seen = 0

    async def take(self, step: Step) -> None:
        match step.kind:
            case "C:":
                self._nothing_unread()
                await self._client.send(_decoded(step.text) + b"\r\n")
            case "C|":
                await self._client.send(_decoded(step.text))
            case "S:" | "S~":
                _compare(step, await self._reply_line())
            case "S...":
                if not self.unread:
                    raise MismatchError("the reply is over already")
                self.unread.clear()
            case "U:" | "U~":
                await self._upstream.wait_for(lambda: len(self._log()) > self._seen)
                _compare(step, self._log()[self._seen])
                self._seen += 1
            case "U<nothing>":
                if more := self._log()[self._seen :]:
                    raise MismatchError(f"the upstream saw {more!r}")
            case "C<close>":
                self._client.close()
            case "C<half-close>":
                self._client.half_close()
            case "C<reset>":
                self._client.reset()
            case "S<closed>":
                self._nothing_unread()
                if said := await self._client.expect_closed():
                    raise MismatchError(f"instead it says {said!r}")

    async def _reply_line(self) -> bytes:
        if not self.unread:
            self.unread = (await self._client.reply()).raw.split(b"\r\n")[:-1]
        return self.unread.pop(0)

    def _nothing_unread(self) -> None:
        if self.unread:
            raise MismatchError(f"the reply before it goes on: {self.unread!r}")

    def _log(self) -> list[bytes]:
        return [line for entry in self._upstream.log for line in _lines(entry)]


def _lines(entry: Command | Message) -> Iterator[bytes]:
    """Give what the upstream saw as the lines of a trace; commands of the relay's own needs are left out."""
    if isinstance(entry, Message):
        if entry.chunks:
            yield from entry.wire.removesuffix(b"\r\n").split(b"\r\n")
            return
        yield from entry.wire.split(b"\r\n")[:-1]
        yield b"."
    elif entry.verb not in _HOUSEKEEPING:
        yield entry.line


def _compare(step: Step, got: bytes) -> None:
    if step.kind.endswith(":"):
        good = got == _decoded(step.text)
    else:
        good = re.fullmatch(step.text, got.decode("latin-1")) is not None
    if not good:
        raise MismatchError(f"instead {got.decode('ascii', 'backslashreplace')}")


def _decoded(text: str) -> bytes:
    r"""Return the octets that a dialogue's text stands for: UTF-8, with \r \n \t \\ and \xNN, \xNN*1000."""

    def octets(match: re.Match[bytes]) -> bytes:
        escape, digits, times = match[1], match[2], int(match[3] or 1)
        simple = {b"r": b"\r", b"n": b"\n", b"t": b"\t", b"\\": b"\\"}
        return (simple[escape] if digits is None else bytes.fromhex(digits.decode())) * times

    return re.sub(rb"\\(x([0-9A-Fa-f]{2})|[rnt\\])(?:\*(\d+))?", octets, text.encode())


def _step(line: str, where: str) -> Step:
    match = _STEP.fullmatch(line)
    if match is None or (match[1] is None and line not in _EVENTS):
        raise DialogueError(f"{where}: not a line of a dialogue: {line}")
    return Step(match[1] or line, match[2] or "", where)


def _answer(directive: str, where: str) -> tuple[str, str, Action]:
    match = _UPSTREAM.fullmatch(directive)
    if match is None:
        raise DialogueError(f"{where}: not a directive: @upstream {directive}")
    stage, part, verb, text = match.groups()
    if verb == "silence":
        return stage, part or "", Silence()
    octets = _decoded(text or "")
    if octets and verb in ("reply", "close", "reset"):
        octets += b"\r\n"
    return stage, part or "", _ACTIONS[verb](octets)


def _script(answers: list[tuple[str, str, Action]]) -> dict[str, Any]:
    """One answer for a stage holds for good; several are used in turn; a quoted part of the line chooses."""
    script: dict[str, Any] = {}
    for stage, part, action in answers:
        script.setdefault(stage, {}).setdefault(part, []).append(action)
    return {
        stage: {part: found[0] if len(found) == 1 else found for part, found in sorted(parts.items())[::-1]}
        for stage, parts in script.items()
    }
