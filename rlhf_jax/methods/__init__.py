"""The algorithms: each a page of pure functions, readable top to bottom as its paper's algorithm box."""
