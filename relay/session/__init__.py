"""The client's side: listeners, sessions, what is said in them. With `dev` the only importer of aiosmtpd.

`listeners.py` has the sockets, `reception.py` who is in. `session.py` is the wire of one client: `proxy.py`
and `tls.py` are what may come before its first line, `lines.py` and `blocks.py` cut what it sends.
`dialogue.py` says what that means, without a socket: `commands.py` reads the lines, `content.py` what
stands between them, `replies.py` keeps the order, `answers.py` has the words, `offers.py` those of EHLO.
`login.py` is the AUTH exchange, with `sasl.py` for its mechanisms and `doorkeeper.py` for its verdict.
"""
