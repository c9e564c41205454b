"""The store in a PostgreSQL database; needs `pip install 'smtp-relay-record[postgres]'`."""
