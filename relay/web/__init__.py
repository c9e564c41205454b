"""The HTTP side: metrics, health, page and API. With the upstream's tokens the only importer of aiohttp.

What is here has no need of it; `site` has the rest, which takes long to load.
"""

from relay.web.door import BindError, Web
from relay.web.overview import Overview
from relay.web.reading import Reading

__all__ = ["BindError", "Overview", "Reading", "Web"]
