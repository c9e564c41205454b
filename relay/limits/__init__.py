"""Rate limits, counted from the records and from what is under way.

`rule.py` says what a limit counts, as pure functions of a message; `tally.py` holds one count and what is
known of it; `limits.py` decides, with one look-up of the store where a count is not known; `claim.py` is what
one transaction holds of the counts between MAIL and its outcome. `configured.py` makes rules of the settings,
`in_force.py` has those of a relay through its reloads, `presence.py` knows whether other relays count too,
and `now.py` tells people how near the edge each limit is.
"""
