"""What a recipe may say, and how one is composed. Nothing here imports torch or transformers."""
