"""The artifact: its schema, how it is opened and verified, how it is written."""
