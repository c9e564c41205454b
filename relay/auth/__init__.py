"""Who a client is: what it logs in with, held against a file of users or against the upstream."""
