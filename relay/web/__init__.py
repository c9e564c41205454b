"""The HTTP side: metrics, health, page and API. With the upstream's tokens the only importer of aiohttp."""

from relay.web.access import Access
from relay.web.api import Api
from relay.web.overview import Overview
from relay.web.page import Page
from relay.web.reading import Reading
from relay.web.server import BindError, Site, Web

__all__ = ["Access", "Api", "BindError", "Overview", "Page", "Reading", "Site", "Web"]
