"""The record of what was sent: model, recorder, store, spool, expiry, migrations."""
