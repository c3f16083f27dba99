"""Sampling: prefill, decode loop, and the choice of a token from its logits."""
