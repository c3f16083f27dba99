"""Sampling: prefill, decode loop, continuous batching, and drawing tokens from logits."""
