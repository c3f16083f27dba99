"""`python -m rlhf_jax` is the console script `rlhf-jax`."""

from rlhf_jax.main import entry_point

entry_point()
