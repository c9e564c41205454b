"""What the tests are built with: scripted SMTP peers, a raw client, text dialogues, the ledgers' checker."""
