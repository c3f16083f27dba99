"""Data: fetching, TFDS builders, tables of text, and batches of tokens."""
