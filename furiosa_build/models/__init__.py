"""The transformer as supertasks, taken from transformers' own modules, and where its weights come from."""
