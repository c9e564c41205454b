"""The upstream's side: connections, the pools that keep them, the way of a message to one.

`upstreams.py` has all upstreams by name, `routing.py` the order in which a message may go to them.
`pool.py` is the pool of one: `idle.py` are the connections that nobody has, `shares.py` who waits for one,
`allowance.py` how many there may be, `breaker.py` whether a try is worth it, `health.py` how the upstream is
said to be. `dial.py` opens a connection, with `sasl.py` and `tokens.py` (over HTTP: `endpoint.py`) for the
login; `connection.py` is it once it is open, `capabilities.py` what it can do, `xforward.py` what it is told
of the client.
"""
