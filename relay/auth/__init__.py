"""Who a client is: what it logs in with, held against a file of users or against the upstream.

`users.py` asks the file, which `userfile.py` reads and `edit.py` changes, with the hashes of `hashing.py`;
`passthrough.py` asks the upstream. Both give a `verdict.py`; `guard.py` slows those who guess.
"""
