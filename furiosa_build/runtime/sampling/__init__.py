"""Choosing the next tokens from logits."""
