"""The settings that docs/move.md gives for applications, as they stand there, in those applications."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest

from tests.interop.peers import NODEMAILER, needs, run
from tests.support.process import ROOT
from tests.support.upstream import ScriptedUpstream

PAGE = (ROOT / "docs/move.md").read_text()


def block(language: str, port: int) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert "2525" in found
    return str(found).replace("2525", str(port))


async def check(start: Any, upstream: ScriptedUpstream, language: str, program: str, *command: str) -> None:
    """Send one message by `program`, into which the block goes; see its row."""
    async with start(upstream.port) as running:
        script = program.replace("BLOCK", block(language, running.port))
        done = await run([*command, script], timeout_s=50.0)
        assert done.status == 0, done.said
        (row,) = running.rows("SELECT sender, task_type FROM task_done")
        assert (row["sender"], row["task_type"]) == ("app@example.com", "welcome")


DJANGO = """
given = {}
exec('''BLOCK''', given)
import django.conf
django.conf.settings.configure(**{name: value for name, value in given.items() if name.isupper()})
from django.core.mail import EmailMessage
message = EmailMessage(
    "Hello", "text", "app@example.com", ["ann@example.org"], headers={"X-Task-Type": "welcome"}
)
assert message.send() == 1
"""


async def test_django(start: Any, upstream: ScriptedUpstream) -> None:
    await check(start, upstream, "python", DJANGO, sys.executable, "-c")


NODE = f"""
const nodemailer = require({str(NODEMAILER)!r});
BLOCK
transport.sendMail({{
  from: "app@example.com", to: "ann@example.org", subject: "Hello", text: "text",
  headers: {{"X-Task-Type": "welcome"}},
}}).then(() => transport.close());
"""


@pytest.mark.interop
@needs("node", "nodejs")[1]
@pytest.mark.skipif(not NODEMAILER.exists(), reason="nodemailer is missing: npm install in tests/interop")
async def test_nodemailer(start: Any, upstream: ScriptedUpstream) -> None:
    await check(start, upstream, "js", NODE, "node", "-e")


def test_every_other_application_says_why_it_is_not_run() -> None:
    for before, language in re.findall(r"^(.*)\n```(\w+)$", PAGE, re.MULTILINE):
        if language not in ("python", "js", "toml"):
            assert before.startswith("<!-- not run"), language
