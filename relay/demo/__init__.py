"""`relay demo`: an hour in the mail of a small product, played through a relay in a minute.

Rules. Everything is real but the mail: applications that speak SMTP, the relay with its store, page and
metrics, an upstream (the built-in one) that has its moods. All of it is on loopback, in a directory of its
own, and sends nothing to anybody.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

from relay import maillog
from relay.app import Relay
from relay.demo.hour import MINUTES, manner_of, the_hour
from relay.demo.player import Player
from relay.dev import DevUpstream, listen
from relay.process import unless
from relay.settings import DEV_UPSTREAM, load

__all__ = ["configuration", "demo"]

SLOWEST_S = 1.5
"""How long the upstream takes at most for a verdict in its slow minutes."""

CONFIGURATION = """\
# The demonstration's relay. Ask its records with relay sends --config and the name of this file.
# This directory is the demonstration's alone; remove it when you are done.

[server]
hostname = "relay.demo.example"

[clients]
allow = ["127.0.0.0/8"]

# The built-in upstream, which sends nothing; it is there while `relay demo` runs.
[[upstreams]]
name = "provider"
address = "{upstream}"
tls = "none"

[records]
url = {url}
spool = {spool}

[retention]
default = "30d"
[retention.by_type]
password-reset = "7d"
order-confirmation = "365d"
digest = "14d"
mention = "30d"
invoice = "never"

# Nobody resets a password more than three times an hour.
[[limits]]
name = "password-resets"
scope = "recipient"
task_type = "password-reset"
max = 3
per = "1h"
action = "reject"

# A rate of the provider's, watched and never enforced.
[[limits]]
name = "provider-hour"
scope = "all"
max = 800
per = "1h"
action = "observe"

[log]
format = "console"
level = "error"
"""


def configuration(directory: Path) -> Path:
    """Return the demonstration's configuration, written if it is not there yet."""
    file = directory / "relay.toml"
    if not file.exists():
        directory.mkdir(parents=True, exist_ok=True)
        text = CONFIGURATION.format(
            url=_toml(f"sqlite:///{directory.as_posix()}/task_done.db"),
            spool=_toml(f"{directory.as_posix()}/spool"),
            upstream=DEV_UPSTREAM,
        )
        file.write_text(text, encoding="utf-8")
    return file


def _toml(text: str) -> str:
    """Return text as a basic string of TOML, which is one of JSON but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


async def demo(
    file: Path, environ: Mapping[str, str], *, seconds: float, leave: bool, tell: Callable[[str], None]
) -> None:
    """Play the hour in so many seconds, with a relay by the configuration in `file`; then stay, or `leave`.

    SIGINT and SIGTERM end it. Raises SettingsError, StartError, OSError.
    """
    settings = load(file, environ)
    maillog.configure(settings.log.format, settings.log.level)
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    relay, player = Relay(settings), Player(seconds, the_hour(), tell)
    upstream = settings.upstreams[0]
    slow_s = min(SLOWEST_S, seconds / MINUTES)
    listening = listen(upstream.host, upstream.port)
    async with DevUpstream(listening, manner=manner_of(player.minute), slow_s=slow_s):
        await relay.start()
        try:
            await relay.answering()
            page = f"http://{settings.http.host}:{relay.web.port}/"
            tell(f"A relay listens on {relay.reception.addresses[0]}; its upstream sends nothing to anybody.")
            tell(f"  page      {page}")
            tell(f"  metrics   {page}metrics")
            tell(f"  commands  relay sends --config {file}")
            host, _, port = relay.reception.addresses[0].rpartition(":")
            if await unless(ended, player.play(host, int(port))) and not leave:
                tell("The relay stays for you to look around; Ctrl-C ends it.")
                await ended.wait()
        finally:
            await relay.stop()
