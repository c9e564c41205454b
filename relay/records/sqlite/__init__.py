"""The store in a SQLite file.

`file.py` is the file and which one it is, `connection.py` a connection to it, `setup.py` makes it ours with
the `tables.py`, and `database.py` is all of that, open. On it `store.py` works: `insert.py`, `follow.py`,
`expire.py` and `presence.py` are what it does. Beside it `reader.py` and `eraser.py` have connections of
their own, with SQLAlchemy by `engine.py` and its `hints.py`. `errors.py` says what an error means.
"""
