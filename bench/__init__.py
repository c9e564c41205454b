"""How fast the relay is, beside sending directly and beside a relay written without care; see run.py."""
