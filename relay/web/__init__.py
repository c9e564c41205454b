"""The HTTP side: metrics for Prometheus, health for whoever runs the relay. The only importer of aiohttp."""

from relay.web.server import BindError, Web

__all__ = ["BindError", "Web"]
