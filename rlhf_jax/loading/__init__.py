"""Load models and data of earlier stages or checkpoints, export models, and hold the context that a stage runs in."""
