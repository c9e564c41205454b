# ruff: noqa: E402 - gevent has to patch first
"""python-slimta as a relay without a queue: PORT UPSTREAM_PORT. Runs in the peers' environment."""

from gevent import monkey

monkey.patch_all()

import signal
import sys
import types

# Of pkg_resources it wants its own version alone, and newer setuptools have none.
sys.modules["pkg_resources"] = types.SimpleNamespace(require=lambda _: [types.SimpleNamespace(version="5")])

import gevent
import slimta.edge.smtp
from gevent.server import StreamServer
from slimta.queue.proxy import ProxyQueue
from slimta.relay.smtp.static import StaticSmtpRelay

POOL = 200


class NoLookup:
    """In place of the look-up of the client's name."""

    def __init__(self, *_: object) -> None:
        pass

    def start(self) -> None:
        pass

    def finish(self, *_: object, **__: object) -> None:
        return None

    def kill(self, *_: object, **__: object) -> None:
        pass


port, upstream_port = map(int, sys.argv[1:])
StreamServer.backlog = 1024
slimta.edge.smtp.PtrLookup = NoLookup
relay = StaticSmtpRelay(
    "127.0.0.1", upstream_port, pool_size=POOL, idle_timeout=30.0, ehlo_as="relay.bench",
    connect_timeout=30, command_timeout=30, data_timeout=120,
)  # fmt: skip
edge = slimta.edge.smtp.SmtpEdge(
    ("127.0.0.1", port), ProxyQueue(relay), max_size=64 << 20, hostname="relay.bench"
)
edge.start()
gevent.signal_handler(signal.SIGTERM, sys.exit, 0)
edge.get()
