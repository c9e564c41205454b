"""Other relays, set up for the same job: take from loopback, pass on to one upstream; no TLS, AUTH or log.

Rules: each is configured as its authors would for speed, with limits out of the way. A peer is looked for
where its package puts it, and in `.peers/`, where `install.sh` puts what cannot be installed beside others.
One that is not there is named with what is missing.
"""
