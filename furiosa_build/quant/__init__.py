"""Quantization: how weights are stored, and what their layers compute."""
