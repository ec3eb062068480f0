"""Judging an artifact: what is asked, what transformers answers from the source, and what differs."""
