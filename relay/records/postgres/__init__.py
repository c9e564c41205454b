"""The store in a PostgreSQL database; needs `pip install 'smtp-relay-record[postgres]'`.

`database.py` is the database and the connections to it. On it `store.py` works: `insert.py`, `follow.py`
and `expire.py` are what it does. Beside it `reader.py` and `eraser.py` have connections of their own, with
SQLAlchemy by `engine.py`.
"""
