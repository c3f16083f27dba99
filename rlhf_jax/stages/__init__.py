"""The stages of an experiment: one file each, readable top to bottom as its paper's algorithm."""
