"""Learning from human preferences in JAX: SFT, reward models, PPO, DPO and Best-of-N, as experiments one can rerun."""

__version__ = "0.1.0"
