"""Inference with trained models: sampling, log-probabilities, scoring, Best-of-N and comparisons."""
