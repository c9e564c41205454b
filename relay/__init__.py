"""SMTP relay proxy that records sends."""

__version__ = "0.1.0"
