"""Using models outside of training: sampling, log-probabilities, scoring, Best-of-N and comparisons."""
