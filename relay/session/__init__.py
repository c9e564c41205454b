"""The client's side: listeners, sessions, command lines. The only importer of aiosmtpd."""
