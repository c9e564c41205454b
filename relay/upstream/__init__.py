"""The upstream's side: connections, the pool that keeps them, what they can do."""
