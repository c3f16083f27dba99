"""Networks: one decoder-only Flax (linen) transformer, with policy, reward and value networks built on it."""
