"""The record of what was sent: durable before the client hears of it, searched, counted, and deleted in time.

What is kept: `model.py` has the rows as values, `identity.py` their ids, `tables.py` the tables for plain
SQL and `schema.py` for SQLAlchemy, `migrations` their versions.

The way in: `recorder.py` takes a row until it is durable, in the store or in the spool, and carries spooled
rows over; `store.py` is what a store must be, `sqlite` and `postgres` are the two, `errors.py` is what goes
wrong with them. `spool.py` is the directory of rows that wait, `spooler.py` its thread; `segment.py` and
`reserve.py` have its disk space, `spool_line.py` its lines, `bound.py` their greatest length, `aside.py`
the files of lines that could not be carried over. `replay.py` and `inspection.py` are the commands' ways to
it. `journal.py` knows what is between its end of data and its outcome, as lines of `line.py`.

The way out: `retention.py` says how long a row stays, `agreement.py` how long among relays that share a
store, `expiry.py` runs the deletion, `deletion.py` is one run of it, in the `steps.py` and at the pace of
`pacing.py`. `forgetting.py` erases a person; `moving.py` carries a store into another; `relay_id.py` tells
relays apart.

Questions: `sends.py` has what is asked and found as values; `queries.py` searches, `statistics.py` counts,
`over_time.py` counts for a chart, `counts.py` for a limit. What they have in common: `by.py`, `filters.py`,
`patterns.py` and `search.py`.
"""
