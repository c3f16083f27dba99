"""Models of a stage or of a checkpoint, loaded as policies and reward models, and what a stage runs with."""
