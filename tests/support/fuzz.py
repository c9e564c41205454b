"""Hostile clients by the thousand: inputs made of SMTP tokens, hostile tokens and raw octets, and mutations.

Rules: everything follows from the seed. An input is a list of steps; a step is some octets and what the
client does behind them, so that how TCP cuts the stream is part of the input. Inputs that reach new code are
kept and mutated further; what was reached is seen by a trace function of our own, which only looks into
`relay/`, and stays away where something else traces already (a run under coverage): then nothing guides.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any, NamedTuple, Self

import relay

__all__ = ["Guide", "Input", "Inputs", "Step", "shown"]

MAX_STEPS = 40
MAX_OCTETS = 40_000
"""Less than waits unread in a session (dialogue.MAX_INPUT): the relay can always be seen to have read all."""


class Step(NamedTuple):
    """Octets to send, and what comes behind them."""

    octets: bytes
    behind: str
    """"go": the next step at once; "yield": after the relay has had its turn; "rest": when it is at rest;
    "reset": never, the client resets the connection."""


Input = tuple[Step, ...]

_BEHIND = ("go", "yield", "rest")

_PATHS: tuple[bytes, ...] = (
    *(b"<a@example.test>", b"<b@example.test>", b"<>", b"<refused@example.test>", b"<later@example.test>"),
    *(b'<"a b"@example.test>', b'<"a>b"@example.test>', b'<"a\\"b"@example.test>', b"<a@[127.0.0.1]>"),
    *(
        b"<@one,@two:a@b.test>",
        b"<a@b> <c@d>",
        b"<a@b",
        b"a@b",
        b"<a@b>>",
        b"<a\r@b>",
        b"<a\n@b>",
        b"<a\0@b>",
    ),
    *(
        "<ü@example.test>".encode(),
        b"<\xff@b>",
        "<a\u2028@b>".encode(),
        "<a\x85@b>".encode(),
        b"<a\x1b[1m@b>",
    ),
    *(b"<" + b"a" * 300 + b"@b>", b"<" + b"a" * 1100 + b"@b>", b"<a@b>\tSIZE=1", b"<x@y>,<z@w>"),
)
_PARAMETERS: tuple[bytes, ...] = (
    *(
        b"",
        b"",
        b"",
        b" SIZE=10",
        b" SIZE=99999999999",
        b" SIZE=",
        b" SIZE=-1",
        b" BODY=8BITMIME",
        b" SMTPUTF8",
    ),
    *(b" BODY=BINARYMIME", b" RET=FULL ENVID=x", b" NOTIFY=NEVER", b" ORCPT=rfc822;a+2Bb", b" SIZE=1 SIZE=2"),
    *(b" AUTH=<>", b" X=\x01", b" =", b" X==", b"  ", b" " + b"P" * 200 + b"=1", b" NOTIFY=\xe2\x80\xa8"),
)
_LINES: tuple[bytes, ...] = (
    *(
        b"EHLO a",
        b"HELO a",
        b"EHLO",
        b"ehlo [127.0.0.1]",
        b"RSET",
        b"RSET x",
        b"NOOP",
        b"NOOP \x07",
        b"VRFY a",
    ),
    *(
        b"EXPN a",
        b"HELP",
        b"QUIT",
        b"QUIT x",
        b"DATA",
        b"DATA",
        b"data",
        b"DATA x",
        b"STARTTLS",
        b"STARTTLS x",
    ),
    *(b"AUTH PLAIN AGEAYg==", b"AUTH LOGIN", b"AUTH", b"AGEAYg==", b"*", b"ETRN a", b"TURN", b"BDAT 5 LAST"),
    *(b"BDAT 5\r\nNOOP", b"XFORWARD NAME=a", b"XCLIENT ADDR=127.0.0.1", b"GET / HTTP/1.1", b"Host: a", b""),
    *(
        b" NOOP",
        b"NOOP ",
        b"N\0OP",
        b"NOOP\rNOOP",
        b"NOOP\nNOOP",
        b"\x16\x03\x01\x02",
        b"SSH-2.0-x",
        b"\xffMAIL",
    ),
    *(b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2", b"SEND FROM:<a@b>", b"a" * 600, b"A" * 3000, b".", b"..", b"354 go"),
)
_ENDS: tuple[bytes, ...] = (
    *(b"\r\n.\r\n",) * 6,
    *(
        b"\n.\n",
        b"\n.\r\n",
        b"\r\n.\n",
        b"\r.\r",
        b"\r\n.\r",
        b"\r.\r\n",
        b"\n.\r",
        b"\r\n.\r\r\n",
        b"\r\n\0.\r\n",
    ),
    *(b"\r\n.\0\r\n", b"\r\n..\r\n", b"\r\r\n.\r\r\n", b"\r\n.", b".\r\n", b"\n\n.\r\n", b"\r\n.\r\n.\r\n"),
)
_CONTENT: tuple[bytes, ...] = (
    *(
        b"Subject: x\r\n\r\n",
        b"text\r\n",
        b"..dot\r\n",
        b".dot\r\n",
        b"\r\n",
        b"X-Refuse: yes\r\n",
        b"a\nb",
        b"a\rb",
    ),
    *(
        b"\xff\xfe\x85\r\n",
        b"\0",
        b"x" * 1200 + b"\r\n",
        b"Received: x\r\n" * 51,
        b"MAIL FROM:<evil@example.test>\r\n",
    ),
    *(
        b"Message-ID: <\x1b[31m>\r\n",
        b"Subject: =?utf-8?q?=0d=0aBcc:x?=\r\n",
        b"\x0b\x0c\x1c\r\n",
        b": \r\n",
        b" f\r\n",
    ),
)
_EVIL = (
    b"MAIL FROM:<evil@example.test>\r\nRCPT TO:<b@example.test>\r\nDATA\r\nSubject: evil\r\n\r\nevil\r\n.\r\n"
)


class Inputs:
    """Where inputs come from: new ones, and mutations of those that were worth keeping."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._kept: list[Input] = []

    @property
    def kept(self) -> int:
        """How many were worth keeping."""
        return len(self._kept)

    def next(self) -> Input:
        """Return the next input."""
        dice = self._dice
        if not self._kept or dice.random() < 0.3:
            steps = self._session()
        else:
            steps = list(dice.choice(self._kept))
            for _ in range(dice.randrange(1, 5)):
                dice.choice(self._mutations)(self, steps)
        return _bounded(steps)

    def keep(self, steps: Input) -> None:
        """Keep an input for mutation."""
        self._kept.append(steps)

    # New ones

    def _session(self) -> list[Step]:
        dice = self._dice
        steps = [Step(b"EHLO a.test\r\n", self._behind())] if dice.random() < 0.95 else []
        for _ in range(dice.randrange(1, 4)):
            steps += self._transaction() if dice.random() < 0.7 else [self._token()]
        return steps

    def _transaction(self) -> list[Step]:
        """Return a transaction that could be one: mostly good, with something wrong here and there."""
        dice = self._dice
        polite = dice.random() < 0.85
        steps = [Step(b"MAIL FROM:" + self._path() + self._parameters() + b"\r\n", self._behind())]
        steps += [
            Step(b"RCPT TO:" + self._path() + self._parameters() + b"\r\n", self._behind())
            for _ in range(dice.randrange(1, 4))
        ]
        steps.append(Step(b"DATA\r\n", "rest" if polite else self._behind()))
        content = b"".join(dice.choice(_CONTENT) for _ in range(dice.randrange(4)))
        steps.append(Step(content, self._behind()))
        if dice.random() < 0.3:
            steps += [Step(dice.choice(_ENDS), self._behind()), Step(_EVIL, self._behind())]
        end = _ENDS[0] if polite else dice.choice(_ENDS)
        steps.append(Step(end, "rest" if polite else self._behind()))
        return steps

    def _path(self) -> bytes:
        return _PATHS[0] if self._dice.random() < 0.8 else self._dice.choice(_PATHS)

    def _parameters(self) -> bytes:
        return b"" if self._dice.random() < 0.85 else self._dice.choice(_PARAMETERS)

    def _behind(self) -> str:
        return self._dice.choice(_BEHIND)

    def _token(self) -> Step:
        dice = self._dice
        kind = dice.random()
        if kind < 0.6:
            octets = dice.choice(_LINES) + (
                b"\r\n" if dice.random() < 0.9 else dice.choice((b"\n", b"\r", b""))
            )
        elif kind < 0.7:
            octets = dice.choice(_ENDS)
        elif kind < 0.8:
            octets = dice.choice(_CONTENT)
        elif kind < 0.9:
            octets = dice.randbytes(dice.randrange(1, 60))
        else:
            octets = bytes(dice.choices(b"\r\n.a\0", k=dice.randrange(1, 12)))
        return Step(octets, self._behind())

    # Mutations

    def _insert(self, steps: list[Step]) -> None:
        steps.insert(self._dice.randrange(len(steps) + 1), self._token())

    def _delete(self, steps: list[Step]) -> None:
        if len(steps) > 1:
            del steps[self._dice.randrange(len(steps))]

    def _repeat(self, steps: list[Step]) -> None:
        at = self._dice.randrange(len(steps))
        steps[at:at] = [steps[at]] * self._dice.choice((1, 1, 2, 25))

    def _swap(self, steps: list[Step]) -> None:
        one, other = (self._dice.randrange(len(steps)) for _ in range(2))
        steps[one], steps[other] = steps[other], steps[one]

    def _splice(self, steps: list[Step]) -> None:
        other = self._dice.choice(self._kept)
        steps[self._dice.randrange(len(steps) + 1) :] = other[self._dice.randrange(len(other)) :] or other

    def _hurry(self, steps: list[Step]) -> None:
        at = self._dice.randrange(len(steps))
        steps[at] = steps[at]._replace(behind=self._behind() if self._dice.random() < 0.9 else "reset")

    def _cut(self, steps: list[Step]) -> None:
        at = self._dice.randrange(len(steps))
        octets, behind = steps[at]
        if octets:
            place = self._dice.randrange(len(octets))
            steps[at : at + 1] = [Step(octets[:place], self._behind()), Step(octets[place:], behind)]

    def _spoil(self, steps: list[Step]) -> None:
        at = self._dice.randrange(len(steps))
        octets, behind = steps[at]
        if octets:
            place = self._dice.randrange(len(octets))
            odd = self._dice.choice((b"\r", b"\n", b"\0", b".", b"\r\n", b"", self._dice.randbytes(1)))
            steps[at] = Step(octets[:place] + odd + octets[place + self._dice.randrange(2) :], behind)

    _mutations: tuple[Callable[[Inputs, list[Step]], None], ...] = (
        *(_insert, _delete, _repeat, _swap, _splice, _hurry, _cut, _spoil),
    )


def _bounded(steps: list[Step]) -> Input:
    steps = steps[:MAX_STEPS]
    while sum(len(step.octets) for step in steps) > MAX_OCTETS:
        steps.pop()
    return tuple(steps)


def shown(steps: Input) -> str:
    """Return an input as Python text, to be pasted into a test."""
    return "(\n" + "".join(f"    Step({step.octets!r}, {step.behind!r}),\n" for step in steps) + ")"


class Guide:
    """Which ways through the relay's code have been taken; `with guide:` around each input."""

    def __init__(self) -> None:
        self._home = str(Path(relay.__file__).parent)
        self._ours: dict[CodeType, bool] = {}
        self._all: set[tuple[int, int, int]] = set()
        self._now: set[tuple[int, int, int]] = set()
        self._before = 0
        self._active = False

    @property
    def ways(self) -> int:
        """How many steps from line to line have been seen."""
        return len(self._all)

    def __enter__(self) -> Self:
        self._now = set()
        self._active = sys.gettrace() is None
        if self._active:
            sys.settrace(self._call)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            sys.settrace(None)

    def is_new(self) -> bool:
        """Whether the last input has taken a way that none before it took."""
        found = not self._now <= self._all
        self._all |= self._now
        return found

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        ours = self._ours.get(code)
        if ours is None:
            ours = self._ours[code] = code.co_filename.startswith(self._home)
        if not ours:
            return None
        self._before = 0
        return self._line

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            line = frame.f_lineno
            self._now.add((id(frame.f_code), self._before, line))
            self._before = line
        return self._line
