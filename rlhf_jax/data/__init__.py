"""Data: downloads, TFDS builders, tables of text, and batches of tokens."""
