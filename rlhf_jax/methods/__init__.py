"""The algorithms as pure functions: each can be read from top to bottom, like the algorithm box of its paper."""
